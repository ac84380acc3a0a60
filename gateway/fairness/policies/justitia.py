"""Selective pampering: agents one after another, in the order in which fair sharing would finish them."""

from __future__ import annotations

from gateway.fairness.types import Agent, Task


class Justitia:
    def rank(self, agent: Agent, head: Task) -> float:
        return agent.finish_tag
