"""The KV cache that is kept for agents that wait for their tools.

While an agent waits for its tool, its KV stays at the engine, and later agents of its tenant do not get that memory. The
reservation ends when the agent's next task is released, and is then charged to the agent like memory that a task held:
the tokens, times the iterations for which they were kept.
"""

from __future__ import annotations

from typing import NamedTuple

from gateway.flowcontrol.fairqueue.types import Agent, AgentId, Iterations, KvTokenIterations


class _Reservation(NamedTuple):
    agent: Agent
    tokens: float
    since: Iterations
    until: Iterations


class Reservations:
    """At most one for each agent. Tokens of KV, over iterations of the service clock."""

    def __init__(self) -> None:
        self._by_agent: dict[AgentId, _Reservation] = {}

    def __len__(self) -> int:
        return len(self._by_agent)

    def make(self, now: Iterations, agent: Agent, tokens: float, iterations: float) -> None:
        """A new reservation, in place of an earlier one. One for no iterations changes nothing."""
        if iterations > 0:
            self._by_agent[agent.id] = _Reservation(agent, tokens, now, Iterations(now + iterations))

    def end(self, now: Iterations, agent: Agent) -> KvTokenIterations:
        """The agent's KV is in use again. Returns what it cost to keep it; 0 if none was kept."""
        reservation = self._by_agent.pop(agent.id, None)
        if reservation is None:
            return KvTokenIterations(0.0)
        iterations = min(now, reservation.until) - reservation.since
        return KvTokenIterations(reservation.tokens * max(0.0, iterations))

    def drop(self, agent_id: AgentId) -> None:
        """The agent has ended. Nothing happens if nothing is kept for it."""
        self._by_agent.pop(agent_id, None)

    def clear(self) -> None:
        self._by_agent.clear()

    def kept_from(self, now: Iterations, agent: Agent, room: float) -> float:
        """Tokens that are kept for earlier agents of this agent's tenant. The sum stops once it fills the room."""
        tokens = 0.0
        for reservation in self._by_agent.values():
            other = reservation.agent
            if (
                reservation.until > now
                and other.tenant is agent.tenant
                and other is not agent
                and other.finish_tag < agent.finish_tag
            ):
                tokens += reservation.tokens
                if tokens >= room:
                    break
        return tokens
