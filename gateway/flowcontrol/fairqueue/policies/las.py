"""Least attained service: the agent goes first for which the engine has done least so far, in KV token·iterations.

This is the order of Autellix (Luo et al., arXiv 2502.13965), which counts the service of a whole program, here without its
discrete levels. Nothing has to be predicted, and small agents overtake large ones that have grown.
"""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class Las(Policy):
    by_progress = True

    def rank(self, agent: Agent, head: Task) -> float:
        return agent.attained / agent.weight
