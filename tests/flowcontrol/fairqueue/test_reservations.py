"""Memory that is kept for agents that wait for their tools."""

from __future__ import annotations

import math

import pytest

from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    QueueError,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)


def at(now: float) -> Iterations:
    return Iterations(now)


def task(number: int, agent: str, cost: float, *, memory: float) -> Task:
    return Task(TaskId(number), AgentId(agent), KvTokenIterations(cost), memory, memory)


def released(queue: FairQueue, now: float) -> list[int]:
    return [int(release.task.id) for release in queue.release(at(now))]


def reserving(tokens: float = 80, iterations: float = 50) -> FairQueue:
    """Of 100 tokens, 80 are reserved for agent `a`, which is small and waits for its tool. `b` is larger, and comes later."""
    queue = FairQueue(POLICIES["justitia"](), ReleaseLimits(engine_waiting=None))
    queue.set_capacity(at(0), 100)
    queue.enqueue(at(0), task(1, "a", 10, memory=10), KvTokenIterations(400))
    queue.enqueue(at(0), task(2, "x", 1000, memory=15), KvTokenIterations(1000))
    assert released(queue, 0) == [1, 2]
    queue.complete(at(1), TaskId(1), Spent(KvTokenIterations(10)), KvTokenIterations(400))
    queue.reserve(at(1), AgentId("a"), tokens, iterations)
    return queue


def test_a_later_agent_does_not_get_what_is_reserved_for_an_earlier_one() -> None:
    queue = reserving()
    queue.enqueue(at(2), task(3, "b", 500, memory=30), KvTokenIterations(500))
    assert released(queue, 2) == []
    assert released(queue, 52) == [3], "its time is over"


def test_an_earlier_agent_gets_it_and_so_does_the_agent_itself() -> None:
    queue = reserving()
    queue.enqueue(at(2), task(3, "earlier", 1, memory=30), KvTokenIterations(1))
    assert released(queue, 2) == [3]
    queue.enqueue(at(3), task(4, "a", 10, memory=40), KvTokenIterations(400))
    assert released(queue, 3) == [4]
    queue.complete(at(4), TaskId(4), Spent(KvTokenIterations(10)), KvTokenIterations(400))
    queue.enqueue(at(4), task(5, "b", 500, memory=30), KvTokenIterations(500))
    assert released(queue, 4) == [5], "it was used up"


def test_one_tenant_cannot_keep_another_out() -> None:
    queue = reserving()
    queue.enqueue(at(2), task(3, "b", 500, memory=30), KvTokenIterations(500), tenant=TenantId("other"))
    assert released(queue, 2) == [3]


def test_an_engine_with_nothing_to_do_is_never_kept_waiting() -> None:
    queue = reserving(tokens=100)
    queue.complete(at(2), TaskId(2), Spent(KvTokenIterations(10)), KvTokenIterations(1000))
    queue.enqueue(at(2), task(3, "b", 500, memory=30), KvTokenIterations(500))
    assert released(queue, 2) == [3]


def test_what_was_reserved_for_an_agent_that_is_evicted_is_free() -> None:
    queue = reserving()
    queue.evict(at(2), AgentId("a"))
    queue.enqueue(at(2), task(3, "b", 500, memory=30), KvTokenIterations(500))
    assert released(queue, 2) == [3]


@pytest.mark.parametrize(
    ("agent", "tokens", "iterations"),
    [("x", 1, 1), ("nobody", 1, 1), ("a", -1, 1), ("a", 1, math.inf), ("a", math.nan, 1)],
)
def test_a_reservation_that_cannot_be_is_refused(agent: str, tokens: float, iterations: float) -> None:
    with pytest.raises(QueueError):
        reserving().reserve(at(1), AgentId(agent), tokens, iterations)


def test_what_was_reserved_is_charged_for_as_long_as_it_was() -> None:
    queue = reserving(tokens=80, iterations=50)
    before = queue.agents[AgentId("a")].arrived
    queue.enqueue(at(21), task(3, "a", 10, memory=40), KvTokenIterations(400))
    assert released(queue, 21) == [3]
    assert queue.agents[AgentId("a")].arrived == before + 10 + 80 * 20
    late = reserving(tokens=80, iterations=5)
    late.enqueue(at(21), task(3, "a", 10, memory=40), KvTokenIterations(400))
    assert released(late, 21) == [3]
    assert late.agents[AgentId("a")].arrived == before + 10 + 80 * 5


def test_nothing_is_reserved_when_nobody_knows_what_is_kept() -> None:
    queue = reserving()
    queue.unreserve()
    queue.enqueue(at(2), task(3, "b", 500, memory=30), KvTokenIterations(500))
    assert released(queue, 2) == [3]


# Displacement


def test_one_at_a_time_is_sent_to_displace_another() -> None:
    queue = FairQueue(POLICIES["justitia"](), ReleaseLimits(engine_waiting=4, in_flight=10, displace_margin=100))
    queue.set_capacity(at(0), 100)
    queue.enqueue(at(0), task(1, "large", 5000, memory=90), KvTokenIterations(5000))
    assert released(queue, 0) == [1]
    for number in (2, 3, 4):
        queue.enqueue(at(0), task(number, "urgent", 10, memory=30), KvTokenIterations(30))
    assert [int(one.task.id) for one in queue.release(at(0), engine_waiting=0)] == [2]
    assert queue.release(at(1), engine_waiting=1) == [], "it has not been admitted yet"
    assert [int(one.task.id) for one in queue.release(at(2), engine_waiting=0)] == [3]


def test_nobody_is_sent_to_displace_who_is_not_far_enough_behind() -> None:
    for margin in (None, 5000.0):
        queue = FairQueue(POLICIES["justitia"](), ReleaseLimits(displace_margin=margin))
        queue.set_capacity(at(0), 100)
        queue.enqueue(at(0), task(1, "large", 5000, memory=90), KvTokenIterations(5000))
        queue.enqueue(at(0), task(2, "urgent", 10, memory=30), KvTokenIterations(10))
        assert released(queue, 0) in ([1], [2])
        assert released(queue, 0) == []
