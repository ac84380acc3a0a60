"""What a policy is asked."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.flowcontrol.fairqueue.types import Agent, Task


class Policy:
    """Ranks an agent by what is known of it and of its next task. The smallest rank goes first; ties go to the agent that
    came first. The queue asks again whenever something about the agent has changed.

    nested: tenants share first, and agents within their tenant. Otherwise tenants do not count.
    by_progress: the rank changes with what the engine produces, token by token.
    revised: tasks that the engine has are given the rank anew when their agent's changes. Where it changes with all that
        happens, they keep that of their release, or of the moment at which the policy began.
    """

    nested = False
    by_progress = False
    revised = False

    def rank(self, agent: Agent, head: Task) -> float:
        raise NotImplementedError

    def task_rank(self, task: Task) -> float:
        """Among the tasks of one agent; ties go to the task that came first."""
        return 0.0

    def begin(self, agents: Iterable[Agent]) -> None:
        """The policy takes over from another one, with these agents, busy or not."""

    def woke(self, agent: Agent, least: float | None) -> None:
        """The agent, of which nothing waited, has a task that waits. `least`: the smallest rank among the others that wait."""

    def slept(self, agent: Agent) -> None:
        """Nothing of the agent waits any more."""
