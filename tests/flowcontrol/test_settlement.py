"""Every way in which a task can end: what it costs, and that nothing of it is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from gateway.flowcontrol import Options
from gateway.flowcontrol.fairqueue import TaskId
from gateway.flowcontrol.records import UsageRow
from gateway.protocol.errors import Outcome
from gateway.protocol.usage import Usage
from predictor.cost import task_cost
from predictor.types import TaskContent
from tests.flowcontrol.scene import CONTENT, COST, ROW, USAGE, Scene


@dataclass(frozen=True)
class Way:
    """How a task is served and ends, and what that costs in KV token·iterations."""

    name: str
    cost: float  # charged at its end
    outcome: Outcome = Outcome.COMPLETED
    usage: Usage | None = USAGE
    events: int = 0  # relayed
    made: bool = False
    linked: bool = True
    released: bool = True
    counted: float | None = None  # by the engine, before the settlement
    later: float | None = None  # the same, after it
    report: tuple[int, int] | None = None  # the engine's last: KV tokens, and output tokens of them
    iterations: int = 0  # since the release
    sequences: int = 1
    prompts: int = 1
    decodes: bool = True

    @property
    def final_cost(self) -> float:
        """What it is charged in the end. A task that was not completed is not corrected."""
        is_corrected = self.later is not None and self.outcome is Outcome.COMPLETED and self.usage is not None
        return self.later if is_corrected and self.later is not None else self.cost


CANCELLED, FAILED, INVALID = Outcome.CANCELLED, Outcome.FAILED, Outcome.INVALID
STOCK, NOTHING = {"linked": False}, {"usage": None}
WAYS = [
    # Completed: what the engine counted, else the formula.
    Way("counted before the answer's end", 77, counted=77),
    Way("counted after the answer's end", COST, later=77),
    Way("counted as nothing", 0, counted=0),
    Way("never counted", COST),
    Way("of a stock engine", COST, iterations=3, **STOCK),
    Way("with cached tokens", task_cost(10, 4, 6), usage=Usage(10, 4, 6)),
    Way("wholly cached", task_cost(10, 4, 10), usage=Usage(10, 4, 10)),
    Way("n = 3", 3 * COST, usage=Usage(10, 12, 0), sequences=3),
    Way("n = 3, cached", 3 * task_cost(10, 4, 6), usage=Usage(10, 12, 6), sequences=3),
    Way("two prompts", 2 * COST, usage=Usage(20, 8, 0), sequences=2, prompts=2),
    Way("two prompts, n = 2, cached", 4 * task_cost(10, 4, 6), usage=Usage(20, 16, 12), sequences=4, prompts=2),
    Way("embedding", task_cost(10, 1), usage=Usage(10, 0, 0), decodes=False),
    Way("three embeddings", 3 * task_cost(10, 1), usage=Usage(30, 0, 0), sequences=3, prompts=3, decodes=False),
    # A whole answer, which does not report its usage, or not in the part that was passed on.
    Way("no usage, counted before", 77, counted=77, **NOTHING),
    Way("no usage, counted after", COST, later=77, **NOTHING),
    Way("no usage, never counted", COST, **NOTHING),
    Way("no usage, stock", COST, iterations=1, **NOTHING, **STOCK),
    Way("made, client gone, counted", 77, CANCELLED, made=True, counted=77, **NOTHING),
    Way("made, client gone, not counted", COST, CANCELLED, made=True, **NOTHING),
    Way("made, client gone, usage seen", task_cost(10, 2), CANCELLED, Usage(10, 2, 0), made=True),
    # Broken off: the count, the usage, the last report, the events, and at last the iterations.
    Way("broken off, counted", 77, CANCELLED, Usage(10, 2, 0), report=(12, 2), events=2, counted=77),
    Way("broken off, counted too late", task_cost(10, 2), CANCELLED, Usage(10, 2, 0), later=77),
    Way("broken off, usage so far", task_cost(10, 2), FAILED, Usage(10, 2, 0), report=(13, 3)),
    Way("broken off, cached", task_cost(10, 2, 6), FAILED, Usage(10, 2, 6)),
    Way("broken off, embedding", task_cost(10, 1), FAILED, Usage(10, 0, 0), decodes=False),
    Way("broken off, reported", task_cost(10, 3), CANCELLED, report=(13, 3), events=9, **NOTHING),
    Way("broken off, n = 3, reported", 3 * task_cost(10, 3), CANCELLED, report=(39, 9), sequences=3, **NOTHING),
    Way("broken off, prompt being read", 0, CANCELLED, report=(7, 0), events=0, **NOTHING),
    Way("broken off, events", task_cost(10, 5), CANCELLED, events=5, **NOTHING),
    Way("broken off, n = 2, events", 2 * task_cost(10, 3), CANCELLED, events=6, sequences=2, **NOTHING),
    Way("broken off, two prompts, events", 2 * task_cost(10, 3), FAILED, events=6, sequences=2, prompts=2, **NOTHING),
    Way("broken off, usage of the prompt, events", task_cost(20, 3), CANCELLED, Usage(20, 0, 0), events=3),
    Way("broken off, nothing known, link", 0, CANCELLED, iterations=9, **NOTHING),
    Way("broken off, nothing known, stock", task_cost(10, 3), CANCELLED, iterations=3, **NOTHING, **STOCK),
    Way("broken off, usage of the prompt, stock", task_cost(4, 3), FAILED, Usage(4, 0, 0), iterations=3, **STOCK),
    Way("broken off, stock, after long", COST, CANCELLED, iterations=999, **NOTHING, **STOCK),
    Way("broken off, stock, events", task_cost(10, 1), CANCELLED, events=1, iterations=99, **NOTHING, **STOCK),
    # Refused by the engine, and not released at all.
    Way("refused, link", 0, INVALID, **NOTHING),
    Way("refused, stock", 0, INVALID, iterations=99, **NOTHING, **STOCK),
    Way("never released", 0, CANCELLED, released=False, **NOTHING),
    Way("never released, stock", 0, CANCELLED, released=False, iterations=99, **NOTHING, **STOCK),
    Way("refused by the gateway", 0, Outcome.REJECTED, released=False, **NOTHING, **STOCK),
]


def end(scene: Scene, way: Way, **more: Any) -> TaskId:
    """A task of agent a that ends in this way."""
    content = msgspec.structs.replace(CONTENT, sequences=way.sequences)
    scene.report(iterations=5)  # the clock is no longer 0 when the task is released
    task = scene.arrive(content=content, prompts=way.prompts, decodes=way.decodes, body_bytes=9, **more)
    if way.released:
        assert scene.release() == [task]
    scene.pass_s(1)
    if way.report is not None or way.iterations:
        scene.report({task: way.report} if way.report is not None else {}, iterations=max(1, way.iterations))
    if way.counted is not None:
        scene.counts({task: way.counted})
    scene.check()
    settlement = scene.settle(task, way.outcome, way.usage, events=way.events, made=way.made)
    assert settlement.cost == way.cost
    is_completed = way.outcome is Outcome.COMPLETED and way.usage is not None
    assert (settlement.finished is not None) == is_completed
    return task


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("final", [False, True], ids=["goes on", "final"])
def test_each_end_costs_what_it_should_and_leaves_nothing(way: Way, final: bool) -> None:
    scene = Scene(linked=way.linked)
    task = end(scene, way, final=final)
    scene.check_over()
    if way.later is not None:
        scene.counts({task: way.later})
        scene.check_over()
    (agent,) = scene.seen.ended or [None]
    awaits = scene.settlements[task].finished is not None and way.linked and way.counted is way.later is None
    assert (agent is not None) == (final and not awaits)
    if not final:
        known = scene.queue.agents[scene.flow.agents.by_id.popitem()[0]]
        assert known.arrived == known.released == known.attained == way.final_cost
    elif awaits:
        scene.sweep()
        assert len(scene.seen.ended) == 1 and scene.queue.agents == {}
        scene.check_over()
    if final and scene.learned:
        assert scene.learned[0].cost == way.final_cost
    assert sum(step.usage.kv_cost for step in scene.seen.steps if step.usage is not None) == way.final_cost


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_only_an_agent_that_was_not_cut_short_is_learned_from(way: Way) -> None:
    scene = Scene(linked=way.linked)
    held = 5.0 if way.linked else None
    scene.serve(held=held)
    end(scene, way)
    scene.serve(held=held, final=True)
    scene.sweep()
    assert len(scene.seen.ended) == 1
    is_completed = way.outcome is Outcome.COMPLETED and way.usage is not None
    assert [len(agent.tasks) for agent in scene.learned] == [3] * is_completed
    scene.check_over()


IMPOSSIBLE = [
    Usage(-1, 4, 0),
    Usage(10, -4, 0),
    Usage(10, 4, -1),
    Usage(10, 4, 11),
    Usage(-10, -4, -20),
    Usage(math.inf, 4, 0),  # type: ignore[arg-type]
    Usage(10, math.inf, 0),  # type: ignore[arg-type]
    Usage(math.nan, 4, 0),  # type: ignore[arg-type]
    Usage(10, 4, math.nan),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, FAILED])
@pytest.mark.parametrize("counted", [None, 77.0])
@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("usage", IMPOSSIBLE)
def test_a_usage_that_cannot_be_costs_nothing_and_leaks_nothing(
    usage: Usage, decodes: bool, counted: float | None, outcome: Outcome
) -> None:
    scene = Scene()
    task = scene.released(body_bytes=9, decodes=decodes)
    scene.report({task: (13, 3)})
    if counted is not None:
        scene.counts({task: counted})
    settlement = scene.settle(task, outcome, usage)
    assert (settlement.cost, settlement.finished) == (0, None)
    assert [step.usage for step in scene.seen.steps] == [UsageRow("t", 999_997_200, requests=1)]
    scene.check_over()
    scene.serve(held=5.0, final=True)
    assert scene.learned == [] and scene.queue.agents == {}


@pytest.mark.parametrize("held", [(10**300, 10**299), (3, -3)])
def test_a_report_that_cannot_be_costs_nothing_and_leaks_nothing(held: tuple[int, int]) -> None:
    scene = Scene()
    task = scene.released()
    scene.report({task: held}, held_blocks=1)
    assert scene.settle(task, CANCELLED, None).cost == 0
    scene.check_over()


@pytest.mark.parametrize("counted", [-1.0, math.inf, math.nan])
def test_a_count_that_cannot_be_is_passed_over(counted: float) -> None:
    scene = Scene()
    before, after = scene.released(), scene.released()
    scene.counts({before: counted})
    assert scene.settle(before).cost == scene.settle(after).cost == COST
    scene.counts({after: counted})
    assert scene.charged == [] and len(scene.flow.agents.awaited) == 2
    scene.check_over()


# What the driver decides


def test_what_was_counted_is_not_asked_where_the_formula_is_charged() -> None:
    scene = Scene(options=Options(charge_held=False))
    before, after = scene.released(), scene.released()
    scene.counts({before: 77.0})
    assert scene.settle(before).cost == scene.settle(after).cost == COST
    assert scene.charged == [COST, COST] and not scene.flow.agents.awaited


def test_a_driver_may_charge_by_another_formula() -> None:
    scene = Scene(linked=False, options=Options(cost=lambda prompt, decode, cached: prompt + decode - cached))
    first, second = scene.released(), scene.released()
    assert scene.flow.tasks[first].estimate.cost == 14
    assert scene.settle(first, usage=Usage(10, 4, 6)).cost == 8
    assert scene.settle(second, CANCELLED, None, events=3).cost == 13


def test_a_task_without_a_number_of_its_own_is_not_awaited() -> None:
    """The engine reports it under another one."""
    scene = Scene()
    task = scene.released(counted=False, final=True)
    scene.settle(task)
    assert scene.charged == [COST] and [agent.cost for agent in scene.learned] == [COST]
    scene.check_over()


def test_nothing_is_awaited_of_an_engine_that_has_stopped_reporting() -> None:
    scene = Scene()
    task = scene.released(final=True)
    scene.pass_s(9)
    scene.flow.engine_checked(scene.now, True)
    scene.settle(task)
    assert scene.charged == [COST] and len(scene.learned) == 1


# What is kept of it


def test_a_completed_task_is_kept_with_its_place_in_its_agents_life() -> None:
    scene = Scene()
    scene.pass_s(10)
    first = scene.arrive(arrived_s=9.5)
    scene.pass_s(2)
    second = scene.arrive(content=msgspec.structs.replace(CONTENT, max_tokens=7), arrived_s=11.5)
    assert scene.release() == [first, second]
    scene.pass_s(3)
    scene.settle(second, prompt="asked", system="told")
    scene.settle(first)
    one, other = (step.task for step in scene.seen.steps)
    assert one is not None and other is not None
    assert (one.arrived_s, one.ended_s, one.max_tokens, one.prompt, one.system) == (1.5, 5, 7, "asked", "told")
    assert (other.arrived_s, other.ended_s, other.max_tokens, other.prompt) == (0, 5, None, None)
    assert (one.prompt_bytes, one.row, one.prompts, one.sequences) == (40, ROW, 1, 1)
    assert [step.place for step in scene.seen.steps] == [0, 1]
    assert [step.first for step in scene.seen.steps] == [True, False]


def test_the_tenants_use_is_what_its_usage_reports() -> None:
    scene = Scene()
    scene.settle(scene.released(), usage=Usage(10, 4, 6))
    scene.settle(scene.released(), FAILED, Usage(10, 2, 0))
    scene.settle(scene.released(), CANCELLED, None, events=5)
    scene.settle(scene.released(), CANCELLED, None, made=True)
    scene.settle(scene.released(), Outcome.COMPLETED, None)
    hour = 999_997_200
    assert [step.usage for step in scene.seen.steps] == [
        UsageRow("t", hour, 1, 10, 6, 4, task_cost(10, 4, 6)),
        UsageRow("t", hour, 1, 10, 0, 2, task_cost(10, 2)),
        UsageRow("t", hour, 1, 0, 0, 0, task_cost(10, 5)),
        UsageRow("t", hour, 1, 10, 0, 0, COST),
        UsageRow("t", hour, 1, 0, 0, 0, COST),
    ]


def test_what_is_counted_later_is_billed_in_its_own_hour() -> None:
    scene = Scene()
    task = scene.released()
    scene.settle(task)
    scene.pass_s(3600)
    scene.counts({task: 77.0})
    first, later = (step.usage for step in scene.seen.steps)
    assert first is not None and later is not None
    assert later == UsageRow("t", first.hour + 3600, kv_cost=77 - COST)
    assert scene.seen.steps[1].place == 0 and scene.seen.steps[1].task is not None
    assert scene.seen.steps[1].task.held == 77
    scene.counts({task: 99.0})
    assert scene.charged == [77.0], "once"
    scene.check_over()


# The ends that others decide


Break = Callable[[Scene, TaskId], None]


def expires(scene: Scene, task: TaskId) -> None:
    scene.pass_s(600)
    assert [rejected.task_id for rejected in scene.flow.expire(scene.now)] == [task]
    scene.settle(task, Outcome.EXPIRED, None)


def is_deleted(scene: Scene, task: TaskId) -> None:
    tasks, effects = scene.flow.end_agent(scene.flow.tasks[task].agent)
    scene.take(effects)
    assert tasks == [task] and scene.seen.ended == []
    scene.settle(task, CANCELLED, None)
    assert len(scene.seen.ended) == 1


def is_drained(scene: Scene, task: TaskId) -> None:
    scene.flow.begin_drain(scene.now, 10)
    assert [rejected.task_id for rejected in scene.flow.end_drain()] == [task]
    scene.settle(task, Outcome.REJECTED, None)


def is_lost_once(scene: Scene, task: TaskId) -> None:
    assert scene.lose(task)
    scene.check()
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [task]
    assert scene.settle(task).cost == COST


def is_lost_twice(scene: Scene, task: TaskId) -> None:
    assert scene.lose(task)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [task]
    assert not scene.lose(task)
    scene.check()
    scene.settle(task, FAILED, None)


def leaves_after_a_loss(scene: Scene, task: TaskId) -> None:
    """The engine had done something, by its last report."""
    scene.report({task: (13, 3)})
    assert scene.lose(task)
    assert scene.settle(task, CANCELLED, None).cost == task_cost(10, 3)


@pytest.mark.parametrize(
    ("breaks", "in_flight", "cost"),
    [
        (expires, False, 0),
        (is_deleted, False, 0),
        (is_deleted, True, 0),
        (is_drained, False, 0),
        (is_drained, True, 0),
        (is_lost_once, True, COST),
        (is_lost_twice, True, 0),
        (leaves_after_a_loss, True, task_cost(10, 3)),
    ],
)
@pytest.mark.parametrize("final", [False, True])
def test_ends_that_others_decide_leave_nothing(breaks: Break, in_flight: bool, cost: float, final: bool) -> None:
    scene = Scene(options=Options(max_queue_s=600))
    task = scene.arrive(body_bytes=9, final=final)
    if in_flight:
        assert scene.release() == [task]
    breaks(scene, task)
    scene.check_over()
    assert scene.settlements[task].cost == cost
    scene.sweep()
    assert ((final or breaks is is_deleted) and not scene.there()) or scene.there() == {"t/a"}
    with pytest.raises(KeyError):
        scene.settle(task)
    scene.check_over()


def test_a_task_that_was_lost_and_served_again_is_not_charged_by_its_first_count() -> None:
    scene = Scene()
    task = scene.released()
    assert scene.lose(task)
    scene.counts({task: 3.0})
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [task]
    scene.settle(task)
    scene.counts({task: 77.0})
    assert scene.charged == [77.0]
    scene.check_over()


def test_a_prompt_of_which_several_answers_are_made_counts_once() -> None:
    """Of a request with n = 4 that was broken off: its usage counts the one prompt, the estimate that of each sequence."""
    scene = Scene()
    task = scene.released(content=TaskContent(40, sequences=4))
    settlement = scene.settle(task, Outcome.CANCELLED, Usage(1000, 0, 0), events=40)
    assert settlement.cost == 4 * task_cost(1000, 10)
    scene.check_over()


def test_a_made_answer_without_usage_uses_each_prompt_once() -> None:
    scene = Scene()
    task = scene.released(content=TaskContent(40, sequences=6), prompts=3)
    scene.settle(task, Outcome.CANCELLED, None, made=True)
    (usage,) = [step.usage for step in scene.seen.steps if step.usage is not None]
    assert usage.prompt_tokens == 3 * 10, "40 bytes each, at 4 bytes a token"
