"""First come, first served by task, as vLLM does by default: agents do not count."""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class Fcfs(Policy):
    def rank(self, agent: Agent, head: Task) -> float:
        return head.id  # ids grow with arrival
