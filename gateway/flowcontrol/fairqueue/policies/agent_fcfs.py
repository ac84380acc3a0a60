"""First come, first served by agent: all tasks of the agent that came first, including those that it sends late.

This is the order of Parrot (Lin et al., OSDI 2024), which schedules the requests of one application together.
"""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class AgentFcfs(Policy):
    def rank(self, agent: Agent, head: Task) -> float:
        return agent.seq
