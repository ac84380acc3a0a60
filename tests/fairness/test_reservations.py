"""Memory that is kept for agents that wait for their tools."""

from __future__ import annotations

import math

import pytest

from gateway.fairness import (
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
