"""The policy changes while tasks wait and run: what waits gets its place, what runs its rank, and the reference goes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue import POLICIES, AgentId, Iterations, QueueError, ReleaseLimits, TaskId
from tests.flowcontrol.fairqueue.driver import ONE_AT_A_TIME, Driver

EVERYTHING = ReleaseLimits(beta=1e9)
COUNTERS = {"vtc"}  # begins anew, so that it is not what it would have been


def change(driver: Driver, policy: str) -> None:
    driver.queue.change_policy(driver.now, POLICIES[policy]())


def revised(driver: Driver) -> dict[int, float]:
    return {int(release.task.id): release.rank for release in driver.queue.revise()}


# What waits


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("justitia", ["c", "a", "b"]),
        ("fcfs", ["a", "b", "c"]),
        ("agent-fcfs", ["a", "b", "c"]),
        ("vtc", ["a", "b", "c"]),
        ("las", ["a", "b", "c"]),
        ("sjf", ["b", "a", "c"]),
        ("srjf", ["c", "a", "b"]),
    ],
)
@pytest.mark.parametrize("before", sorted(POLICIES))
def test_who_waits_gets_the_place_that_the_policy_gives(before: str, policy: str, order: list[str]) -> None:
    queue = Driver(before)
    queue.enqueue("a", 30, total=400)
    queue.enqueue("b", 10, total=500)
    queue.enqueue("c", 50, total=60)
    change(queue, policy)
    assert queue.in_order() == order
    assert queue.release() == order
    assert queue.queue.waiting == 0


def test_the_tasks_of_one_agent_are_ordered_anew_and_back() -> None:
    queue = Driver("fcfs", EVERYTHING)
    long, short, middle = (queue.enqueue("a", cost) for cost in (30, 10, 20))
    agent = queue.queue.agents[AgentId("a")]
    change(queue, "sjf")
    assert list(agent.order) == [short, middle, long]
    change(queue, "justitia")
    assert list(agent.order) == [long, short, middle]


def test_a_tenant_that_has_been_served_first_come_owes_what_it_has_had() -> None:
    """x has sent three agents before the first of y, and had two of them served. By shares it is y's turn, and then again."""
    queue = Driver("fcfs", ReleaseLimits(beta=1e9, in_flight=2))
    for name in ("x1", "x2", "x3"):
        queue.enqueue(name, 100, tenant="x")
    for name in ("y1", "y2"):
        queue.enqueue(name, 90, tenant="y")
    assert queue.release() == ["x1", "x2"]
    assert queue.in_order() == ["x3", "y1", "y2"]
    change(queue, "justitia")
    assert queue.in_order() == ["y1", "y2", "x3"], "90, 180, and 300"
    change(queue, "fcfs")
    assert queue.in_order() == ["x3", "y1", "y2"]


def test_vtc_begins_with_all_counters_at_zero() -> None:
    """a has had much, under another order; b, which comes after, starts level, and from then on tokens count."""
    queue = Driver("fcfs", ONE_AT_A_TIME)
    first = queue.enqueue("a", 100, prompt=1000)
    queue.enqueue("a", 100, prompt=50)
    queue.release()
    queue.complete(first, 100, prompt=1000, output=500)
    queue.enqueue("b", 100, prompt=10)
    queue.enqueue("b", 100, prompt=10)
    change(queue, "vtc")
    assert queue.in_order() == ["a", "b"], "level; the first among equals"
    assert queue.release() == ["a"]
    queue.enqueue("a", 100)
    assert queue.in_order() == ["b", "a"], "0 against 50"


def test_it_releases_nothing_by_itself_and_slots_stay_taken() -> None:
    queue = Driver("fcfs", ReleaseLimits(beta=1e9, in_flight=1))
    queue.enqueue("a", 100, memory=30)
    queue.enqueue("b", 10, memory=20)
    assert queue.release() == ["a"]
    before = queue.queue.peak_tokens
    change(queue, "sjf")
    assert (queue.queue.waiting, queue.queue.in_flight, queue.queue.peak_tokens) == (1, 1, before)
    assert queue.release() == []
    queue.complete(TaskId(1), 100)
    assert queue.release() == ["b"]


def test_a_change_at_an_earlier_time_is_refused_and_changes_nothing() -> None:
    queue = Driver("sjf")
    queue.enqueue("a", 30)
    queue.now = Iterations(5)
    queue.enqueue("b", 10)
    with pytest.raises(QueueError):
        queue.queue.change_policy(Iterations(4), POLICIES["fcfs"]())
    assert queue.in_order() == ["b", "a"]


# What is in flight


def test_what_is_in_flight_is_ranked_by_the_new_policy_and_told_once() -> None:
    queue = Driver("justitia", EVERYTHING)
    first, second = queue.enqueue("a", 100, total=700), queue.enqueue("b", 200, total=300)
    third = queue.enqueue("a", 50, total=700)
    queue.release()
    assert revised(queue) == {}
    change(queue, "fcfs")
    assert revised(queue) == {first: first, second: second, third: third}
    assert revised(queue) == {}
    queue.observe(first, 8, 4)
    change(queue, "las")
    attained = queue.queue.agents[AgentId("a")].attained
    assert attained == 8 * 4 + 10
    assert revised(queue) == {first: attained, second: 0.0, third: attained}
    queue.observe(first, 8, 5)
    assert revised(queue) == {}, "they keep the rank of the change, as they would keep that of their release"
    change(queue, "justitia")
    assert revised(queue) == {first: 700, second: 300, third: 700}
    queue.enqueue("a", 900, total=1500)
    assert revised(queue) == {first: 1500, third: 1500}, "and from now on they are revised again"


def test_a_change_and_back_that_nobody_was_told_of_is_none() -> None:
    queue = Driver("justitia", EVERYTHING)
    queue.enqueue("a", 100, total=700)
    queue.release()
    change(queue, "sjf")
    change(queue, "justitia")
    assert revised(queue) == {}


def test_ranks_of_several_tenants_are_those_that_a_release_would_have_given() -> None:
    ranks = []
    for policy in ("fcfs", "justitia"):
        queue = Driver(policy, EVERYTHING)
        released: dict[int, float] = {}
        for agent, tenant in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "x"), ("e", "y")):
            queue.enqueue(agent, 100, total=300, tenant=tenant, tenant_weight=2)
            released |= {int(release.task.id): release.rank for release in queue.queue.release(queue.now)}
        change(queue, "justitia")
        ranks.append(released | revised(queue))
    assert ranks[0] == ranks[1] == {1: 150, 2: 150, 3: 200, 4: 250, 5: 200}


# As if it had always been so

steps = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "enqueue", "enqueue", "cancel", "serve", "wait", "change"]),
        st.sampled_from(["a", "b", "c", "d"]),
        st.integers(1, 64),  # cost, or iterations
        st.sampled_from([0.5, 1.0, 2.0]),  # weight
        st.sampled_from(sorted(POLICIES)),
    ),
    max_size=30,
)


@given(steps, st.sampled_from(sorted(set(POLICIES) - COUNTERS)), st.booleans())
def test_after_a_change_it_is_as_if_the_policy_had_never_been_another(
    steps: list[tuple[str, str, int, float, str]], policy: str, several: bool
) -> None:
    """The same story twice. Both serve all that waits at once, or nothing, so that only the order differs meanwhile."""
    always, changing = Driver(policy, EVERYTHING, capacity=8), Driver("fcfs", EVERYTHING, capacity=8)
    for what, agent, number, weight, other in steps:
        for queue in (always, changing):
            tasks = sorted(queue.queue._tasks)
            if what == "enqueue":
                tenant = {"c": "y", "d": "y"}.get(agent, "x") if several else ""
                queue.enqueue(agent, number, total=2 * number, weight=weight, tenant=tenant, tenant_weight=weight)
            elif what == "cancel" and tasks:
                queue.cancel(tasks[number % len(tasks)])
            elif what == "serve":
                queue.release()
                for task in tasks:
                    queue.complete(task, number, total=0)
            elif what == "wait":
                queue.now = Iterations(queue.now + number)
                queue.queue.set_capacity(queue.now, 8)
            elif what == "change" and queue is changing:
                change(queue, other)
    change(changing, policy)
    assert state(changing) == state(always)
    assert changing.release() == always.release()


def state(driver: Driver) -> object:
    queue = driver.queue
    agents = {
        agent.id: (agent.start_tag, agent.finish_tag, agent.predicted, agent.arrived, agent.released, agent.attained)
        for agent in queue.agents.values()
    }
    backlog = {agent_id: queue.backlog_tag(agent_id) for agent_id in agents}
    starts = {agent.tenant.id: (agent.tenant.start_tag, agent.tenant.weight) for agent in queue.agents.values()}
    times = [queue.outer_virtual_time, *(queue.virtual_time(tenant) for tenant in starts)]
    return agents, backlog, starts, times, driver.in_order()
