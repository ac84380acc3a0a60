"""An agent that is put back after a restart stands where it would have stood, had the queue lived on."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    QueueError,
    Standing,
    TaskId,
    TenantId,
)
from tests.flowcontrol.fairqueue.driver import ONE_AT_A_TIME, Driver

Tenants = dict[str, str]


def restarted(driver: Driver, policy: str = "justitia", tenants: Tenants | None = None) -> Driver:
    """A new queue with the agents of another one. Its clock begins anew."""
    anew = Driver(policy, driver.queue.limits)
    for agent in sorted(driver.queue.agents.values(), key=lambda agent: agent.seq):
        tenant = TenantId((tenants or {}).get(agent.id, ""))
        anew.queue.restore(anew.now, agent.id, driver.queue.standing(agent.id), tenant=tenant)
    return anew


def ahead(driver: Driver, agent: str, tenant: str = "") -> float:
    """F - V."""
    return driver.tag(agent) - driver.queue.virtual_time(TenantId(tenant))


def test_an_agent_keeps_what_is_left_of_it() -> None:
    lived = Driver()
    task = lived.enqueue("a", 100, total=500)
    other = lived.enqueue("b", 300, total=300)
    lived.release()
    lived.complete(task, 100)
    lived.complete(other, 300)
    anew = restarted(lived)
    for driver in (lived, anew):
        driver.enqueue("a", 50)
        driver.enqueue("b", 50)
    assert ahead(lived, "a") == ahead(anew, "a") == 400
    assert ahead(lived, "b") == ahead(anew, "b") == 50
    assert lived.in_order() == anew.in_order() == ["b", "a"]


def test_what_was_unfinished_is_given_up() -> None:
    lived = Driver()
    for _ in range(3):
        lived.enqueue("a", 100, total=1000)
    first, second = TaskId(1), TaskId(2)
    assert len(lived.release()) == 3
    lived.complete(first, 150, total=1000)
    standing = lived.queue.standing(AgentId("a"))
    lived.observe(second, 10, 5)
    assert lived.queue.standing(AgentId("a")) == standing, "nor has it been served"
    assert (standing.served, standing.predicted) == (150, 1000)
    for task in (second, TaskId(3)):
        lived.cancel(task)
    after = lived.queue.standing(AgentId("a"))
    assert (after.served, after.start_tag) == (standing.served, standing.start_tag)
    agent = lived.queue.agents[AgentId("a")]
    assert (agent.arrived, agent.released, agent.attained, agent.unfinished) == (150, 150, 150, 0)


def test_what_passes_after_the_restart_is_idleness() -> None:
    lived = Driver()
    task = lived.enqueue("a", 100, total=500)
    lived.release()
    lived.complete(task, 100)
    anew = restarted(lived)
    anew.enqueue("b", 1000)
    anew.now = Iterations(5.0)
    anew.enqueue("a", 10)
    assert anew.queue.virtual_time() == 500
    assert ahead(anew, "a") == 400


def test_it_may_be_put_back_into_a_queue_that_is_at_work() -> None:
    lived = Driver()
    task = lived.enqueue("a", 100, total=500)
    lived.release()
    lived.complete(task, 100)
    busy = Driver()
    busy.enqueue("b", 1000)
    busy.now = Iterations(3.0)
    busy.queue.restore(busy.now, AgentId("a"), lived.queue.standing(AgentId("a")))
    assert ahead(busy, "a") == 400
    busy.enqueue("a", 10)
    assert busy.in_order() == ["a", "b"]


def test_what_cannot_be_is_refused_and_nothing_has_changed() -> None:
    driver = Driver()
    driver.enqueue("a", 100)
    sound = driver.queue.standing(AgentId("a"))
    fields = {name: getattr(sound, name) for name in Standing.__slots__}
    bad = [("weight", 0.0), ("predicted", math.inf), ("served", -1.0), ("start_tag", math.nan), ("lift", math.inf)]
    refused = [(AgentId("a"), sound), *((AgentId("b"), Standing(**{**fields, name: value})) for name, value in bad)]
    for agent_id, standing in refused:
        with pytest.raises(QueueError):
            driver.queue.restore(driver.now, agent_id, standing)
    assert list(driver.queue.agents) == ["a"]


steps = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "release", "complete", "cancel", "wait", "correct"]),
        st.sampled_from("abcd"),
        st.integers(1, 400),  # cost, or iterations
        st.integers(0, 1000),  # what the agent is predicted to cost beyond that
    ),
    max_size=40,
)
returns = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 200)), min_size=1, max_size=12)
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0, "e": 1.0}


def live(driver: Driver, steps: list[tuple[str, str, int, int]], tenants: Tenants) -> None:
    waiting: list[TaskId] = []
    in_flight: list[TaskId] = []
    for what, agent, amount, more in steps:
        if what == "enqueue":
            known = driver.queue.agents.get(AgentId(agent))
            total = amount + more + (known.arrived if known else 0)
            tenant = tenants.get(agent, "")
            waiting.append(driver.enqueue(agent, amount, total, weight=WEIGHTS[agent], tenant=tenant))
        elif what == "release":
            released = [release.task.id for release in driver.queue.release(driver.now)]
            in_flight += released
            waiting = [task for task in waiting if task not in released]
        elif what == "complete" and in_flight:
            driver.complete(in_flight.pop(0), amount, total=more)
        elif what == "cancel" and (waiting or in_flight):
            driver.cancel((waiting or in_flight).pop(), amount if not waiting else 0)
        elif what == "wait":
            driver.now = Iterations(driver.now + amount / 50)
        elif what == "correct":
            driver.queue.correct(driver.now, AgentId(agent), amount - 200)  # type: ignore[arg-type]


def end_busy_period(driver: Driver, tenants: Tenants) -> None:
    for agent in list(driver.queue.agents.values()):
        for task in [*agent.waiting, *agent.in_flight]:
            driver.cancel(task)
    # A correction may have come after the last one had ended.
    for tenant in {"", *tenants.values()}:
        driver.cancel(driver.enqueue(f"last-of-{tenant}", 0, tenant=tenant))
        driver.queue.evict(driver.now, AgentId(f"last-of-{tenant}"))


@given(steps, returns, st.booleans(), st.booleans())
def test_agents_come_back_as_if_the_queue_had_lived_on(
    steps: list[tuple[str, str, int, int]], returns: list[tuple[str, int]], one_at_a_time: bool, two_tenants: bool
) -> None:
    tenants = {"c": "x", "d": "x", "e": "x"} if two_tenants else {}
    lived = Driver(limits=ONE_AT_A_TIME) if one_at_a_time else Driver()
    live(lived, steps, tenants)
    end_busy_period(lived, tenants)
    if not lived.queue.agents:
        return
    anew = restarted(lived, tenants=tenants)
    for agent, cost in returns:
        for driver in (lived, anew):
            known = driver.queue.agents.get(AgentId(agent))
            driver.enqueue(
                agent,
                cost,
                cost + (known.arrived if known else 0),
                weight=WEIGHTS[agent],
                tenant=tenants.get(agent, ""),
            )
        assert ahead(anew, agent, tenants.get(agent, "")) == pytest.approx(
            ahead(lived, agent, tenants.get(agent, "")), rel=1e-6, abs=1e-3
        )
    for tenant in {"", *tenants.values()}:
        mine = [name for name in lived.in_order() if tenants.get(name, "") == tenant]
        tags = [ahead(lived, name, tenant) for name in mine]
        if all(after - before > 1e-3 for before, after in itertools.pairwise(tags)):  # else it is a draw
            assert [name for name in anew.in_order() if tenants.get(name, "") == tenant] == mine


@given(steps)
def test_a_busy_agent_stands_as_if_the_rest_of_it_were_cancelled_now(steps: list[tuple[str, str, int, int]]) -> None:
    driver = Driver()
    live(driver, steps, {})
    driver.queue.release(driver.now)  # which brings the reference up to now
    for agent_id, agent in driver.queue.agents.items():
        before = driver.queue.standing(agent_id)
        for task in [*agent.waiting, *agent.in_flight]:
            driver.cancel(task)
        after = driver.queue.standing(agent_id)
        assert after.start_tag == pytest.approx(before.start_tag, rel=1e-6, abs=1e-3)
        assert after.served == pytest.approx(before.served, rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves_them_in_the_same_order(policy: str) -> None:
    lived = Driver(policy, ONE_AT_A_TIME)
    for agent, cost, prompt in (("a", 300, 30), ("b", 100, 50), ("c", 200, 10)):
        task = lived.enqueue(agent, cost, total=2 * cost, prompt=prompt)
        lived.release()
        lived.observe(task, prompt, 3)
        lived.complete(task, cost, total=2 * cost, prompt=prompt, output=5)
    anew = restarted(lived, policy)
    orders = []
    for driver in (lived, anew):
        for agent, cost in (("c", 20), ("b", 10), ("a", 30)):
            driver.enqueue(agent, cost)
        orders.append(driver.in_order())
    assert orders[0] == orders[1]


def test_an_empty_queue_has_nobody_to_ask_for() -> None:
    with pytest.raises(KeyError):
        FairQueue(POLICIES["justitia"]()).standing(AgentId("a"))
