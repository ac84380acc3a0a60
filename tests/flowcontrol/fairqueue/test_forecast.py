"""The memory to come: cases worked by hand, and against a simulation that steps through time."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue.forecast import Forecast
from gateway.flowcontrol.fairqueue.types import AgentId, Iterations, KvTokenIterations, Task, TaskId


def task(number: int, prompt: float, decode: float, sequences: int = 1) -> Task:
    return Task(TaskId(number), AgentId("a"), KvTokenIterations(0), prompt + decode, prompt, sequences)


def forecast(*tasks: Task, now: float = 0) -> Forecast:
    made = Forecast()
    for each in tasks:
        made.add(Iterations(now), each)
    return made


def peak(of: Forecast, now: float, newcomer: Task | None = None) -> float:
    """With a newcomer: where `fits` begins to say yes, which is the peak if it had begun now."""
    if newcomer is None:
        return of.peak(Iterations(now))
    also = copy.deepcopy(of)
    also.add(Iterations(now), newcomer)
    most = also.peak(Iterations(now))
    assert of.fits(Iterations(now), newcomer, most + 1e-6) and not of.fits(Iterations(now), newcomer, most - 1e-3)
    return most


def test_nothing_is_held_by_nobody() -> None:
    assert peak(Forecast(), 5) == 0 and Forecast().held(Iterations(5)) == 0


def test_the_peak_of_two_is_where_the_shorter_one_ends() -> None:
    """At 5: 100 + 5, and 10 + 5. At 20 the second alone: 30."""
    both = forecast(task(1, 100, 5), task(2, 10, 20))
    assert peak(both, 0) == 120
    assert both.held(Iterations(0)) == 110
    assert both.held(Iterations(3)) == 116


def test_the_peak_can_be_at_the_end_of_the_longer_one() -> None:
    assert peak(forecast(task(1, 1, 5), task(2, 10, 100)), 0) == 110


def test_two_that_end_in_one_iteration_are_both_held_until_then() -> None:
    assert peak(forecast(task(1, 10, 5), task(2, 20, 5)), 0) == 40


def test_a_newcomer_counts_from_now_and_is_not_kept() -> None:
    """Begun at 4 of 10, the first gives back before the newcomer has grown: at 10 they hold 60 + (30 + 6)."""
    one = forecast(task(1, 50, 10))
    assert peak(one, 4, task(2, 30, 20)) == 96
    assert peak(one, 4, task(2, 80, 20)) == 146
    assert peak(one, 9, task(2, 30, 40)) == 91, "60 + 31; later it alone holds 70"
    assert peak(one, 4) == 60 and len(one) == 1


def test_a_task_that_outlives_its_prediction_goes_on_for_a_quarter_of_what_it_has_done() -> None:
    one = forecast(task(1, 50, 20))
    assert peak(one, 19) == 70
    assert peak(one, 20) == 75
    assert peak(one, 24) == 75
    assert peak(one, 25) == pytest.approx(50 + 25 * 1.25)


def test_and_for_one_iteration_at_least() -> None:
    assert peak(forecast(task(1, 50, 0)), 0) == 51


def test_sequences_grow_side_by_side_and_end_sooner() -> None:
    """40 tokens by 4 sequences take 10 iterations."""
    branched = forecast(task(1, 10, 40, sequences=4))
    assert branched.held(Iterations(3)) == 22
    assert peak(branched, 0) == 50
    assert peak(branched, 0, task(2, 5, 10)) == 65
    assert peak(branched, 0, task(2, 5, 9)) == 10 + 36 + 14


def test_what_the_engine_says_moves_begin_and_end() -> None:
    """It has waited 15 iterations at the engine, then decoded 5 tokens: it ends at 45, not at 30."""
    one = forecast(task(1, 10, 30))
    one.observe(Iterations(20), TaskId(1), 15, 5)
    assert one.held(Iterations(20)) == 15
    assert peak(one, 31) == 40, "not outlived"
    assert peak(one, 45) > 40


def test_what_the_engine_says_of_the_prompt_counts() -> None:
    one = forecast(task(1, 10, 30))
    one.observe(Iterations(5), TaskId(1), 95, 5)
    assert one.held(Iterations(5)) == 95
    assert peak(one, 5) == 120


def test_a_small_difference_is_let_be() -> None:
    one = forecast(task(1, 10, 30))
    one.observe(Iterations(5), TaskId(1), 12, 2)
    assert one.held(Iterations(5)) == 15


def test_who_has_ended_is_forgotten() -> None:
    both = forecast(task(1, 100, 5), task(2, 0.1, 20))
    both.remove(TaskId(1))
    assert peak(both, 0) == pytest.approx(20.1)
    both.remove(TaskId(2))
    assert peak(both, 0) == 0 and both.held(Iterations(1000)) == 0
    with pytest.raises(KeyError):
        both.remove(TaskId(2))


def test_calibration_is_the_mean_over_the_last_hundred_reports() -> None:
    """The engine holds 150 for 100 reckoned: one report moves the forecast by a hundredth of the difference that is left."""
    one = forecast(task(1, 100, 50))
    for reports in range(1, 301):
        one.calibrate(Iterations(0), 150)
        assert one.held(Iterations(0)) == pytest.approx(150 - 50 * 0.99**reports)
    assert peak(one, 0) == pytest.approx(1.5 * 150, rel=0.05)


@given(st.lists(st.floats(20, 500), min_size=1, max_size=50))
def test_a_single_report_moves_the_forecast_by_a_hundredth_at_most(reports: list[float]) -> None:
    """A burst of strange reports cannot open or close the engine, whatever they say."""
    one = forecast(task(1, 100, 50))
    for held_tokens in reports:
        before = one.held(Iterations(0))
        one.calibrate(Iterations(0), held_tokens)
        assert one.held(Iterations(0)) - before == pytest.approx((held_tokens - before) / 100)


@pytest.mark.parametrize("held_tokens", [0.0, -5.0, float("inf"), float("nan")])
def test_a_report_that_cannot_be_calibrates_nothing(held_tokens: float) -> None:
    one = forecast(task(1, 100, 50))
    one.calibrate(Iterations(0), held_tokens)
    assert one.held(Iterations(0)) == 100


class Stepped:
    """The same by stepping through time, a quarter of an iteration each. Tasks: began, ends, prompt, tokens an iteration."""

    def __init__(self) -> None:
        self.tasks: dict[int, list[float]] = {}

    def add(self, now: int, number: int, prompt: int, length: int, rate: int) -> None:
        self.tasks[number] = [now, now + length, prompt, rate]

    def peak(self, now: int, *newcomer: float) -> float:
        for task in self.tasks.values():
            if task[1] <= now:
                task[1] = now + max(1, (now - task[0]) / 4)
        tasks = [*self.tasks.values(), *([newcomer] if newcomer else [])]
        last = max((end for _, end, *_ in tasks), default=now)
        times = [now + quarter / 4 for quarter in range(round((last - now) * 4) + 1)]
        return max(sum(p + k * (t - began) for began, end, p, k in tasks if t <= end) for t in times)


tasks = st.tuples(st.integers(0, 60), st.integers(1, 25), st.integers(1, 3))  # prompt, iterations, sequences


@given(st.lists(st.tuples(st.integers(0, 8), st.none() | tasks, st.integers(0, 5)), max_size=20))
def test_agrees_with_stepping_through_time(steps: list[tuple[int, tuple[int, int, int] | None, int]]) -> None:
    """A task begins, or one ends; at every step the peak is the highest point of what is to come."""
    fast, slow, now = Forecast(), Stepped(), 0
    for number, (wait, begins, which) in enumerate(steps):
        now += wait
        if begins is not None:
            prompt, length, rate = begins
            newcomer = task(number, prompt, length * rate, rate)
            assert peak(fast, now, newcomer) == pytest.approx(slow.peak(now, now, now + length, prompt, rate))
            fast.add(Iterations(now), newcomer)
            slow.add(now, number, prompt, length, rate)
        elif slow.tasks:
            ended = sorted(slow.tasks)[which % len(slow.tasks)]
            fast.remove(TaskId(ended))
            del slow.tasks[ended]
        assert peak(fast, now) == pytest.approx(slow.peak(now))
        assert len(fast) == len(slow.tasks)
