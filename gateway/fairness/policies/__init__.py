"""The orders in which agents can be served: one small protocol, a file for each."""

from __future__ import annotations

from typing import Protocol

from gateway.fairness.policies.fcfs import Fcfs
from gateway.fairness.policies.justitia import Justitia
from gateway.fairness.types import Agent, Task


class Policy(Protocol):
    """Ranks an agent by what is known of it and of its next task. The smallest rank goes first; ties go to the agent that
    came first. The queue asks again whenever something about the agent has changed."""

    def rank(self, agent: Agent, head: Task) -> float: ...


POLICIES: dict[str, type[Policy]] = {"justitia": Justitia, "fcfs": Fcfs}
