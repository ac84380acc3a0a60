"""Our scheduler on vLLM's real one: order, victims, places and reports. No engine, no model, no clock.

Each claim about victims and places has its control: the same scenario on vLLM's own priority scheduler, where it fails.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

import engine.link
from engine.hints import Hints
from engine.link import PROTOCOL, Change, Ended, Greeting, Hello, Holding, Report, encode, inbox, parse
from engine.scheduler import displacement
from engine.scheduler.displacement import DISPLACED_AT_MOST, DISPLACED_SHARE
from engine.scheduler.order import hints_of, victims_last
from engine.scheduler.scheduler import EARLY_TAGS, JustitiaScheduler, settings_of
from tests.engine.clockwork import BLOCK_SIZE, Clockwork

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", autouse=True)
def vllm_is_quiet() -> Iterator[None]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    yield
    logging.getLogger("vllm").setLevel(logging.INFO)


def ours(clock: Clockwork) -> Report:
    assert isinstance(clock.scheduler, JustitiaScheduler)
    return clock.scheduler.reporting.report()


# Order


def test_tasks_run_by_tag_then_agent_then_task(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    clock.add("late", Hints(9, "a", 1), 10, 3)
    clock.add("b2", Hints(5, "b", 4), 10, 3)
    clock.add("b1", Hints(5, "b", 3), 10, 3)
    clock.add("a2", Hints(5, "a", 6), 10, 3)
    clock.add("urgent", Hints(-7, "z", 9), 10, 3)
    clock.add("no gateway", None, 10, 3)
    assert clock.run() == ["urgent", "no gateway", "a2", "b1", "b2", "late"]


def test_who_does_not_fit_is_not_overtaken(tiny_model_dir: Path) -> None:
    """The most urgent waits for memory, and what is behind it would fit: vLLM admits nobody past it."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=4)
    clock.add("runs", Hints(1, "a", 1), 2 * BLOCK_SIZE - 20, 10)
    clock.step()
    clock.add("large", Hints(2, "b", 2), 3 * BLOCK_SIZE, 2)
    clock.add("small", Hints(3, "c", 3), 4, 2)
    clock.step()
    assert clock.running() == {"runs"}
    assert clock.waiting() == ["large", "small"]
    assert clock.run() == ["runs", "large", "small"]


# Victims


def full_memory(scheduler_class: type[Scheduler], model: Path) -> Clockwork:
    """8 blocks: one for the urgent task, one for the small task of the later agent, and six for that agent's large one.

    The urgent one is the first to need another. By arrival, the large one is the last.
    """
    clock = Clockwork(scheduler_class, model, blocks=8)
    clock.add("urgent", Hints(1, "a", 1), BLOCK_SIZE - 2, 40)
    clock.add("small", Hints(2, "b", 2), 10, 40)
    clock.add("large", Hints(2, "b", 3), 6 * BLOCK_SIZE - 15, 40)
    clock.step()
    assert clock.running() == {"urgent", "small", "large"}
    assert clock.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    clock.until(lambda: bool(clock.preempted))
    return clock


def test_the_victim_is_of_the_last_agent_and_loses_the_least(tiny_model_dir: Path) -> None:
    clock = full_memory(JustitiaScheduler, tiny_model_dir)
    assert clock.preempted == ["small"]
    assert ours(clock).preempted == 1
    assert clock.waiting() == ["small"]
    clock.run()
    assert "urgent" not in clock.preempted


def test_control_vllm_preempts_the_one_that_loses_the_most(tiny_model_dir: Path) -> None:
    assert full_memory(AsyncScheduler, tiny_model_dir).preempted == ["large"]


def test_no_task_is_the_victim_of_a_later_one(tiny_model_dir: Path) -> None:
    """The later agent needs the block, and is its own victim, although it came first and has computed the most."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=5)
    clock.add("later", Hints(2, "b", 1), 4 * BLOCK_SIZE - 2, 30)
    clock.step()
    clock.add("urgent", Hints(1, "a", 2), 10, 20)
    clock.until(lambda: bool(clock.preempted))
    assert clock.preempted == ["later"]
    assert clock.run() == ["urgent", "later"]


# Places


def preempted_all(scheduler_class: type[Scheduler], model: Path) -> Clockwork:
    """Two agents of one tag. The tasks came in another order than the gateway numbered them; all lose their memory."""
    clock = Clockwork(scheduler_class, model, blocks=64)
    clock.add("b3", Hints(5, "b", 3), 40, 30)
    clock.add("a2", Hints(5, "a", 2), 40, 30)
    clock.add("b4", Hints(5, "b", 4), 40, 30)
    clock.add("a1", Hints(5, "a", 1), 40, 30)
    clock.step()
    clock.add("b9", Hints(5, "b", 9), 40, 30)  # waits: it is not yet scheduled
    clock.add("a7", Hints(5, "a", 7), 40, 30)
    clock.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(clock.preempted) == 4
    return clock


def test_a_preempted_task_keeps_its_place(tiny_model_dir: Path) -> None:
    clock = preempted_all(JustitiaScheduler, tiny_model_dir)
    assert clock.waiting() == ["a1", "a2", "a7", "b3", "b4", "b9"]


def test_control_vllm_goes_by_arrival(tiny_model_dir: Path) -> None:
    assert preempted_all(AsyncScheduler, tiny_model_dir).waiting() == ["b3", "a2", "b4", "a1", "b9", "a7"]


# Under load


@pytest.mark.parametrize("in_flight", [1, 2])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(16, 40), seqs=st.integers(2, 12))
def test_under_load(tiny_model_dir: Path, in_flight: int, seed: int, blocks: int, seqs: int) -> None:
    """Random arrivals, lengths, tags and aborts in a small memory: nothing is lost, and every victim is the last."""
    dice = random.Random(seed)
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=blocks, max_num_seqs=seqs, in_flight=in_flight)
    scheduler = clock.scheduler
    preempt: Any = scheduler._preempt_request

    def checked(request: Any, *args: Any, **kwargs: Any) -> None:
        assert all(hints_of(other)[:2] <= hints_of(request)[:2] for other in scheduler.running)
        assert all(
            other.num_computed_tokens >= request.num_computed_tokens
            for other in scheduler.running
            if hints_of(other)[:2] == hints_of(request)[:2]
        )
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = checked  # type: ignore[method-assign, unused-ignore]  # to listen in
    aborted = set()
    for number in range(40):
        agent = dice.randrange(6)
        hints = Hints(10 * agent, f"a{agent}", number) if dice.random() < 0.9 else None
        clock.add(f"r{number}", hints, dice.randint(1, 300), dice.randint(1, 60))
        for _ in range(dice.randrange(8)):
            clock.step()
        if dice.random() < 0.15:
            name = dice.choice([name for name in clock.requests if not clock.requests[name].is_finished()] or ["none"])
            clock.abort(name)
            aborted.add(name)
    clock.run()
    for name, request in clock.requests.items():
        assert request.is_finished()
        assert name in aborted or request.num_output_tokens == request.max_tokens
    report = ours(clock)
    assert (report.free_blocks, report.running, report.waiting, report.held) == (blocks, 0, 0, {})
    assert report.preempted == len(clock.preempted)


def test_the_order_of_victims_is_total(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    same = [clock.add(name, Hints(1, "a", 1), 10, 5) for name in "xy"]
    assert victims_last(same[0]) < victims_last(same[1])  # the one that came last


# Tags that change


def ours_of(clock: Clockwork) -> JustitiaScheduler:
    assert isinstance(clock.scheduler, JustitiaScheduler)
    return clock.scheduler


def test_a_waiting_task_whose_tag_changes_has_another_place(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    for number, name in enumerate("abcd"):
        clock.add(name, Hints(10 * number, name, number), 10, 3)
    ours_of(clock).change_tag(3, 5)
    assert clock.waiting() == ["a", "d", "b", "c"]
    ours_of(clock).change_tag(0, 99)
    assert clock.waiting() == ["d", "b", "c", "a"]
    ours_of(clock).change_tag(1, 5)
    assert clock.waiting() == ["b", "d", "c", "a"], "among equals by agent, as ever"
    for tag in (2**70, -(2**70)):
        ours_of(clock).change_tag(2, tag)
        assert clock.requests["c"].priority == hints_of(clock.requests["c"]).tag == max(min(tag, 2**63 - 1), -(2**63))
    assert clock.run() == ["c", "b", "d", "a"]
    assert len(ours_of(clock)._by_task) == 0


@pytest.mark.parametrize("tag", [-5, 0, 3, 99])
def test_a_task_that_is_not_here_is_passed_over(tiny_model_dir: Path, tag: int) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    for number, name in enumerate("abc"):
        clock.add(name, Hints(number, name, number), 10, 3)
    clock.step()
    clock.abort("b")
    before = ours(clock), clock.waiting(), [hints_of(request) for request in clock.requests.values()]
    for task in (1, 77, 2**62):
        ours_of(clock).change_tag(task, tag)
    assert (ours(clock), clock.waiting(), [hints_of(request) for request in clock.requests.values()]) == before
    clock.run()
    ours_of(clock).change_tag(0, tag)  # has ended


def test_tasks_that_are_not_the_gateways_cannot_be_told(tiny_model_dir: Path) -> None:
    """They all have the number -1. A change for it would move every one of them."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    clock.add("one", None, 10, 3)
    clock.add("two", Hints(5, "b", 2), 10, 3)
    ours_of(clock).change_tag(-1, 99)
    assert clock.waiting() == ["one", "two"]


@pytest.mark.parametrize(("retagged", "victim"), [(None, "small"), ((1, 9), "urgent"), ((2, 0), "large")])
def test_a_running_task_becomes_the_victim_or_is_it_no_longer(
    tiny_model_dir: Path, retagged: tuple[int, int] | None, victim: str
) -> None:
    """As `full_memory`: but one of the three has another tag by then."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    clock.add("urgent", Hints(1, "a", 1), BLOCK_SIZE - 2, 40)
    clock.add("small", Hints(2, "b", 2), 10, 40)
    clock.add("large", Hints(2, "b", 3), 6 * BLOCK_SIZE - 15, 40)
    clock.step()
    if retagged is not None:
        ours_of(clock).change_tag(*retagged)
    clock.until(lambda: bool(clock.preempted))
    assert clock.preempted == [victim]


def test_a_preempted_task_whose_tag_changes_comes_back_in_another_place(tiny_model_dir: Path) -> None:
    clock = preempted_all(JustitiaScheduler, tiny_model_dir)
    ours_of(clock).change_tag(4, 1)
    ours_of(clock).change_tag(1, 6)
    assert clock.waiting() == ["b4", "a2", "a7", "b3", "b9", "a1"]
    clock.run()


def test_all_sequences_of_a_task_move(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=2)
    clock.add("x0", Hints(3, "x", 5), 10, 9)
    clock.add("x1", Hints(3, "x", 5), 10, 9)
    clock.add("x2", Hints(3, "x", 5), 10, 9)
    clock.add("y", Hints(4, "y", 6), 10, 9)
    clock.step()
    assert clock.running() == {"x0", "x1"}
    ours_of(clock).change_tag(5, 7)
    assert clock.waiting() == ["y", "x2"]
    assert [hints_of(clock.requests[name]).tag for name in ("x0", "x1", "x2")] == [7, 7, 7]
    clock.abort("x1")
    ours_of(clock).change_tag(5, 1)
    assert clock.waiting() == ["x2", "y"]
    clock.run()
    assert ours_of(clock)._by_task == {}


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_thousand_changes_while_requests_run(tiny_model_dir: Path, in_flight: int) -> None:
    """Whoever is admitted, nobody who waits then is ahead of him; and whoever is the victim, nobody who runs is behind."""
    dice = random.Random(in_flight)
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=24, max_num_seqs=6, in_flight=in_flight)
    scheduler = ours_of(clock)
    preempt: Any = scheduler._preempt_request

    def checked(request: Any, *args: Any, **kwargs: Any) -> None:
        assert all(hints_of(other)[:2] <= hints_of(request)[:2] for other in scheduler.running)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = checked  # type: ignore[method-assign, unused-ignore]  # to listen in
    number = changes = admitted_under_contention = 0
    tags: dict[int, int] = {}
    while changes < 1000:
        while len(scheduler.waiting) < 8:
            first = dice.randrange(100)
            tags.setdefault(number, first)  # it may have been changed before it came
            clock.add(f"r{number}", Hints(first, f"a{number % 7}", number), dice.randint(1, 200), dice.randint(1, 50))
            number += 1
        for _ in range(5):
            task = dice.randrange(max(0, number - 30), number + 3)
            tag = dice.randrange(100)
            scheduler.change_tag(task, tag)
            tags[task] = tag
            changes += 1
        before = set(clock.waiting())
        clock.step()
        waiting = set(clock.waiting())
        admitted = before - waiting
        places = {name: (tags[int(name[1:])], hints_of(clock.requests[name])[1:]) for name in before}
        if admitted and before & waiting:
            assert max(places[name] for name in admitted) <= min(places[name] for name in before & waiting)
            admitted_under_contention += 1
    assert admitted_under_contention > 20
    assert len(clock.preempted) > 3
    clock.run()
    assert all(request.num_output_tokens == request.max_tokens for request in clock.requests.values())


# Displacement


def displacing(model: Path, margin: float | None = 0, *, before: int = 200, **more: Any) -> Clockwork:
    """So many tokens are computed before: what may be lost is a share of them. The tag of `long` is 50."""
    clock = Clockwork(JustitiaScheduler, model, justitia={"displace_margin": margin}, **{"blocks": 64, **more})
    ours_of(clock).computed_tokens = before * 20
    return clock


def test_by_default_nobody_is_displaced(tiny_model_dir: Path) -> None:
    for clock in (
        Clockwork(JustitiaScheduler, tiny_model_dir, blocks=64, max_num_seqs=1),
        displacing(tiny_model_dir, None, max_num_seqs=1),
    ):
        clock.add("long", Hints(50, "l", 1), 40, 60)
        clock.step()
        clock.add("urgent", Hints(1, "u", 2), 40, 5)
        for _ in range(10):
            clock.step()
        assert (clock.preempted, clock.running()) == ([], {"long"})
        assert (ours(clock).displaced, ours(clock).displaced_tokens) == (0, 0)


def test_a_task_is_displaced_for_a_slot_and_keeps_its_place(tiny_model_dir: Path) -> None:
    clock = displacing(tiny_model_dir, max_num_seqs=1)
    clock.add("long", Hints(50, "l", 1), 40, 60)
    clock.step()
    clock.step()
    clock.add("between", Hints(20, "b", 3), 40, 5)
    clock.add("late", Hints(60, "z", 4), 40, 5)
    clock.add("urgent", Hints(1, "u", 2), 40, 5)
    assert clock.step() == ["urgent"], "and the displaced is not resumed in the same step"
    assert clock.preempted == ["long"]
    assert clock.waiting() == ["between", "long", "late"]
    report = ours(clock)
    assert (report.displaced, report.preempted) == (1, 1)
    assert report.displaced_tokens == report.recomputed_tokens == 41
    assert clock.run() == ["urgent", "between", "long", "late"]
    assert clock.requests["long"].num_output_tokens == 60


@pytest.mark.parametrize("order", [("long", "wide"), ("wide", "long")])
def test_tasks_are_displaced_for_memory_no_more_than_needed(tiny_model_dir: Path, order: tuple[str, str]) -> None:
    clock = displacing(tiny_model_dir, before=2000, blocks=16)
    prompts = {"long": (50, 4 * BLOCK_SIZE), "wide": (60, 8 * BLOCK_SIZE)}
    for number, name in enumerate(order):
        tag, prompt = prompts[name]
        clock.add(name, Hints(tag, name, number), prompt - 5, 40)
    clock.step()
    clock.add("urgent", Hints(1, "u", 9), 10 * BLOCK_SIZE - 5, 3)
    clock.step()
    assert clock.preempted == ["wide"]
    assert clock.running() == {"long", "urgent"}


def test_nobody_is_displaced_if_that_would_not_be_enough(tiny_model_dir: Path) -> None:
    clock = displacing(tiny_model_dir, before=2000, blocks=16)
    clock.add("first", Hints(0, "f", 1), 6 * BLOCK_SIZE - 5, 40)
    clock.add("long", Hints(50, "l", 2), 6 * BLOCK_SIZE - 5, 40)
    clock.step()
    clock.add("urgent", Hints(1, "u", 9), 12 * BLOCK_SIZE - 5, 3)
    clock.step()
    assert (clock.preempted, clock.running()) == ([], {"first", "long"})


def test_what_the_running_need_in_the_same_step_is_not_room(tiny_model_dir: Path) -> None:
    """The first is before the one that waits, and comes to a new block just then. To displace would be in vain."""
    clock = displacing(tiny_model_dir, before=2000, blocks=16)
    clock.add("first", Hints(0, "f", 1), 6 * BLOCK_SIZE, 40)
    clock.add("long", Hints(50, "l", 2), 10 * BLOCK_SIZE - 5, 40)
    clock.step()
    clock.add("urgent", Hints(1, "u", 9), 10 * BLOCK_SIZE - 5, 3)
    clock.step()
    # The first takes its block from the long one, as always when memory is full: nobody else was pushed aside for that.
    assert clock.preempted == ["long"]
    assert ours(clock).displaced == 0


@pytest.mark.parametrize(("margin", "displaced"), [(0, True), (48, True), (49, False), (1000, False)])
def test_the_margin_is_respected(tiny_model_dir: Path, margin: float, displaced: bool) -> None:
    clock = displacing(tiny_model_dir, margin, max_num_seqs=1)
    clock.add("long", Hints(50, "l", 1), 40, 60)
    clock.step()
    clock.add("urgent", Hints(1, "u", 2), 40, 5)
    clock.step()
    assert clock.preempted == (["long"] if displaced else [])


def test_equals_and_tasks_of_the_same_agent_are_not_displaced(tiny_model_dir: Path) -> None:
    clock = displacing(tiny_model_dir, max_num_seqs=1)
    clock.add("long", Hints(50, "l", 1), 40, 60)
    clock.step()
    clock.add("equal", Hints(50, "a", 0), 40, 5)
    clock.step()
    clock.abort("equal")
    clock.add("own", Hints(1, "l", 2), 40, 5)
    clock.step()
    assert clock.preempted == []


def test_an_agent_displaces_a_task_once_and_a_task_is_displaced_so_often(tiny_model_dir: Path) -> None:
    clock = displacing(tiny_model_dir, before=10**6, max_num_seqs=1)
    clock.add("long", Hints(50, "l", 0), 40, 200)
    clock.step()
    for number, agent in enumerate(["u", "u", "v", "w", "x"], start=1):
        clock.add(f"{agent}{number}", Hints(1, agent, number), 10, 2)
        clock.step()
        if agent == "u" and number == 2:
            assert clock.running() == {"long"}, "u has had its turn"
            clock.abort("u2")
        clock.until(lambda: clock.running() == {"long"})
    assert clock.preempted == ["long"] * DISPLACED_AT_MOST
    clock.run()
    assert clock.requests["long"].num_output_tokens == 200


def test_what_is_lost_stays_below_its_share(tiny_model_dir: Path) -> None:
    clock = displacing(tiny_model_dir, before=0, max_num_seqs=1)
    scheduler = ours_of(clock)
    dice = random.Random(1)
    for number in range(120):
        long = number % 2 == 0
        hints = Hints(90 if long else dice.randrange(50), f"a{number}", number)
        clock.add(f"r{number}", hints, dice.randint(1, 100), 40 if long else 3)
        for _ in range(dice.randrange(20)):
            clock.step()
            assert scheduler.displaced_tokens <= DISPLACED_SHARE * scheduler.computed_tokens
    clock.run()
    assert scheduler.displaced > 3
    assert scheduler.displaced_tokens <= scheduler.recomputed_tokens
    assert scheduler.displaced == scheduler.preempted == len(clock.preempted)


def ping_pong(model: Path, exchanges: int) -> Clockwork:
    """Two agents in one slot, whose tags take turns in being the smaller, as those of two that outgrow each other do."""
    clock = displacing(model, before=10**6, max_num_seqs=1)
    for number, agent in enumerate("ab"):
        clock.add(agent, Hints(50, agent, number), 40, 20)
    for exchange in range(exchanges):
        clock.step()
        runs = clock.scheduler.running
        if not runs:
            break
        ours_of(clock).change_tag(hints_of(runs[0]).task, 100 + exchange)
    return clock


def test_two_agents_do_not_displace_each_other_for_ever(tiny_model_dir: Path) -> None:
    clock = ping_pong(tiny_model_dir, 200)
    assert sorted(clock.preempted) == ["a", "b"]
    clock.run()
    assert [clock.requests[name].num_output_tokens for name in "ab"] == [20, 20]


def test_control_without_the_guards_they_do(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displacement, "spared", lambda task, urgent: task.hints.agent == urgent.agent)
    clock = ping_pong(tiny_model_dir, 40)
    assert len(clock.preempted) >= 15
    assert ours(clock).displaced == len(clock.preempted)


@pytest.mark.parametrize("in_flight", [1, 2])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(16, 40), seqs=st.integers(1, 8), margin=st.integers(0, 20))
def test_displacing_loses_nothing(
    tiny_model_dir: Path, in_flight: int, seed: int, blocks: int, seqs: int, margin: int
) -> None:
    dice = random.Random(seed)
    clock = displacing(tiny_model_dir, margin, before=10**5, blocks=blocks, max_num_seqs=seqs, in_flight=in_flight)
    scheduler = ours_of(clock)
    for number in range(40):
        agent = dice.randrange(6)
        hints = Hints(dice.randrange(60), f"a{agent}", number) if dice.random() < 0.9 else None
        clock.add(f"r{number}", hints, dice.randint(1, 300), dice.randint(1, 40))
        for _ in range(dice.randrange(6)):
            before, displaced = set(clock.running()), scheduler.displaced
            victims = len(clock.preempted)
            clock.step()
            if scheduler.displaced > displaced:
                gone = clock.preempted[victims : victims + scheduler.displaced - displaced]
                assert set(gone) <= before
                assert not set(gone) & clock.running(), "not resumed in the same step"
                assert all(
                    clock.requests[name] in scheduler.waiting or clock.requests[name].is_finished() for name in gone
                )
    clock.run()
    for request in clock.requests.values():
        assert request.is_finished()
        assert request.num_output_tokens == request.max_tokens
        assert len(vars(request).get("justitia_displaced_by", ())) <= DISPLACED_AT_MOST
    report = ours(clock)
    assert (report.free_blocks, report.running, report.waiting) == (blocks, 0, 0)
    assert report.preempted == len(clock.preempted) >= report.displaced
    assert report.recomputed_tokens >= report.displaced_tokens
    assert scheduler._gone == {} and scheduler._by_task == {}


# Reports


def test_a_report_is_the_whole_state(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, max_num_seqs=2)
    before = ours(clock)
    assert (before.iteration, before.free_blocks, before.running, before.waiting) == (0, 8, 0, 0)
    clock.add("one", Hints(1, "a", 11), 40, 5)
    clock.add("unnamed", None, 5, 5)
    clock.add("waits", Hints(3, "b", 13), 5, 5)
    clock.step()
    clock.step()
    report = ours(clock)
    assert (report.iteration, report.running, report.waiting, report.preempted) == (2, 2, 1, 0)
    assert report.free_blocks == 8 - 2 - 1
    # The second step computed the first token that was put out, and put out another.
    assert report.held == {11: Holding(kv_tokens=41, output_tokens=2)}
    assert report.engine_id == before.engine_id
    clock.run()
    after = ours(clock)
    assert (after.free_blocks, after.running, after.waiting, after.held) == (8, 0, 0, {})


def test_a_task_of_several_requests_is_summed(tiny_model_dir: Path) -> None:
    """A body with `n` = 2 reaches the scheduler as two requests with the same hints."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    clock.add("first", Hints(1, "a", 5), 10, 9)
    clock.add("second", Hints(1, "a", 5), 20, 9)
    clock.step()
    assert ours(clock).held == {5: Holding(30, 2)}


def test_empty_steps_are_no_iterations(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    clock.add("one", None, 4, 3)
    clock.run()
    done = ours(clock).iteration
    assert done == 3
    clock.step()
    assert ours(clock).iteration == done


def test_cached_prefixes_are_free(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    tokens = list(range(3 * BLOCK_SIZE))
    clock.add("first", Hints(1, "a", 1), 0, 2, tokens)
    clock.run()
    assert ours(clock).free_blocks == 8
    clock.add("again", Hints(1, "a", 2), 0, 2, tokens)
    clock.step()
    # Two full blocks came from the cache: the step had one block's tokens to compute.
    assert clock.requests["again"].num_computed_tokens == 3 * BLOCK_SIZE
    assert ours(clock).free_blocks == 5


def test_a_tag_that_comes_before_its_task_is_not_lost(tiny_model_dir: Path) -> None:
    """The link is faster than HTTP, and a body with `n` = 2 is two requests."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    assert isinstance(clock.scheduler, JustitiaScheduler)
    clock.scheduler.change_tag(5, 10)
    both = [clock.add(name, Hints(99, "a", 5), 10, 3) for name in "xy"]
    assert [hints_of(request).tag for request in both] == [10, 10]
    for task in range(100, 100 + 2 * EARLY_TAGS):
        clock.scheduler.change_tag(task, 1)
    assert len(clock.scheduler._early_tags) == EARLY_TAGS


# The link


@pytest.fixture
def address() -> Iterator[str]:
    path = Path(f"/tmp/justitia-test-{uuid.uuid4().hex[:8]}.sock")
    yield f"ipc://{path}"
    for left in (path, Path(f"{path}.in")):
        left.unlink(missing_ok=True)


@pytest.fixture
def subscriber(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        yield socket


def test_a_gateway_is_told_of_steps_and_of_aborts(
    tiny_model_dir: Path, address: str, subscriber: zmq.Socket[bytes]
) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, max_num_seqs=2, justitia={"link": address})
    try:
        hello = parse(subscriber.recv())
        assert hello == Hello(PROTOCOL, ours(clock).engine_id, vllm.__version__, 8, BLOCK_SIZE, 2, 2048, True)
        assert isinstance(hello, Hello)
        assert hello.capacity_tokens == 8 * BLOCK_SIZE
        assert parse(subscriber.recv()) == ours(clock)
        clock.add("one", Hints(1, "a", 7), 40, 50)
        clock.step()
        assert parse(subscriber.recv()) == ours(clock)
        assert ours(clock).held
        clock.abort("one")
        # One iteration: the prompt was computed, and the first token sampled, which counts as in the cost model.
        assert parse(subscriber.recv()) == Ended(ours(clock).engine_id, {7: 41.0})
        assert parse(subscriber.recv()) == ours(clock)
        assert (ours(clock).running, ours(clock).free_blocks) == (0, 8)
    finally:
        clock.scheduler.shutdown()


def test_what_a_step_has_no_time_for_the_next_one_hears(
    tiny_model_dir: Path, address: str, subscriber: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the next look, many steps later; and until then no report says that it was heard."""
    justitia = {"link": address, "link_interval_s": 3600.0}
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, max_num_seqs=1, justitia=justitia)
    scheduler = ours_of(clock)
    link = scheduler.reporting.link
    assert link is not None
    try:
        with zmq.Context() as context, context.socket(zmq.PUSH) as gateway:
            gateway.connect(inbox(address))
            gateway.send(encode(Greeting(PROTOCOL, "g", 1)))
            for number, task in ((1, 0), (2, 1), (3, 2)):
                gateway.send(encode(Change(gateway="g", number=number, tags={task: 90 + task})))
            requests = [clock.add(f"t{task}", Hints(50, f"a{task}", task), 10, 20) for task in range(3)]
            while len(link._requests) < 4:
                with link._lock:
                    link._listen()
        monkeypatch.setattr(engine.link, "READ_S", -1.0)
        seen = []
        for _ in range(5):
            clock.step()
            seen.append(([hints_of(request).tag for request in requests], ours(clock).heard))
        assert seen == [
            ([50, 50, 50], {"g": 0}),
            ([90, 50, 50], {"g": 1}),
            ([90, 91, 50], {"g": 2}),
            ([90, 91, 92], {"g": 3}),
            ([90, 91, 92], {"g": 3}),
        ]
    finally:
        scheduler.shutdown()


def test_an_address_that_cannot_be_bound_costs_the_link_only(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": "ipc:///nowhere/at/all.sock"})
    clock.add("one", None, 4, 3)
    assert clock.run() == ["one"]
    clock.scheduler.shutdown()


def test_only_the_first_data_parallel_rank_binds(tiny_model_dir: Path, address: str) -> None:
    first = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": address})
    second = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": address}, data_parallel_index=1)
    try:
        assert isinstance(first.scheduler, JustitiaScheduler)
        assert isinstance(second.scheduler, JustitiaScheduler)
        assert first.scheduler.reporting.link is not None
        assert second.scheduler.reporting.link is None
    finally:
        first.scheduler.shutdown()


@pytest.mark.parametrize("config", [None, {}, {"justitia": None}, {"justitia": {}}, {"other": {"link": "x"}}, "text"])
def test_no_address_no_link(config: Any) -> None:
    assert settings_of(config).link is None
