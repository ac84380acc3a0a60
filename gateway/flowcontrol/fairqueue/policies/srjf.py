"""Shortest remaining job first by agent: predicted total less what the engine has done. Large agents may wait for ever."""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class Srjf(Policy):
    by_progress = True

    def rank(self, agent: Agent, head: Task) -> float:
        return agent.predicted - agent.attained
