"""The fair queue: agents, their tasks, and the verbs that move them.

A task is enqueued, released, and then completed or cancelled; a waiting one can be cancelled too, and one that the engine
lost is requeued. An agent that has nothing waiting and nothing in flight can be evicted.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from gateway.fairness.policies import Policy
from gateway.fairness.reference import Reference
from gateway.fairness.types import (
    Agent,
    AgentId,
    Iterations,
    KvTokenIterations,
    QueueError,
    Release,
    ReleaseLimits,
    Task,
    TaskId,
    VirtualTime,
)


class FairQueue:
    def __init__(self, policy: Policy, limits: ReleaseLimits = ReleaseLimits()) -> None:  # noqa: B008 (it is frozen)
        self.limits = limits
        self._policy = policy
        self._reference = Reference()
        self._capacity_tokens = 0.0
        self._agents: dict[AgentId, Agent] = {}
        self._tasks: dict[TaskId, Agent] = {}
        self._memory: dict[TaskId, float] = {}  # max(p + d̂, held) of what is in flight
        self._memory_tokens = 0.0
        self._next_seq = 0
        # Heap of (rank, agent's seq, entry's number, agent): an entry that is no longer its agent's place is skipped.
        self._order: list[tuple[float, int, int, Agent]] = []
        self._entry = itertools.count()

    # What can be seen

    @property
    def virtual_time(self) -> VirtualTime:
        """V as of the last call that took `now`."""
        return self._reference.virtual_time

    @property
    def agents(self) -> Mapping[AgentId, Agent]:
        return MappingProxyType(self._agents)

    @property
    def waiting(self) -> int:
        return len(self._tasks) - len(self._memory)

    @property
    def in_flight(self) -> int:
        return len(self._memory)

    @property
    def memory_tokens(self) -> float:
        """Σ max(p + d̂, held) over what is in flight."""
        return self._memory_tokens

    @property
    def capacity_tokens(self) -> float:
        """M."""
        return self._capacity_tokens

    def backlog_tag(self, agent_id: AgentId) -> VirtualTime:
        """B of the agent."""
        return self._reference.backlog_tag(agent_id)

    def in_order(self) -> Iterator[Agent]:
        """The agents with waiting tasks, the next one first. O(N log N): for people, not for decisions."""
        return iter(sorted((a for a in self._agents.values() if a.place is not None), key=lambda a: a.place or (0, 0)))

    # The verbs

    def set_capacity(self, now: Iterations, tokens: float) -> None:
        """M, when the engine has said it, or another one."""
        self._reference.advance(now)
        self._reference.set_capacity(tokens)
        self._capacity_tokens = tokens

    def enqueue(self, now: Iterations, task: Task, agent_cost: KvTokenIterations, weight: float = 1.0) -> None:
        """A task arrives. `agent_cost` is what its agent is now predicted to cost in total; it counts while the agent is
        forming, and when the work that has arrived outgrows the earlier prediction. `weight` counts when the agent is new."""
        if task.id in self._tasks:
            raise QueueError(f"task {task.id} is in the queue already")
        if not all(0 <= amount < math.inf for amount in (task.cost, task.memory_tokens, agent_cost)):
            raise QueueError(f"costs and memory must be at least 0, and finite: {task}, agent {agent_cost}")
        if not 0 < weight < math.inf:
            raise QueueError(f"a weight must be positive, not {weight}")
        self._reference.advance(now)
        agent = self._agents.get(task.agent_id)
        if agent is None:
            agent = Agent(task.agent_id, self._next_seq, weight, agent_cost)
            self._next_seq += 1
            self._agents[agent.id] = agent
        self._reference.arrive(agent.id, task.cost, agent.weight)
        agent.wait(task)
        self._tasks[task.id] = agent
        agent.arrived = KvTokenIterations(agent.arrived + task.cost)
        self._settle_tag(agent, agent_cost)

    def release(self, now: Iterations, engine_waiting: int = 0) -> list[Release]:
        """The tasks to send to the engine now, in order. `engine_waiting`: tasks in the engine's own queue."""
        self._reference.advance(now)
        releases: list[Release] = []
        while (agent := self._first()) is not None:
            task = agent.head()
            assert task is not None and agent.place is not None
            if self._memory and not self._fits(task, engine_waiting):
                break
            releases.append(Release(task, agent.place[0]))
            del agent.waiting[task.id]
            agent.in_flight[task.id] = task
            agent.forming = False
            self._memory[task.id] = task.memory_tokens
            self._memory_tokens += task.memory_tokens
            self._place(agent)
        return releases

    def hold(self, task_id: TaskId, tokens: float) -> None:
        """The engine says what a task in flight holds: more than predicted counts from now on. Unknown tasks are ignored,
        since the engine's word arrives late."""
        known = self._memory.get(task_id)
        if known is not None and tokens > known:
            self._memory[task_id] = tokens
            self._memory_tokens += tokens - known

    def requeue(self, now: Iterations, task_id: TaskId) -> None:
        """The engine lost a task in flight: it waits again, in its old place."""
        self._reference.advance(now)
        agent, task = self._in_flight(task_id)
        self._land(agent, task)
        agent.wait(task)
        self._tasks[task_id] = agent
        self._place(agent)

    def complete(
        self, now: Iterations, task_id: TaskId, cost: KvTokenIterations, agent_cost: KvTokenIterations
    ) -> None:
        """A task in flight has ended with its true `cost`. `agent_cost`: see `enqueue`."""
        if not (0 <= cost < math.inf and 0 <= agent_cost < math.inf):
            raise QueueError(f"costs must be at least 0, and finite: task {cost}, agent {agent_cost}")
        self._reference.advance(now)
        agent, task = self._in_flight(task_id)
        self._land(agent, task)
        self._reconcile(agent, task, cost, agent_cost)

    def cancel(self, now: Iterations, task_id: TaskId, cost: KvTokenIterations) -> None:
        """A task was given up, waiting or in flight. `cost`: of what it really held."""
        if not 0 <= cost < math.inf:
            raise QueueError(f"a cost must be at least 0, and finite, not {cost}")
        self._reference.advance(now)
        agent = self._tasks.get(task_id)
        if agent is None:
            raise QueueError(f"task {task_id} is not in the queue")
        task = agent.waiting.pop(task_id, None)
        if task is None:
            task = agent.in_flight[task_id]
            self._land(agent, task)
        else:
            del self._tasks[task_id]
        self._reconcile(agent, task, cost, agent.predicted)

    def evict(self, now: Iterations, agent_id: AgentId) -> None:
        """Forget an agent that has ended. The reference keeps it for as long as it is backlogged there."""
        self._reference.advance(now)
        agent = self._agents.get(agent_id)
        if agent is None or agent.busy:
            raise QueueError(f"agent {agent_id!r} is " + ("not known" if agent is None else "not idle"))
        del self._agents[agent_id]
        self._reference.forget(agent_id)

    # How they work

    def _fits(self, task: Task, engine_waiting: int) -> bool:
        if engine_waiting > self.limits.engine_waiting:
            return False
        if self.limits.in_flight is not None and len(self._memory) >= self.limits.in_flight:
            return False
        # M is 0 until somebody has said it. Then slots are the only limit.
        room = self.limits.beta * self._capacity_tokens or math.inf
        return self._memory_tokens + task.memory_tokens <= room

    def _in_flight(self, task_id: TaskId) -> tuple[Agent, Task]:
        agent = self._tasks.get(task_id)
        if agent is None or task_id not in agent.in_flight:
            raise QueueError(f"task {task_id} is not in flight")
        return agent, agent.in_flight[task_id]

    def _land(self, agent: Agent, task: Task) -> None:
        """The task is no longer at the engine."""
        del agent.in_flight[task.id]
        del self._tasks[task.id]
        self._memory_tokens -= self._memory.pop(task.id)
        if not self._memory:
            self._memory_tokens = 0.0  # rounding must not add up

    def _reconcile(self, agent: Agent, task: Task, cost: KvTokenIterations, agent_cost: KvTokenIterations) -> None:
        difference = KvTokenIterations(cost - task.cost)
        self._reference.correct(agent.id, difference)
        agent.arrived = KvTokenIterations(max(0.0, agent.arrived + difference))
        self._settle_tag(agent, agent_cost)
        if not self._tasks:
            self._reference.end_busy_period()

    def _settle_tag(self, agent: Agent, agent_cost: KvTokenIterations) -> None:
        """F = B + (Ĉ − A)/w, with Ĉ renewed where the constitution says so."""
        if agent.forming or agent.arrived > agent.predicted:
            agent.predicted = KvTokenIterations(max(agent_cost, agent.arrived))
        ahead = (agent.predicted - agent.arrived) / agent.weight
        agent.finish_tag = VirtualTime(self._reference.backlog_tag(agent.id) + ahead)
        self._place(agent)

    def _place(self, agent: Agent) -> None:
        """Put the agent where it now belongs in the order."""
        head = agent.head()
        place = None if head is None else (self._policy.rank(agent, head), agent.seq)
        if place == agent.place:
            return
        agent.place = place
        if place is not None:
            heapq.heappush(self._order, (*place, next(self._entry), agent))
            if len(self._order) > 64 + 4 * len(self._agents):
                self._order = [(*a.place, next(self._entry), a) for a in self._agents.values() if a.place is not None]
                heapq.heapify(self._order)

    def _first(self) -> Agent | None:
        while self._order:
            rank, seq, _, agent = self._order[0]
            if agent.place == (rank, seq):
                return agent
            heapq.heappop(self._order)
        return None
