"""The interface of a policy."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.flowcontrol.fairqueue.types import Agent, Task


class Policy:
    """Ranks agents. The smallest rank goes first; ties go to the agent that came first."""

    # Tenants share first, and agents within their tenant. Otherwise tenants do not count.
    nested = False
    # The rank changes with each token that the engine produces.
    by_progress = False
    # The engine receives the new rank of a task in flight when its agent's rank changes. Otherwise such a task keeps the rank
    # of its release, or of the moment at which the policy began: for ranks that change with everything that happens.
    revised = False

    def rank(self, agent: Agent, head: Task) -> float:
        """By what is known of the agent and of its next task. The queue asks again whenever the agent has changed."""
        raise NotImplementedError

    def task_rank(self, task: Task) -> float:
        """The rank among the tasks of one agent; ties go to the task that came first."""
        return 0.0

    def begin(self, agents: Iterable[Agent]) -> None:
        """The policy takes over from another one. `agents`: all known ones, busy or not."""

    def woke(self, agent: Agent, least: float | None) -> None:
        """A task of the agent waits, the only one. `least`: the smallest rank among the other agents that wait."""

    def slept(self, agent: Agent) -> None:
        """No task of the agent waits any more."""
