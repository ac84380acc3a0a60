"""The fluid reference: the service that each flow would have had under ideal fair sharing.

Only `advance` and `end_busy_period` move virtual time. A flow leaves the backlogged set when V reaches its backlog tag B,
whatever the real engine has done: removing it when it really finishes would let V run too fast, and give later arrivals
tags that are too late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.flowcontrol.fairqueue.order import Order
from gateway.flowcontrol.fairqueue.types import Iterations, KvTokenIterations, QueueError, VirtualTime

FlowId = TypeVar("FlowId", bound=str)


@dataclass(slots=True)
class _Flow:
    weight: float
    backlog_tag: VirtualTime
    backlogged: bool = False
    forgotten: bool = False  # ended, and kept only until V reaches B


class Reference(Generic[FlowId]):
    """GPS (generalized processor sharing) over flows. Costs in token·iterations, time in engine iterations, M in tokens."""

    def __init__(self, capacity_tokens: float = 0.0) -> None:
        self.virtual_time = VirtualTime(0.0)
        self.now = Iterations(0.0)
        self._capacity_tokens = capacity_tokens
        self._backlogged_weight = 0.0  # sum over the backlogged flows
        self._flows: dict[FlowId, _Flow] = {}
        self._ends: Order[FlowId] = Order()  # the backlogged flows, by B

    def advance(self, now: Iterations) -> None:
        """Bring V up to `now`. Between the ends of two flows V is a straight line of slope M / Σ w. Raises `QueueError`, and
        changes nothing, if `now` goes back."""
        if not now >= self.now:
            raise QueueError(f"the service clock went back from {self.now} to {now}")
        left = now - self.now
        while left > 0 and (first := self._ends.first()) is not None and self._capacity_tokens > 0:
            end = self._flows[first].backlog_tag
            slope = self._capacity_tokens / self._backlogged_weight
            if not slope:
                break  # so small that it rounds to 0
            until_end = (end - self.virtual_time) / slope
            if until_end > left:
                self.virtual_time = VirtualTime(self.virtual_time + left * slope)
                break
            left -= until_end
            self.virtual_time = end
            self._go_idle(first)
        self.now = now

    def set_capacity(self, tokens: float) -> None:
        """M from now on, in tokens. With 0 (the engine is not yet known) V stands still."""
        if not tokens >= 0:
            raise QueueError(f"capacity must be at least 0 tokens, not {tokens}")
        self._capacity_tokens = tokens

    def arrive(self, flow_id: FlowId, cost: KvTokenIterations, weight: float) -> None:
        """Work that has just arrived. A flow that was idle here starts at V."""
        flow = self._flows.get(flow_id)
        if flow is None:
            flow = self._flows[flow_id] = _Flow(weight, self.virtual_time)
        flow.forgotten = False
        if not flow.backlogged:
            flow.weight = weight
            flow.backlog_tag = self.virtual_time
        elif flow.weight != weight:
            unserved = (flow.backlog_tag - self.virtual_time) * flow.weight
            self._backlogged_weight += weight - flow.weight
            flow.weight = weight
            flow.backlog_tag = VirtualTime(self.virtual_time + unserved / weight)
        self._move(flow_id, flow, cost)

    def restore(self, flow_id: FlowId, weight: float) -> None:
        """A flow that was here before, with nothing left to serve: B = V. It counts as idle from now on."""
        flow = self._flows.setdefault(flow_id, _Flow(weight, self.virtual_time))
        flow.forgotten = False

    def correct(self, flow_id: FlowId, difference: KvTokenIterations) -> KvTokenIterations:
        """A cost turned out to be larger (or, negative, smaller) than was predicted at its arrival. Returns the change in the
        work that is left to serve."""
        flow = self._flows[flow_id]
        before = max(0.0, flow.backlog_tag - self.virtual_time)
        self._move(flow_id, flow, difference)
        after = max(0.0, flow.backlog_tag - self.virtual_time)
        return KvTokenIterations((after - before) * flow.weight)

    def backlog_tag(self, flow_id: FlowId) -> VirtualTime:
        """B; for an unknown flow V, since nothing of it is left to serve."""
        flow = self._flows.get(flow_id)
        return flow.backlog_tag if flow else self.virtual_time

    def is_backlogged(self, flow_id: FlowId) -> bool:
        flow = self._flows.get(flow_id)
        return flow is not None and flow.backlogged

    def forget(self, flow_id: FlowId) -> None:
        """Drop a flow that has ended: at once if it is idle here, else when V reaches B."""
        flow = self._flows.get(flow_id)
        if flow is None:
            return
        if flow.backlogged:
            flow.forgotten = True
        else:
            del self._flows[flow_id]

    def end_busy_period(self) -> None:
        """No task waits or is in flight: all work is done, so V moves to the largest B."""
        while (first := self._ends.first()) is not None:
            self.virtual_time = self._flows[first].backlog_tag
            self._go_idle(first)

    def _move(self, flow_id: FlowId, flow: _Flow, cost: KvTokenIterations) -> None:
        flow.backlog_tag = VirtualTime(flow.backlog_tag + cost / flow.weight)
        if flow.backlog_tag > self.virtual_time:
            if not flow.backlogged:
                flow.backlogged = True
                self._backlogged_weight += flow.weight
            self._ends.put(flow_id, (flow.backlog_tag, 0))
        elif flow.backlogged:
            self._go_idle(flow_id)

    def _go_idle(self, flow_id: FlowId) -> None:
        flow = self._flows[flow_id]
        flow.backlogged = False
        self._ends.remove(flow_id)
        before = self._backlogged_weight
        self._backlogged_weight = before - flow.weight
        if self._backlogged_weight <= 1e-9 * before:  # rounding may have left a little
            self._backlogged_weight = sum((self._flows[other].weight for other in self._ends), 0.0)
        if flow.forgotten:
            del self._flows[flow_id]
