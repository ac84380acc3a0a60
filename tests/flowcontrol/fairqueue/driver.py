"""A fair queue with a clock that is moved by hand."""

from __future__ import annotations

import pickle

from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    Policy,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)

M = 100.0
UNLIMITED = ReleaseLimits(beta=10)
ONE_AT_A_TIME = ReleaseLimits(beta=10, in_flight=1)


class Driver:
    def __init__(
        self, policy: str | Policy = "justitia", limits: ReleaseLimits = UNLIMITED, capacity: float = M
    ) -> None:
        self.queue = FairQueue(policy if isinstance(policy, Policy) else POLICIES[policy](), limits)
        self.now = Iterations(0.0)
        self.queue.set_capacity(self.now, capacity)
        self._ids = iter(range(1, 10_000))

    def enqueue(
        self,
        agent: str,
        cost: float,
        total: float | None = None,
        memory: float = 10,
        weight: float = 1,
        prompt: float = 0,
        tenant: str = "",
        tenant_weight: float = 1,
    ) -> TaskId:
        task = Task(TaskId(next(self._ids)), AgentId(agent), KvTokenIterations(cost), memory, prompt)
        known = self.queue.agents.get(task.agent_id)
        expected = total if total is not None else cost + (known.arrived if known else 0)
        self.queue.enqueue(
            self.now,
            task,
            KvTokenIterations(expected),
            weight=weight,
            tenant=TenantId(tenant),
            tenant_weight=tenant_weight,
        )
        return task.id

    def release(self, engine_waiting: int = 0) -> list[str]:
        return [release.task.agent_id for release in self.queue.release(self.now, engine_waiting)]

    def observe(self, task: TaskId, prompt: float, output: float) -> None:
        self.queue.observe(self.now, task, prompt + output, output)

    def complete(
        self, task: TaskId, cost: float, total: float = 0, prompt: float | None = None, output: float | None = None
    ) -> None:
        self.queue.complete(self.now, task, Spent(KvTokenIterations(cost), prompt, output), KvTokenIterations(total))

    def cancel(self, task: TaskId, cost: float = 0) -> None:
        self.queue.cancel(self.now, task, Spent(KvTokenIterations(cost)))

    def in_order(self) -> list[str]:
        return [agent.id for agent in self.queue.in_order()]

    def tag(self, agent: str) -> float:
        return self.queue.agents[AgentId(agent)].finish_tag

    def backlog(self, agent: str) -> float:
        return self.queue.backlog_tag(AgentId(agent))


def contents(queue: FairQueue) -> bytes:
    """Everything that the queue holds, down to the last private field: equal if, and only if, nothing has changed."""
    return pickle.dumps(queue)
