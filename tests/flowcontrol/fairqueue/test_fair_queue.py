"""The queue's verbs and tags, with a fake clock, against cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

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
)
from tests.flowcontrol.fairqueue.driver import Driver, M, contents


def test_known_fixture_the_cheaper_of_two_goes_first_with_both_branches() -> None:
    queue = Driver()
    for _ in range(2):
        queue.enqueue("large", 50, total=100)
    for _ in range(2):
        queue.enqueue("small", 25, total=50)
    assert (queue.tag("large"), queue.tag("small")) == (100, 50)
    assert queue.release() == ["small", "small", "large", "large"]


def test_fcfs_goes_by_arrival_of_the_task() -> None:
    queue = Driver("fcfs")
    queue.enqueue("large", 100)
    queue.enqueue("small", 1)
    queue.enqueue("large", 100)
    assert queue.release() == ["large", "small", "large"]


def test_a_later_agent_gets_its_tag_from_the_virtual_time_of_its_arrival() -> None:
    queue = Driver()
    queue.enqueue("first", 1000)
    queue.now = Iterations(4)
    queue.enqueue("second", 100)
    assert queue.tag("second") == 4 * M + 100


def test_the_tag_stands_still_while_tasks_of_a_known_agent_arrive() -> None:
    queue = Driver()
    queue.enqueue("a", 100, total=1000)
    queue.release()
    for now in (1, 2, 3):
        queue.now = Iterations(now)
        queue.enqueue("a", 200, total=77777)
        assert queue.tag("a") == 1000


def test_a_forming_agent_renews_its_prediction_with_each_task() -> None:
    queue = Driver()
    queue.enqueue("a", 10, total=20)
    queue.enqueue("a", 10, total=500)
    assert queue.tag("a") == 500
    queue.enqueue("a", 10, total=300)
    assert queue.tag("a") == 300


def test_work_that_outgrows_the_prediction_moves_the_tag_back_by_the_difference() -> None:
    queue = Driver()
    queue.enqueue("a", 100, total=150)
    queue.release()
    queue.enqueue("a", 100, total=600)
    assert queue.tag("a") == 600
    queue.enqueue("a", 700, total=0)
    assert queue.tag("a") == 900, "never below what has arrived"


def test_a_true_cost_above_the_prediction_moves_the_tag_back() -> None:
    queue = Driver()
    task = queue.enqueue("a", 100, total=100)
    queue.enqueue("a", 0, total=100)
    queue.release()
    queue.complete(task, 250, total=400)
    assert queue.tag("a") == 400
    assert queue.backlog("a") == 250


def test_an_agent_that_waits_for_its_tool_is_neither_aged_nor_charged() -> None:
    queue = Driver()
    queue.enqueue("other", 10_000)
    first = queue.enqueue("a", 100, total=300)
    queue.release()
    queue.now = Iterations(2)  # both have been given 100 each: a is idle in the reference
    assert queue.tag("a") == 300
    queue.complete(first, 100)
    queue.now = Iterations(12)  # V: 100 + 10 iterations alone
    queue.enqueue("a", 100, total=77777)
    assert queue.tag("a") == 1100 + 200, "V plus what was left of it, 200"
    assert queue.backlog("a") == 1100 + 100


def test_a_cancelled_task_is_refunded_what_it_did_not_hold() -> None:
    queue = Driver()
    queue.enqueue("other", 1000)
    waiting = queue.enqueue("a", 100, total=100)
    assert queue.backlog("a") == 100
    queue.cancel(waiting)
    assert queue.backlog("a") == 0
    assert queue.queue.agents[AgentId("a")].arrived == 0

    held = queue.enqueue("a", 100, total=100)
    queue.release()
    queue.cancel(held, cost=30)
    assert queue.backlog("a") == 30


def test_weight_divides_cost() -> None:
    queue = Driver()
    queue.enqueue("light", 100)
    queue.enqueue("heavy", 150, weight=2)
    assert (queue.tag("light"), queue.tag("heavy")) == (100, 75)


def test_the_end_of_a_busy_period_leaves_no_ghosts() -> None:
    queue = Driver()
    a = queue.enqueue("a", 500)
    b = queue.enqueue("b", 300)
    queue.release()
    queue.complete(a, 500)
    queue.complete(b, 300)
    assert queue.queue.virtual_time() == 500
    queue.enqueue("late", 10)
    assert queue.tag("late") == 510
    queue.now = Iterations(0.05)
    queue.queue.release(queue.now)
    assert queue.queue.virtual_time() == 505, "late is alone: slope M"


def test_an_agent_that_comes_back_after_it_has_ended_does_not_get_ahead() -> None:
    queue = Driver()
    queue.enqueue("other", 10_000)
    task = queue.enqueue("a", 1000)
    queue.release()
    queue.complete(task, 1000)
    queue.queue.evict(queue.now, AgentId("a"))
    queue.enqueue("a", 10)
    assert queue.tag("a") == 1010, "the reference has not yet served what it was given"


# Release


def test_release_keeps_within_beta_m() -> None:
    queue = Driver(limits=ReleaseLimits(beta=1.1))
    for _ in range(5):
        queue.enqueue("a", 1, memory=50)
    assert len(queue.release()) == 2
    assert queue.queue.peak_tokens == 100


def test_the_head_is_not_overtaken_by_a_smaller_one_that_would_fit() -> None:
    queue = Driver(limits=ReleaseLimits(beta=1.0))
    queue.enqueue("a", 1, memory=80)
    queue.enqueue("b", 2, memory=80)
    queue.enqueue("c", 3, memory=10)
    assert queue.release() == ["a"]


def test_at_least_one_task_is_released_however_large() -> None:
    queue = Driver()
    queue.enqueue("a", 1, memory=100 * M)
    assert queue.release(engine_waiting=99) == ["a"]


def test_nothing_is_released_while_the_engine_has_a_queue_of_its_own() -> None:
    queue = Driver(limits=ReleaseLimits(engine_waiting=2))
    queue.enqueue("a", 1)
    assert queue.release() == ["a"]
    queue.enqueue("b", 1)
    assert queue.release(engine_waiting=3) == []
    assert queue.release(engine_waiting=2) == ["b"]


def test_slots_limit_what_is_in_flight() -> None:
    queue = Driver(limits=ReleaseLimits(beta=10, in_flight=2))
    for _ in range(3):
        queue.enqueue("a", 1)
    assert len(queue.release()) == 2


def test_a_task_that_holds_more_than_predicted_takes_the_room_it_holds() -> None:
    queue = Driver(limits=ReleaseLimits(beta=1.0))
    grown = queue.enqueue("a", 1, memory=10)
    queue.release()
    queue.queue.observe(queue.now, grown, 96, 1)
    queue.queue.observe(queue.now, grown, 50, 1)  # an older word
    queue.enqueue("b", 1, memory=10)
    assert queue.release() == []
    queue.complete(grown, 1)
    assert queue.release() == ["b"]
    assert queue.queue.peak_tokens == 10


def test_until_m_is_known_slots_are_the_only_limit() -> None:
    queue = Driver(limits=ReleaseLimits(in_flight=2), capacity=0)
    for _ in range(3):
        queue.enqueue("a", 1, memory=1000)
    assert len(queue.release()) == 2


def test_a_requeued_task_waits_in_its_old_place() -> None:
    queue = Driver()
    first = queue.enqueue("a", 10)
    queue.enqueue("a", 10)
    queue.release()
    queue.enqueue("b", 1000)
    queue.enqueue("a", 0, total=0)
    queue.queue.requeue(queue.now, first)
    releases = queue.queue.release(queue.now)
    assert releases[0].task.id == first
    assert queue.queue.in_flight == 4


def test_rank_goes_with_the_release() -> None:
    queue = Driver()
    queue.enqueue("a", 50, total=70)
    assert queue.queue.release(queue.now)[0].rank == 70


# Refusals change nothing


ONE = KvTokenIterations(1)
NAN = KvTokenIterations(float("nan"))


def task(number: int, agent: str, cost: float = 1, *, sequences: int = 1) -> Task:
    return Task(TaskId(number), AgentId(agent), KvTokenIterations(cost), 1, sequences=sequences)


def busy_queue() -> FairQueue:
    """At 1: task 1 of agent `a` is in flight, its task 2 waits, and agent `idle` has nothing to do."""
    driver = Driver(limits=ReleaseLimits(beta=10, in_flight=1))
    done = driver.enqueue("idle", 10)
    driver.release()
    driver.complete(done, 10)
    driver.queue.enqueue(driver.now, task(11, "a", 10), KvTokenIterations(20))
    driver.queue.enqueue(driver.now, task(12, "a", 10), KvTokenIterations(20))
    driver.queue.release(Iterations(1.0))
    return driver.queue


IN_FLIGHT, WAITS, UNKNOWN = TaskId(11), TaskId(12), TaskId(99)
KEPT = busy_queue().standing(AgentId("a"))
Call = Callable[[FairQueue, Iterations], object]


@pytest.mark.parametrize(
    "refused",
    [
        lambda q, now: q.set_capacity(now, -1),
        lambda q, now: q.set_capacity(now, -5, 3),
        lambda q, now: q.set_capacity(now, 5, -3),
        lambda q, now: q.enqueue(now, task(11, "a"), ONE),
        lambda q, now: q.enqueue(now, task(9, "z", -1), ONE),
        lambda q, now: q.enqueue(now, task(9, "z"), NAN),
        lambda q, now: q.enqueue(now, task(9, "z"), ONE, weight=0),
        lambda q, now: q.enqueue(now, task(9, "z"), ONE, tenant_weight=0),
        lambda q, now: q.enqueue(now, task(9, "z", sequences=0), ONE),
        lambda q, now: q.restore(now, AgentId("a"), KEPT),
        lambda q, now: q.restore(now, AgentId("z"), replace(KEPT, weight=0.0)),
        lambda q, now: q.reserve(now, AgentId("a"), 1, 1),
        lambda q, now: q.reserve(now, AgentId("unknown"), 1, 1),
        lambda q, now: q.reserve(now, AgentId("idle"), -1, 1),
        lambda q, now: q.reserve(now, AgentId("idle"), 1, math.inf),
        lambda q, now: q.correct(now, AgentId("a"), NAN),
        lambda q, now: q.requeue(now, WAITS),
        lambda q, now: q.requeue(now, UNKNOWN),
        lambda q, now: q.complete(now, WAITS, Spent(ONE), ONE),
        lambda q, now: q.complete(now, UNKNOWN, Spent(ONE), ONE),
        lambda q, now: q.complete(now, IN_FLIGHT, Spent(NAN), ONE),
        lambda q, now: q.complete(now, IN_FLIGHT, Spent(ONE), NAN),
        lambda q, now: q.cancel(now, UNKNOWN, Spent(ONE)),
        lambda q, now: q.cancel(now, IN_FLIGHT, Spent(KvTokenIterations(-1))),
        lambda q, now: q.evict(now, AgentId("a")),
        lambda q, now: q.evict(now, AgentId("unknown")),
    ],
)
def test_a_refused_call_changes_nothing_not_even_the_clock(refused: Call) -> None:
    queue = busy_queue()
    before = contents(queue)
    with pytest.raises(QueueError):
        refused(queue, Iterations(100.0))
    assert contents(queue) == before
    queue.enqueue(Iterations(50.0), task(9, "z"), ONE)


@pytest.mark.parametrize("now", [0.5, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda q, now: q.set_capacity(now, 5),
        lambda q, now: q.enqueue(now, task(9, "z"), ONE),
        lambda q, now: q.restore(now, AgentId("z"), KEPT),
        lambda q, now: q.release(now),
        lambda q, now: q.observe(now, IN_FLIGHT, 20, 10),
        lambda q, now: q.reserve(now, AgentId("idle"), 1, 1),
        lambda q, now: q.correct(now, AgentId("a"), ONE),
        lambda q, now: q.change_policy(now, POLICIES["fcfs"]()),
        lambda q, now: q.calibrate(now, 20),
        lambda q, now: q.requeue(now, IN_FLIGHT),
        lambda q, now: q.complete(now, IN_FLIGHT, Spent(ONE), ONE),
        lambda q, now: q.cancel(now, WAITS, Spent(ONE)),
        lambda q, now: q.cancel(now, IN_FLIGHT, Spent(ONE)),
        lambda q, now: q.evict(now, AgentId("idle")),
    ],
)
def test_every_verb_refuses_a_clock_that_goes_back(call: Call, now: float) -> None:
    queue = busy_queue()
    before = contents(queue)
    with pytest.raises(QueueError):
        call(queue, Iterations(now))
    assert contents(queue) == before
    call(queue, Iterations(2.0))
    assert contents(queue) != before, "the same call at a later time is allowed, and moves the clock"


def test_many_changes_leave_no_stale_entries_behind() -> None:
    queue = Driver()
    task = queue.enqueue("a", 1)
    for total in range(2000):
        queue.enqueue("b", 0, total=total)
    assert len(queue.queue.agents[AgentId("a")].tenant.order._heap) < 100
    queue.cancel(task)


def test_sequences_side_by_side_are_counted_each_for_itself() -> None:
    """Eight of a prompt of 100 tokens, 50 produced by each: eight times the cost of one."""
    queue = Driver(capacity=10_000)
    cost = KvTokenIterations(8 * (100 * 50 + 50 * 51 / 2))
    task = Task(TaskId(1), AgentId("a"), cost, 8 * 150, 8 * 100, sequences=8)
    queue.queue.enqueue(queue.now, task, cost)
    queue.release()
    queue.queue.observe(queue.now, TaskId(1), 8 * 150, 8 * 50)
    assert queue.queue.agents[AgentId("a")].attained == cost


def test_a_flow_of_enormous_weight_leaves_the_sum_of_weights_right() -> None:
    queue = Driver()
    queue.enqueue("heavy", 1, weight=1e17)
    queue.enqueue("light", 100)
    queue.now = Iterations(0.5)
    queue.release()
    assert 0 < queue.queue.virtual_time() <= 50


# Revisions


def revised(queue: Driver) -> dict[int, float]:
    """By task its new rank. No task is there twice."""
    releases = queue.queue.revise()
    ranks = {int(release.task.id): release.rank for release in releases}
    assert len(ranks) == len(releases)
    return ranks


def test_what_is_in_flight_is_revised_once_per_change() -> None:
    queue = Driver()
    first, second = queue.enqueue("a", 100, total=150), queue.enqueue("a", 10, total=150)
    other = queue.enqueue("b", 5)
    assert [release.rank for release in queue.queue.release(queue.now)] == [5, 150, 150]
    assert revised(queue) == {}, "they were just told"
    queue.enqueue("a", 200, total=600)
    assert revised(queue) == {first: 600, second: 600}
    assert revised(queue) == {}
    queue.enqueue("a", 1, total=99_999)
    assert revised(queue) == {}, "the tag has not moved"
    queue.complete(other, 5)
    queue.complete(first, 1000, total=0)
    assert revised(queue) == {second: 1211}, "the tag with the true cost, and not of what has ended"


def test_a_change_that_is_taken_back_is_not_told() -> None:
    queue = Driver()
    queue.enqueue("a", 100, total=100)
    task = queue.enqueue("a", 100, total=200)
    queue.release()
    more = queue.enqueue("a", 300, total=500)
    agent = queue.queue.agents[AgentId("a")]
    assert agent.finish_tag == 500
    agent.finish_tag = type(agent.finish_tag)(200)
    assert revised(queue) == {}
    agent.finish_tag = type(agent.finish_tag)(500)
    queue.cancel(more)
    assert set(revised(queue)) == {1, task}


def test_a_task_that_waits_again_is_not_revised_and_is_released_with_the_new_rank() -> None:
    queue = Driver()
    task = queue.enqueue("a", 100, total=100)
    queue.release()
    queue.enqueue("a", 400, total=700)
    queue.queue.requeue(queue.now, task)
    assert revised(queue) == {}
    assert [release.rank for release in queue.queue.release(queue.now)] == [700, 700]
    assert revised(queue) == {}


def test_who_waits_for_a_tool_and_comes_back_moves_what_is_still_in_flight_of_nobody_else() -> None:
    queue = Driver()
    queue.enqueue("b", 10_000)
    first = queue.enqueue("a", 100, total=300)
    queue.release()
    queue.complete(first, 100)
    queue.now = Iterations(50)
    again = queue.enqueue("a", 100)
    queue.release()
    assert revised(queue) == {}
    queue.enqueue("a", 5000, total=9000)
    assert set(revised(queue)) == {again}


def test_a_second_tenant_revises_everything_and_the_rank_is_that_of_a_release() -> None:
    queue = Driver(limits=ReleaseLimits(beta=100))
    first = queue.enqueue("a", 100, total=150, tenant="x")
    second = queue.enqueue("a", 20, total=150, tenant="x")
    other = queue.enqueue("b", 300, total=300, tenant="x")
    assert [release.rank for release in queue.queue.release(queue.now)] == [150, 150, 300]
    queue.enqueue("c", 1, tenant="y")
    # Packets of x: a with all of its 150; with the 50 that are left of it, after 100; and b after 120.
    assert revised(queue) == {other: 420}
    ranks = {task: flight.rank for agent in queue.queue.agents.values() for task, flight in agent.in_flight.items()}
    assert ranks == {first: 150, second: 150, other: 420}, "booked as told"
    assert revised(queue) == {}


def test_with_several_tenants_the_new_rank_is_what_the_release_would_have_had() -> None:
    """The same story twice: once the prediction is right from the beginning, once it is put right while the task runs."""
    ranks = []
    for predicted in (900, 150):
        queue = Driver(limits=ReleaseLimits(beta=100))
        queue.enqueue("z", 77, tenant="y")
        before = queue.enqueue("early", 40, tenant="x", tenant_weight=2)
        task = queue.enqueue("a", 100, total=predicted, tenant="x", tenant_weight=2)
        released = {release.task.id: release.rank for release in queue.queue.release(queue.now)}
        queue.enqueue("a", 100, total=900, tenant="x", tenant_weight=2)
        queue.enqueue("a", 700, total=900, tenant="x", tenant_weight=2)
        told = released | {TaskId(number): rank for number, rank in revised(queue).items()}
        ranks.append((told[task], told[before]))
    assert ranks[0] == ranks[1] == ((40 + 900) / 2, 40 / 2)


def test_another_weight_of_a_tenant_revises_what_it_has_in_flight() -> None:
    queue = Driver(limits=ReleaseLimits(beta=100))
    theirs = queue.enqueue("z", 500, tenant="y")
    first = queue.enqueue("a", 100, total=300, tenant="x", tenant_weight=1)
    second = queue.enqueue("b", 100, total=400, tenant="x", tenant_weight=1)
    told = {release.task.id: release.rank for release in queue.queue.release(queue.now)}
    assert told == {first: 300, second: 500, theirs: 500}
    queue.enqueue("c", 1, tenant="x", tenant_weight=4)
    assert revised(queue) == {first: 300 / 4, second: 100 + 400 / 4}
    assert revised(queue) == {}


def test_another_weight_of_the_only_tenant_revises_nothing() -> None:
    queue = Driver()
    queue.enqueue("a", 100, total=300, tenant="x", tenant_weight=1)
    queue.release()
    queue.enqueue("c", 1, tenant="x", tenant_weight=4)
    assert revised(queue) == {}


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"justitia"}))
def test_no_other_policy_is_revised(policy: str) -> None:
    queue = Driver(policy, limits=ReleaseLimits(beta=100))
    for number in range(20):
        tenant = "xy"[number % 2]
        task = queue.enqueue(
            f"{tenant}{number % 3}", 10 * number, total=7 * number, tenant=tenant, tenant_weight=1 + number
        )
        queue.release()
        queue.observe(task, 10, number)
        assert revised(queue) == {}
        if number % 4 == 3:
            queue.complete(task, 1000, total=5000)
        assert revised(queue) == {}


def test_agents_that_were_evicted_are_not_remembered_for_revision() -> None:
    """Where nobody can be told, nobody asks for revisions."""
    queue = Driver()
    for number in range(100):
        task = queue.enqueue(f"a{number}", 10)
        queue.release()
        more = queue.enqueue(f"a{number}", 100, total=200)
        queue.cancel(more)
        queue.complete(task, 500)
        queue.queue.evict(queue.now, AgentId(f"a{number}"))
    assert len(queue.queue._ranking._revised) <= 1
    assert revised(queue) == {}


def test_an_order_of_its_tasks_is_kept_only_for_an_agent_of_which_several_wait() -> None:
    """Most agents wait with one task: an order of one would cost 400 bytes for nothing."""
    queue = Driver("sjf", ReleaseLimits(beta=10, in_flight=3))
    first = queue.enqueue("a", 30)
    agent = queue.queue.agents[AgentId("a")]
    assert agent.order is None and agent.head() == agent.waiting[first]
    second = queue.enqueue("a", 10)
    third = queue.enqueue("a", 20)
    assert agent.head() == agent.waiting[second]
    queue.cancel(second)
    assert agent.head() == agent.waiting[third]
    queue.release()
    assert agent.order is None and agent.head() is None
    queue.queue.requeue(queue.now, first)
    assert agent.order is None and agent.head() == agent.waiting[first]
