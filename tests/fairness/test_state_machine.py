"""Whatever happens in whatever order: nothing is lost, nothing is served twice, V never goes back, the order holds."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.fairness import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
)

costs = st.floats(0, 1e4)
agents = st.sampled_from(["a", "b", "c", "d", "e"])


class QueueMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        capacity=st.floats(1, 1000),
        beta=st.floats(0.5, 3),
        slots=st.none() | st.integers(1, 5),
    )
    def begin(self, policy: str, capacity: float, beta: float, slots: int | None) -> None:
        self.policy = policy
        self.queue = FairQueue(POLICIES[policy](), ReleaseLimits(beta=beta, in_flight=slots))
        self.capacity, self.beta, self.slots = capacity, beta, slots
        self.now = Iterations(0.0)
        self.queue.set_capacity(self.now, capacity)
        self.waiting: dict[TaskId, Task] = {}
        self.in_flight: dict[TaskId, Task] = {}
        self.ended: set[TaskId] = set()
        self.next_id = 1
        self.virtual_time = 0.0

    @rule(agent=agents, cost=costs, memory=st.floats(0, 500), more=costs, weight=st.floats(0.1, 10))
    def enqueue(self, agent: str, cost: float, memory: float, more: float, weight: float) -> None:
        task = Task(TaskId(self.next_id), AgentId(agent), KvTokenIterations(cost), memory)
        self.next_id += 1
        self.queue.enqueue(self.now, task, KvTokenIterations(cost + more), weight=weight)
        self.waiting[task.id] = task

    @rule(waiting=st.integers(0, 8))
    def release(self, waiting: int) -> None:
        had_in_flight = len(self.in_flight)
        first = next(self.queue.in_order(), None)
        releases = self.queue.release(self.now, waiting)
        if not had_in_flight and self.waiting:
            assert releases, "always at least one"
        if len(releases) > 1 or (releases and had_in_flight):
            assert self.queue.peak_tokens <= (self.beta * self.capacity or float("inf")) * (1 + 1e-9) + 1e-6
        if releases:
            assert first is not None and releases[0].task.agent_id == first.id
            ranks = [release.rank for release in releases]
            assert ranks == sorted(ranks), "in order"
        for number, release in enumerate(releases):
            assert release.task.id in self.waiting, "neither lost nor twice"
            if had_in_flight or number:
                assert self.slots is None or len(self.in_flight) < self.slots
                assert waiting <= self.queue.limits.engine_waiting
            self.in_flight[release.task.id] = self.waiting.pop(release.task.id)

    @rule(iterations=st.floats(0, 100))
    def time_passes(self, iterations: float) -> None:
        self.now = Iterations(self.now + iterations)

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

    @rule(capacity=st.floats(0, 1000))
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
        assert self.queue.virtual_time() >= self.virtual_time
        self.virtual_time = self.queue.virtual_time()

    @invariant()
    def a_tag_never_says_less_than_the_work_that_has_arrived(self) -> None:
        for agent in self.queue.agents.values():
            assert agent.finish_tag >= self.queue.backlog_tag(agent.id) - 1e-6
            assert agent.predicted >= agent.arrived

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
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
