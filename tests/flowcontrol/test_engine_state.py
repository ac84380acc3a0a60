"""What is known of an engine: its clock, capacity and counters over all of its lives, and when it takes tasks."""

from __future__ import annotations

import math

import msgspec
import pytest

from engine.link import PROTOCOL, Ended, Hello, Report
from gateway.flowcontrol.engine_state import (
    BACK_OFF_S,
    CAPACITY_ENOUGH,
    CAPACITY_HORIZON,
    LONGEST_BACK_OFF_S,
    RECOVERED_S,
    REMEMBERED_ENDS,
    SLOTS_OF_STOCK,
    SLOTS_WITHOUT_CAPACITY,
    Counters,
    EngineState,
    ServedCapacity,
    ServedRate,
)


def hello(life: str = "one") -> Hello:
    return Hello(PROTOCOL, life, "0.32.0", total_blocks=127, block_size=32, max_num_seqs=64, max_model_len=2048)


def report(iteration: int, life: str = "one", preempted: int = 0) -> Report:
    return Report(
        engine_id=life,
        iteration=iteration,
        free_blocks=100,
        running=2,
        waiting=1,
        preempted=preempted,
        tasks=[7, -1],
        kv_tokens=[50, 8],
        output_tokens=[3, 1],
    )


def test_a_report_before_hello_is_not_counted() -> None:
    state = EngineState()
    state.take(report(5), 0)
    assert state.iterations == 0
    assert not state.reporting


def test_hello_and_report_give_capacity_clock_and_what_is_held() -> None:
    state = EngineState()
    state.take(hello(), 0)
    state.take(report(1000), 0)
    state.take(report(1005), 0)
    assert state.capacity_tokens == 127 * 32
    assert (state.engine_max_num_seqs, state.max_model_len) == (64, 2048)
    assert state.now == 5, "what the engine did before we came is not ours to count"
    assert (state.running, state.waiting, state.held_tokens) == (2, 1, 27 * 32)
    assert state.held[7].output_tokens == 3


def test_the_clock_goes_on_over_restarts_and_never_back() -> None:
    state = EngineState()
    state.take(hello(), 0)
    state.take(report(0), 0)
    state.take(report(100, preempted=4), 0)
    state.take(report(99), 0)  # late
    assert state.now == 100
    state.is_down()
    assert state.held == {}
    state.take(hello("two"), 0)
    state.take(report(101, "one"), 0)  # of the engine that is gone
    state.take(report(10, "two", preempted=1), 0)
    assert (state.now, state.counters.preempted, state.restarts) == (110, 5, 1)


def test_what_the_settings_declare_goes_before_what_the_engine_reports() -> None:
    state = EngineState(declared_capacity_tokens=1000)
    state.take(hello(), 0)
    assert state.capacity_tokens == 1000


def test_a_link_that_falls_silent_does_not_report_and_its_last_report_does_not_hold() -> None:
    state = EngineState()
    state.take(hello(), 100)
    state.take(report(5), 100)
    state.check_silence(104)
    assert state.reporting
    state.check_silence(106)
    assert not state.reporting
    assert (state.waiting, state.running, state.held) == (0, 0, {})
    state.take(report(6), 107)
    assert state.reporting


def test_the_effective_capacity_is_the_whole_until_there_is_enough_to_go_by() -> None:
    served = ServedCapacity()
    assert served.tokens(1000) == 1000
    served.observe(CAPACITY_ENOUGH - 1, 600)
    assert served.tokens(1000) == 1000
    served.observe(1, 600)
    assert served.tokens(1000) == pytest.approx(600)


def test_the_effective_capacity_is_a_mean_over_iterations() -> None:
    at_once, one_by_one = ServedCapacity(), ServedCapacity()
    at_once.observe(300, 400)
    at_once.observe(100, 800)
    for _ in range(300):
        one_by_one.observe(1, 400)
    for _ in range(100):
        one_by_one.observe(1, 800)
    assert at_once.tokens(1000) == pytest.approx(500)
    assert one_by_one.tokens(1000) == pytest.approx(500)


def test_what_was_long_ago_counts_less_and_less() -> None:
    served = ServedCapacity()
    served.observe(100 * CAPACITY_HORIZON, 900)
    assert served.tokens(1000) == 900
    for _ in range(int(CAPACITY_HORIZON)):
        served.observe(1, 400)
    assert served.tokens(1000) == pytest.approx(400 + 500 / math.e, rel=0.01)
    served.observe(CAPACITY_HORIZON, 300)
    assert served.tokens(1000) == pytest.approx(300)


def test_the_effective_capacity_is_at_most_the_whole() -> None:
    served = ServedCapacity()
    served.observe(1000, 5000)
    assert served.tokens(1000) == 1000
    assert served.tokens(9000) == pytest.approx(5000)


@pytest.mark.parametrize("iterations", [0.0, -3.0])
def test_a_clock_that_stands_still_shows_nothing_of_capacity(iterations: float) -> None:
    served = ServedCapacity()
    served.observe(1000, 600)
    served.observe(iterations, 0)
    assert served.tokens(1000) == 600


# Counters over lives


def counted(life: str, iteration: int, *counters: int) -> Report:
    names = ("preempted", "recomputed_tokens", "displaced", "displaced_tokens", "refused")
    return msgspec.structs.replace(report(iteration, life), **dict(zip(names, counters, strict=True)))


def test_counters_go_on_over_the_lives_of_the_engine() -> None:
    state = EngineState()
    state.take(hello("one"), 0)
    state.take(counted("one", 10, 5, 500, 2, 200, 7), 0)
    assert state.counters == Counters(), "what was counted before we came"
    state.take(counted("one", 20, 6, 520, 3, 210, 7), 0)
    assert state.counters == Counters(1, 20, 1, 10, 0)
    state.take(counted("one", 15, 1, 1, 1, 1, 1), 0)
    assert state.counters == Counters(1, 20, 1, 10, 0), "an old report"
    state.take(counted("one", 20, 6, 520, 3, 210, 7), 0)
    assert state.counters == Counters(1, 20, 1, 10, 0), "and the last one again"
    state.take(hello("one"), 0)  # for another subscriber
    state.take(counted("one", 30, 7, 530, 3, 210, 8), 0)
    assert state.counters == Counters(2, 30, 1, 10, 1)
    state.take(hello("two"), 0)
    state.take(counted("two", 3, 4, 40, 1, 11, 2), 0)
    assert (state.counters, state.restarts) == (Counters(6, 70, 2, 21, 3), 1)
    state.take(counted("one", 99, 99, 99, 99, 99, 99), 0)
    assert state.counters == Counters(6, 70, 2, 21, 3), "of the engine that is gone"


def test_what_is_kept_is_in_tokens() -> None:
    state = EngineState()
    state.take(hello(), 0)
    state.take(msgspec.structs.replace(report(1), kept_blocks=5), 0)
    assert state.kept_tokens == 5 * 32
    state.is_down()
    assert state.kept_tokens == 0


# What tasks held


def test_what_a_task_held_is_the_sum_over_its_sequences_and_is_returned_once() -> None:
    state = EngineState()
    state.take(hello(), 0)
    state.take(Ended("one", {7: 100.0, 8: 5.0}), 0)
    state.take(Ended("one", {7: 20.5}), 0)
    assert state.take_counted(7) == 120.5
    assert state.take_counted(7) is None
    assert state.take_counted(99) is None
    assert state.take_counted(8) == 5.0
    assert not state.counted


def test_the_ends_of_another_engine_are_passed_over() -> None:
    state = EngineState()
    state.take(Ended("one", {7: 100.0}), 0)
    state.take(hello("one"), 0)
    state.take(Ended("two", {8: 100.0}), 0)
    assert (state.take_counted(7), state.take_counted(8)) == (None, None)


def test_ends_that_are_not_asked_for_are_forgotten_the_oldest_first() -> None:
    state = EngineState()
    state.take(hello(), 0)
    for task in range(REMEMBERED_ENDS + 10):
        state.take(Ended("one", {task: 1.0}), 0)
    assert len(state.counted) == REMEMBERED_ENDS
    assert (state.take_counted(9), state.take_counted(10), state.take_counted(REMEMBERED_ENDS + 9)) == (None, 1.0, 1.0)
    state.take(Ended("one", dict.fromkeys(range(10**5, 10**5 + 2 * REMEMBERED_ENDS), 2.0)), 0)
    assert len(state.counted) == REMEMBERED_ENDS


def test_what_agents_hold_stands_until_it_is_reported_anew_or_nothing_runs() -> None:
    state = EngineState()
    state.take(hello(), 0)
    state.take(msgspec.structs.replace(report(1), agents={"a": 12.5}), 0)
    state.take(report(2), 0)
    assert state.agents == {"a": 12.5}
    state.take(msgspec.structs.replace(report(3), running=0, tasks=[], kv_tokens=[], output_tokens=[]), 0)
    assert state.agents == {}


# When it takes tasks


def test_after_a_task_was_lost_none_is_taken_until_a_check_has_succeeded() -> None:
    state = EngineState()
    assert not state.takes_tasks(0)
    state.answers()
    assert state.takes_tasks(0)
    state.lost_task(1, reached=True)
    assert not state.takes_tasks(1)
    state.answers()
    assert state.takes_tasks(1), "it was there: nothing is to be waited for"


def test_an_engine_that_takes_no_connections_is_tried_ever_more_seldom() -> None:
    state, at_s, waits = EngineState(), 0.0, []
    for _ in range(8):
        state.answers()
        assert state.takes_tasks(at_s)
        state.lost_task(at_s, reached=False)
        state.answers()  # its health is as good as ever
        begin_s = at_s
        while not state.takes_tasks(at_s):
            at_s += BACK_OFF_S / 4
        waits.append(at_s - begin_s)
    assert waits == [min(LONGEST_BACK_OFF_S, BACK_OFF_S * 2**number) for number in range(8)]
    at_s += RECOVERED_S
    state.lost_task(at_s, reached=False)
    state.answers()
    assert state.takes_tasks(at_s + BACK_OFF_S), "after a while without a failure the first one counts again"


def test_slots() -> None:
    state = EngineState()
    assert state.slots(4) == SLOTS_WITHOUT_CAPACITY
    state.take(msgspec.structs.replace(hello(), max_num_seqs=0), 0, linked=False)
    assert state.slots(4) == SLOTS_OF_STOCK + 4
    state.take(hello(), 0)
    assert state.slots(4) == 64 + 4
    state.declared_max_num_seqs = 3
    assert state.slots(4) == 3


def test_only_over_the_link_an_engine_reports_what_tasks_held() -> None:
    state = EngineState()
    state.take(hello(), 0, linked=False)
    assert state.reporting and not state.counts_held
    state.take(hello(), 0)
    assert state.counts_held
    state.check_silence(10)
    assert not state.counts_held


def test_the_rate_is_known_after_a_second_and_follows_what_is_served() -> None:
    rate = ServedRate()
    rate.observe(0.5, 500)
    assert rate.per_s() is None
    rate.observe(1, 1000)
    assert rate.per_s() == pytest.approx(1000)
    for _ in range(1000):
        rate.observe(1, 300)
    assert rate.per_s() == pytest.approx(300)
    rate.observe(0, 10**9)
    assert rate.per_s() == pytest.approx(300), "no time has passed"
