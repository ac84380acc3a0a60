"""Shortest job first by task, by predicted cost: agents do not count, and large tasks may wait for ever."""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class Sjf(Policy):
    def rank(self, agent: Agent, head: Task) -> float:
        return head.cost

    def task_rank(self, task: Task) -> float:
        return task.cost
