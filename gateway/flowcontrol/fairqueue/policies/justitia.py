"""Selective pampering: agents one after another, in the order in which fair sharing would finish them.

Justitia, arXiv 2510.17015.
"""

from __future__ import annotations

from gateway.flowcontrol.fairqueue.policies.policy import Policy
from gateway.flowcontrol.fairqueue.types import Agent, Task


class Justitia(Policy):
    nested = True
    revised = True

    def rank(self, agent: Agent, head: Task) -> float:
        return agent.finish_tag
