"""How long agents wait for their tools, by tenant and class: for as long is the KV of one that waits worth keeping.

What other tenants' agents do does not count, so no tenant can have another's KV let go.

Time is the service clock, in engine iterations: how often the engine will want the memory meanwhile is what counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from predictor.shares import Shares

# Of a class, the last waits; and classes of all tenants.
WAITS, CLASSES = 64, 1000
# A reservation is to save so many times what it costs: an iteration with half the tasks takes more than half as long.
MARGIN = 4.0
# The share of the waits that is waited for, and what is kept at most, and if nothing is known.
SHARE, LONGEST, UNKNOWN = 0.9, 20_000, 2_000


@dataclass(slots=True)
class _Class:
    """ends: whether agents that had nothing left to do came back, newest last."""

    waits: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS))
    came_back: deque[bool] = field(default_factory=lambda: deque(maxlen=WAITS))


class ToolWaits:
    """An agent that has nothing waiting and nothing at the engine either waits for its tool, or has ended."""

    def __init__(self) -> None:
        self._classes: Shares[str | None, _Class] = Shares(CLASSES)

    def came_back(self, tenant: str, agent_class: str | None, iterations: float) -> None:
        """An agent that was idle has work again, after so many iterations."""
        known = self._of(tenant, agent_class)
        known.waits.append(iterations)
        known.came_back.append(True)

    def ended(self, tenant: str, agent_class: str | None) -> None:
        """An agent that was idle has turned out to be done."""
        self._of(tenant, agent_class).came_back.append(False)

    def worth_keeping(self, tenant: str, agent_class: str | None) -> int:
        """Iterations for which to keep the KV of an agent that has just become idle: by when nine in ten came back, of those
        that did. 0 if most did not."""
        known = self._classes.get(tenant, agent_class)
        if known is None or not known.came_back:
            return UNKNOWN
        if 2 * sum(known.came_back) < len(known.came_back):
            return 0
        waits = sorted(known.waits)
        return min(LONGEST, 1 + int(waits[min(len(waits) - 1, int(SHARE * len(waits)))]))

    def worth_reserving(self, tenant: str, agent_class: str | None, refill_iterations: float) -> float:
        """Iterations for which to hold back memory from others for an agent that has just become idle. refill_iterations:
        what it takes to compute again as much as the whole cache holds.

        Held back for t, c tokens cost c·min(W, t) token·iterations of memory, and save c/M of a refill, in which the whole
        cache is busy, if the agent is back by then: c·refill. So it is the t with the largest
        refill/margin · P(W <= t) - E min(W, t), by the waits W that were seen; 0 if there is none above 0."""
        worth = refill_iterations / MARGIN
        known = self._classes.get(tenant, agent_class)
        if known is None or not known.waits:
            return 0.0
        back = sum(known.came_back) / len(known.came_back)
        waits = sorted(known.waits)
        best, horizon, before = 0.0, 0.0, 0.0
        for place, wait in enumerate(waits):
            seen = (place + 1) / len(waits)
            before += wait
            held = (before + wait * (len(waits) - place - 1)) / len(waits)
            # An agent that does not come back holds it to the end.
            gain = back * (worth * seen - held) - (1 - back) * wait
            if gain > best:
                best, horizon = gain, wait
        return horizon

    def _of(self, tenant: str, agent_class: str | None) -> _Class:
        known = self._classes.get(tenant, agent_class)
        if known is None:
            known = _Class()
            self._classes.put(tenant, agent_class, known)
        return known
