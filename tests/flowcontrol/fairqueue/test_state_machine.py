"""Whatever happens in whatever order: nothing is lost, nothing is served twice, V never goes back, the order holds."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from tests.flowcontrol.fairqueue.driver import contents

costs = st.floats(0, 1e4)
agents = st.sampled_from(["a", "b", "c", "d", "e"])
unknown = TaskId(10**9)


class QueueMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        capacity=st.floats(1, 1000),
        beta=st.floats(0.5, 3),
        slots=st.none() | st.integers(1, 5),
        tenants=st.integers(1, 3),
    )
    def begin(self, policy: str, capacity: float, beta: float, slots: int | None, tenants: int) -> None:
        self.policy = policy
        self.queue = FairQueue(POLICIES[policy](), ReleaseLimits(beta=beta, in_flight=slots))
        self.capacity, self.beta, self.slots = capacity, beta, slots
        self.now = Iterations(0.0)
        self.queue.set_capacity(self.now, capacity)
        self.waiting: dict[TaskId, Task] = {}
        self.in_flight: dict[TaskId, Task] = {}
        self.ended: set[TaskId] = set()
        self.next_id = 1
        self.tenants = [TenantId(name) for name in ("x", "y", "z")[:tenants]]
        self.virtual_times = dict.fromkeys(self.tenants, 0.0)
        self.outer_virtual_time = 0.0
        self.told: dict[TaskId, float] = {}
        self.lasting: dict[TaskId, float] = {}  # the rank of a task in flight where the policy does not revise
        # By task in flight: S of its tenant, and the work of its agent that was released, before it was.
        self.before: dict[TaskId, tuple[float, float]] = {}

    @rule(
        agent=agents,
        cost=costs,
        prompt=st.floats(0, 300),
        decode=st.floats(1, 200),
        more=costs,
        weights=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
        tenant=st.integers(0, 2),
    )
    def enqueue(
        self,
        agent: str,
        cost: float,
        prompt: float,
        decode: float,
        more: float,
        weights: tuple[float, float],
        tenant: int,
    ) -> None:
        task = Task(TaskId(self.next_id), AgentId(agent), KvTokenIterations(cost), prompt + decode, prompt)
        self.next_id += 1
        self.queue.enqueue(
            self.now,
            task,
            KvTokenIterations(cost + more),
            weight=weights[0],
            tenant=self.tenants[tenant % len(self.tenants)],
            tenant_weight=weights[1],
        )
        self.waiting[task.id] = task

    @rule(waiting=st.integers(0, 8))
    def release(self, waiting: int) -> None:
        had_in_flight = len(self.in_flight)
        first = next(self.queue.in_order(), None)
        starts = {agent.tenant.id: agent.tenant.start_tag for agent in self.queue.agents.values()}
        released = {agent.id: agent.released for agent in self.queue.agents.values()}
        releases = self.queue.release(self.now, waiting)
        for release in releases:
            task, tenant = release.task, self.queue.agents[release.task.agent_id].tenant
            self.told[task.id] = self.lasting[task.id] = release.rank
            self.before[task.id] = starts[tenant.id], released[task.agent_id]
            starts[tenant.id] += task.cost / tenant.weight
            released[task.agent_id] += task.cost
        if not had_in_flight and self.waiting:
            assert releases, "always at least one"
        if len(releases) > 1 or (releases and had_in_flight):
            assert self.queue.peak_tokens <= (self.beta * self.capacity or float("inf")) * (1 + 1e-9) + 1e-6
        if releases:
            assert first is not None and releases[0].task.agent_id == first.id
            ranks = [release.rank for release in releases]
            # Tenants take turns, and the rank is of whose turn it is.
            assert len(self.tenants) > 1 or ranks == sorted(ranks), "in order"
        for number, release in enumerate(releases):
            assert release.task.id in self.waiting, "neither lost nor twice"
            if had_in_flight or number:
                assert self.slots is None or len(self.in_flight) < self.slots
                assert waiting <= self.queue.limits.engine_waiting
            self.in_flight[release.task.id] = self.waiting.pop(release.task.id)

    @rule()
    def revise(self) -> None:
        """What is in flight, and only that, is told its rank again if it is another one, and only then."""
        expected = {}
        for agent in self.queue.agents.values():
            for task in agent.in_flight:
                start, released = self.before[task]
                rank: float = agent.finish_tag
                if len(self.queue._ranking._tenants) > 1:
                    rank = start + max(0.0, agent.predicted - released) / agent.tenant.weight
                if self.policy != "justitia":
                    rank = self.lasting[task]
                if rank != self.told[task]:
                    expected[task] = rank
        revised = self.queue.revise()
        assert {release.task.id: release.rank for release in revised} == expected
        assert len(revised) == len(expected)
        self.told |= expected
        assert self.queue.revise() == []

    @rule(policy=st.sampled_from(sorted(POLICIES)))
    def change_policy(self, policy: str) -> None:
        """Everything keeps its tags, and what waits is in the order of the new policy, worked out here from its ranks alone."""
        self.queue.set_capacity(self.now, self.capacity)  # so that the clock has been brought up to now
        before = self.tags()
        new = POLICIES[policy]()
        self.queue.change_policy(self.now, new)
        self.policy = policy
        assert self.tags() == before
        turns = []
        for agent in self.queue.agents.values():
            if agent.waiting:
                head = min(agent.waiting.values(), key=lambda task: (new.task_rank(task), task.id))
                turns.append((new.rank(agent, head), agent.seq, agent.id))
            self.lasting |= {task: new.rank(agent, flight.task) for task, flight in agent.in_flight.items()}
        if policy != "justitia" or len(self.tenants) == 1:
            assert [agent.id for agent in self.queue.in_order()] == [name for *_, name in sorted(turns)]
        else:
            assert {agent.id for agent in self.queue.in_order()} == {name for *_, name in turns}

    @rule(iterations=st.floats(0, 100))
    def time_passes(self, iterations: float) -> None:
        self.now = Iterations(self.now + iterations)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), prompt=st.floats(0, 300), output=st.floats(0, 200))
    def observe(self, data: st.DataObject, prompt: float, output: float) -> None:
        task = data.draw(st.sampled_from([*sorted(self.in_flight), unknown]))
        self.queue.observe(self.now, task, prompt + output, output)

    @rule(cost=costs, later=st.floats(0, 100))
    def a_refused_call_changes_nothing(self, cost: float, later: float) -> None:
        """Be it at a later time: the clock stands still too."""
        self.queue.set_capacity(self.now, self.capacity)  # so that the clock has been brought up to now
        seen = self.state()  # first: to read V brings a tenant's share up to date
        before = contents(self.queue)
        now = Iterations(self.now + later)
        spent, total = Spent(KvTokenIterations(cost)), KvTokenIterations(cost)
        negative = KvTokenIterations(-1.0 - cost)
        known = next(iter((*self.waiting.values(), *self.in_flight.values())), None)
        waits = next(iter(self.waiting), unknown)
        busy = known.agent_id if known else AgentId("unknown")
        for refused in (
            lambda: self.queue.complete(now, waits, spent, total),
            lambda: self.queue.complete(now, next(iter(self.in_flight), unknown), spent, negative),
            lambda: self.queue.requeue(now, waits),
            lambda: self.queue.cancel(now, unknown, spent),
            lambda: self.queue.cancel(now, waits, Spent(negative)),
            lambda: self.queue.evict(now, busy),
            lambda: self.queue.reserve(now, busy, cost, cost),
            lambda: self.queue.correct(now, busy, KvTokenIterations(math.inf)),
            lambda: self.queue.set_capacity(now, -1.0 - cost),
            lambda: self.queue.enqueue(now, known or Task(unknown, AgentId("a"), total, -1), total),
            lambda: self.queue.release(Iterations(self.now - 1)),
            lambda: self.queue.change_policy(Iterations(self.now - 1), POLICIES["fcfs"]()),
            lambda: self.queue.calibrate(Iterations(self.now - 1), cost),
            lambda: self.queue.observe(Iterations(self.now - 1), next(iter(self.in_flight), unknown), cost, cost),
        ):
            with pytest.raises(QueueError):
                refused()
            assert contents(self.queue) == before
        assert self.state() == seen
        self.queue.set_capacity(self.now, self.capacity)  # an earlier time than that of the refused calls is allowed

    def state(self) -> object:
        order = [agent.id for agent in self.queue.in_order()]
        ranks = [flight.rank for agent in self.queue.agents.values() for flight in agent.in_flight.values()]
        return self.tags(), order, ranks, self.queue.peak_tokens, self.queue.capacity_tokens

    def tags(self) -> object:
        agents = [
            (
                a.id,
                a.tenant.start_tag,
                a.predicted,
                a.arrived,
                a.released,
                a.attained,
                a.start_tag,
                a.finish_tag,
                a.forming,
            )
            for a in self.queue.agents.values()
        ]
        times = [self.queue.virtual_time(tenant) for tenant in self.tenants]
        return agents, times, self.queue.outer_virtual_time

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), cost=costs, total=costs)
    def complete(self, data: st.DataObject, cost: float, total: float) -> None:
        task = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.queue.complete(self.now, task, Spent(KvTokenIterations(cost)), KvTokenIterations(total))
        del self.in_flight[task]
        self.ended.add(task)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.queue.requeue(self.now, task)
        self.waiting[task] = self.in_flight.pop(task)

    @precondition(lambda self: self.waiting or self.in_flight)
    @rule(data=st.data(), cost=costs)
    def cancel(self, data: st.DataObject, cost: float) -> None:
        task = data.draw(st.sampled_from(sorted({**self.waiting, **self.in_flight})))
        self.queue.cancel(self.now, task, Spent(KvTokenIterations(cost)))
        self.waiting.pop(task, None)
        self.in_flight.pop(task, None)
        self.ended.add(task)

    @rule(agent=agents)
    def evict(self, agent: str) -> None:
        known = self.queue.agents.get(AgentId(agent))
        if known is not None and not known.busy:
            self.queue.evict(self.now, AgentId(agent))

    @rule(agent=agents)
    def is_put_back(self, agent: str) -> None:
        known = self.queue.agents.get(AgentId(agent))
        if known is not None and not known.busy:
            standing, tenant = self.queue.standing(known.id), known.tenant
            self.queue.evict(self.now, known.id)
            self.queue.restore(self.now, known.id, standing, tenant=tenant.id, tenant_weight=tenant.weight)
            assert self.queue.agents[known.id].finish_tag >= self.queue.backlog_tag(known.id)

    @rule(capacity=st.just(0.0) | st.floats(1, 1000))
    def capacity_changes(self, capacity: float) -> None:
        self.capacity = capacity
        self.queue.set_capacity(self.now, capacity)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.queue.waiting == len(self.waiting)
        assert self.queue.in_flight == len(self.in_flight)
        listed = {task for agent in self.queue.agents.values() for task in (*agent.waiting, *agent.in_flight)}
        assert listed == {*self.waiting, *self.in_flight}

    @invariant()
    def virtual_time_never_goes_back(self) -> None:
        for tenant, reached in self.virtual_times.items():
            self.virtual_times[tenant] = self.queue.virtual_time(tenant)
            assert self.virtual_times[tenant] >= reached
        assert self.queue.outer_virtual_time >= self.outer_virtual_time
        self.outer_virtual_time = self.queue.outer_virtual_time

    @invariant()
    def a_tag_never_says_less_than_the_work_that_has_arrived(self) -> None:
        for agent in self.queue.agents.values():
            assert agent.finish_tag >= self.queue.backlog_tag(agent.id) - 1e-6
            assert agent.predicted >= agent.arrived

    @invariant()
    def of_an_idle_agent_all_work_has_been_released_and_attained(self) -> None:
        for agent in self.queue.agents.values():
            if not agent.busy:
                assert agent.attained == pytest.approx(agent.released, abs=1e-6)
                assert agent.arrived == pytest.approx(agent.released, abs=1e-6)

    @invariant()
    def memory_in_flight_is_that_of_tasks_in_flight(self) -> None:
        assert (self.queue.peak_tokens > 0) <= bool(self.in_flight)

    def teardown(self) -> None:
        """Everything that was accepted can be served to its end."""
        if not hasattr(self, "queue"):
            return
        while self.waiting or self.in_flight:
            self.release(0)
            for task in sorted(self.in_flight):
                self.queue.complete(self.now, task, Spent(KvTokenIterations(1)), KvTokenIterations(1))
                self.ended.add(task)
            self.in_flight.clear()
        assert len(self.ended) == self.next_id - 1


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=250, stateful_step_count=40)
