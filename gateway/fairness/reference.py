"""The fluid reference: what each agent would have been given by ideal fair sharing.

`advance(now)` is the only way that virtual time moves, but for `end_busy_period`. An agent leaves the backlogged set when V
reaches its backlog tag B, whatever the real engine has done; to remove it when it really finishes would let V run fast and
give later arrivals tags that are too late.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from gateway.fairness.types import AgentId, Iterations, KvTokenIterations, QueueError, VirtualTime


@dataclass(slots=True)
class _Flow:
    agent_id: AgentId
    weight: float
    backlog_tag: VirtualTime
    backlogged: bool = False
    forgotten: bool = False  # ended, and kept only until V has reached its end


class Reference:
    """GPS over agents. Costs in token·iterations, time in engine iterations, capacity M in tokens."""

    def __init__(self) -> None:
        self.virtual_time = VirtualTime(0.0)
        self.now = Iterations(0.0)
        self._capacity_tokens = 0.0
        self._backlogged = 0  # how many, and their weights
        self._backlogged_weight = 0.0
        self._flows: dict[AgentId, _Flow] = {}
        self._ends: list[tuple[float, AgentId]] = []  # heap of (B, agent); an entry whose B has moved is skipped

    def advance(self, now: Iterations) -> None:
        """Bring V up to `now`. Between two agents' ends V is a straight line of slope M / Σ w."""
        if now < self.now:
            raise QueueError(f"the service clock went back from {self.now} to {now}")
        left = now - self.now
        while left > 0 and (end := self._next_end()) is not None and self._capacity_tokens > 0:
            slope = self._capacity_tokens / self._backlogged_weight
            until_end = (end.backlog_tag - self.virtual_time) / slope
            if until_end > left:
                self.virtual_time = VirtualTime(self.virtual_time + left * slope)
                break
            left -= until_end
            self.virtual_time = end.backlog_tag
            self._go_idle(end)
        self.now = now

    def set_capacity(self, tokens: float) -> None:
        """M from now on, in tokens. With 0 (an engine not yet known) V stands still."""
        if not tokens >= 0:
            raise QueueError(f"capacity must be at least 0 tokens, not {tokens}")
        self._capacity_tokens = tokens

    def arrive(self, agent_id: AgentId, cost: KvTokenIterations, weight: float) -> None:
        """Work that has just arrived. An agent that was idle here starts at V."""
        flow = self._flows.get(agent_id)
        if flow is None:
            flow = self._flows[agent_id] = _Flow(agent_id, weight, self.virtual_time)
        flow.forgotten = False
        if not flow.backlogged:
            flow.weight = weight
            flow.backlog_tag = self.virtual_time
        elif flow.weight != weight:
            unserved = (flow.backlog_tag - self.virtual_time) * flow.weight
            self._backlogged_weight += weight - flow.weight
            flow.weight = weight
            flow.backlog_tag = VirtualTime(self.virtual_time + unserved / weight)
        self._move(flow, cost)

    def correct(self, agent_id: AgentId, difference: KvTokenIterations) -> None:
        """A cost turned out to be larger (or, negative, smaller) than it was said to be at its arrival."""
        self._move(self._flows[agent_id], difference)

    def backlog_tag(self, agent_id: AgentId) -> VirtualTime:
        """B; for an agent that is not known, V: nothing of it is left to serve."""
        flow = self._flows.get(agent_id)
        return flow.backlog_tag if flow else self.virtual_time

    def is_backlogged(self, agent_id: AgentId) -> bool:
        flow = self._flows.get(agent_id)
        return flow is not None and flow.backlogged

    def forget(self, agent_id: AgentId) -> None:
        """Drop an agent that has ended: at once if it is idle here, else when V reaches its end."""
        flow = self._flows.get(agent_id)
        if flow is None:
            return
        if flow.backlogged:
            flow.forgotten = True
        else:
            del self._flows[agent_id]

    def end_busy_period(self) -> None:
        """Nothing waits and nothing is in flight: all work is done, so V moves to the largest B."""
        while (end := self._next_end()) is not None:
            self.virtual_time = end.backlog_tag
            self._go_idle(end)

    def _move(self, flow: _Flow, cost: KvTokenIterations) -> None:
        flow.backlog_tag = VirtualTime(flow.backlog_tag + cost / flow.weight)
        if flow.backlog_tag > self.virtual_time:
            if not flow.backlogged:
                flow.backlogged = True
                self._backlogged += 1
                self._backlogged_weight += flow.weight
            heapq.heappush(self._ends, (flow.backlog_tag, flow.agent_id))
            if len(self._ends) > 64 + 4 * len(self._flows):  # each move leaves a stale entry behind
                self._ends = [(other.backlog_tag, other.agent_id) for other in self._flows.values() if other.backlogged]
                heapq.heapify(self._ends)
        elif flow.backlogged:
            self._go_idle(flow)

    def _next_end(self) -> _Flow | None:
        """The backlogged agent whose end comes first."""
        while self._ends:
            tag, agent_id = self._ends[0]
            flow = self._flows.get(agent_id)
            if flow is not None and flow.backlogged and flow.backlog_tag == tag:
                return flow
            heapq.heappop(self._ends)
        return None

    def _go_idle(self, flow: _Flow) -> None:
        flow.backlogged = False
        self._backlogged -= 1
        # Exactly zero when nobody is left, whatever rounding did.
        self._backlogged_weight = self._backlogged_weight - flow.weight if self._backlogged else 0.0
        if flow.forgotten:
            del self._flows[flow.agent_id]
