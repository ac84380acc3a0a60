"""What is noted of a run: virtual time by iteration, how late each was, and what is held over time."""

from __future__ import annotations

import math

import pytest

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.replay.record import MEMORY_POINTS, Journey, Record, _VirtualTime
from predictor.types import FinishedTask


def journey(name: str = "a", arrival_s: float = 0.0, tenant: str = "") -> Journey:
    trace = AgentTrace(name, arrival_s, (TaskTrace("t", 10, 2),), agent_class="kind", tenant=tenant)
    return Journey(trace, 0, {}, finished={"t": FinishedTask(40, 10, 4, 2)})


def record() -> Record:
    """Five iterations: the clock at 0.1, 0.2, 0.3, 1.0 and 1.1 s, and V at 10, 10, 40, 50 and 50."""
    made = Record()
    for now_s, virtual in ((0.1, 10.0), (0.2, 10.0), (0.3, 40.0), (1.0, 50.0), (1.1, 50.0)):
        made.stepped(now_s, work=20.0, usage=0.5, capacity=None)
        made.virtual_time("", virtual)
    return made


@pytest.mark.parametrize(
    ("value", "iteration"), [(-1.0, 0), (0.0, 0), (0.1, 2), (10.0, 2), (10.1, 5), (30.0, 5), (30.1, None)]
)
def test_when_virtual_time_reached_a_value(value: float, iteration: int | None) -> None:
    virtual = _VirtualTime()
    for at, noted in ((1, 0.0), (2, 10.0), (3, 10.0), (4, 10.0), (5, 30.0), (6, 30.0)):
        virtual.note(at, noted)
    assert virtual.reached(value) == iteration


def test_rounding_makes_it_no_iteration_more() -> None:
    virtual = _VirtualTime()
    virtual.note(1, math.nextafter(1e9, 0))
    virtual.note(2, 2e9)
    assert virtual.reached(1e9) == 1


@pytest.mark.parametrize(
    ("arrival_s", "tag", "reference_s"),
    [
        (0.0, 10.0, 0.1),
        (0.0, 35.0, 0.3),
        (0.0, 50.0, 1.0),
        (0.4, 35.0, 0.4),  # nobody has finished before coming
        (0.0, 60.0, 1.1),  # never reached: early, by nobody knows how much
    ],
)
def test_lateness_against_the_reference(arrival_s: float, tag: float, reference_s: float) -> None:
    one = journey(arrival_s=arrival_s)
    one.backlog_tag, one.finish_s, one.predicted, one.preemptions = tag, 1.1, 7.0, 3
    agent = record().agent(one)
    assert agent.reference_finish_s == reference_s
    assert agent.lateness_s == 1.1 - reference_s
    assert agent.jct_s == 1.1 - arrival_s
    assert (agent.agent_class, agent.predicted_cost, agent.preemptions, agent.cached_tokens) == ("kind", 7.0, 3, 4)
    assert agent.cost == 6 * 2 + 3


@pytest.mark.parametrize(("tag", "late"), [(10.0, 3), (35.0, 1), (45.0, 0), (60.0, 0)])
def test_lateness_against_the_largest_tag_in_iterations(tag: float, late: int) -> None:
    one = journey()
    one.largest_tag, one.finish_iteration = tag, 4
    assert record().tag_lateness(one) == late


def test_each_tenant_has_its_own_virtual_time() -> None:
    made = record()
    made.virtual_time("slow", 1.0)
    one = journey(tenant="slow")
    one.largest_tag = one.backlog_tag = 30.0
    one.finish_s, one.finish_iteration = 1.1, 5
    assert made.agent(one).lateness_s == 0
    one.largest_tag = one.backlog_tag = 1.0
    assert made.agent(one).reference_finish_s == 1.1
    assert made.tag_lateness(one) == 0


def test_the_summary_by_hand() -> None:
    made = Record()
    for now_s, capacity in ((0.5, 100.0), (1.0, None), (1.5, 100.0), (2.0, None)):
        made.stepped(now_s, work=60.0 if capacity else 10.0, usage=0.6 if capacity else 0.1, capacity=capacity)
        made.virtual_time("", now_s * 100)
    journeys = [journey("a"), journey("b", arrival_s=0.5)]
    for one, finish_s, tag in zip(journeys, (1.0, 2.0), (100.0, 150.0), strict=True):
        one.finish_s, one.finish_iteration = finish_s, int(finish_s * 2)
        one.backlog_tag = one.largest_tag = tag
    made.decision_s += [1e-6, 3e-6]
    agents = [made.agent(one) for one in journeys]
    summary = made.summary(journeys, agents, preemptions=4, recomputed_tokens=9)
    assert (summary.agents, summary.tasks, summary.iterations) == (2, 2, 4)
    assert (summary.preemptions, summary.recomputed_tokens) == (4, 9)
    assert (summary.mean_jct_s, summary.max_jct_s, summary.makespan_s) == (1.25, 1.5, 2.0)
    assert (summary.served_tokens, summary.mean_kv_usage) == (60, 0.6)  # while tasks waited
    assert summary.prefix_hit_rate == 8 / 20
    assert (summary.no_later_than_reference, summary.worst_lateness_s) == (0.5, 0.5)
    assert summary.worst_tag_lateness_iterations == 1
    assert summary.bound_terms == {"L": 0, "R": 0, "D": 40, "E": 0, "M": 100}
    assert (summary.bound_iterations, summary.bound_s) == (0.4, 0.2)
    assert summary.jain == pytest.approx((1 + 2 / 3) ** 2 / (2 * (1 + 4 / 9)))
    assert summary.decision_us_p50 == pytest.approx(2.0)


def test_memory_over_time_is_of_those_that_held_most_and_of_all_others() -> None:
    made = Record()
    assert made.memory_over_time() is None
    for now_s, held in ((0.5, {"a": 5, "b": 1}), (1.0, {"b": 1, "c": 9, "d": 2}), (1.5, {})):
        made.stepped(now_s, 1.0, 0.5, None)
        made.memory(held)
    memory = made.memory_over_time(most=2)
    assert memory is not None
    assert memory.times_s == [0.5, 1.0, 1.5]
    assert memory.tokens == {"c": [0, 9, 0], "a": [5, 0, 0], "others": [1, 3, 0]}


def test_memory_over_time_has_no_more_points_than_are_looked_at() -> None:
    made = Record()
    for _ in range(3 * MEMORY_POINTS):
        made.memory({"a": 1})
    memory = made.memory_over_time()
    assert memory is not None
    assert len(memory.times_s) == len(memory.tokens["a"]) == MEMORY_POINTS
