"""An independent fluid GPS simulator: the oracle. Naive on purpose: small steps of exact length, no heap, no tags.

It knows only how much work each agent has left, and serves all backlogged agents at once in proportion to their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction


@dataclass
class FluidGps:
    capacity: Fraction
    now: Fraction = Fraction(0)
    left: dict[str, Fraction] = field(default_factory=dict)  # work not yet served
    weights: dict[str, Fraction] = field(default_factory=dict)
    served_per_weight: Fraction = Fraction(0)  # what one unit of weight has been given: virtual time
    finished: dict[str, Fraction] = field(default_factory=dict)  # when each agent's work last ran out

    def arrive(self, agent: str, work: Fraction, weight: Fraction = Fraction(1)) -> None:
        self.left[agent] = self.left.get(agent, Fraction(0)) + work
        self.weights[agent] = weight

    def run_until(self, then: Fraction) -> None:
        while self.now < then:
            backlogged = [agent for agent, work in self.left.items() if work > 0]
            if not backlogged:
                self.now = then
                return
            rate = self.capacity / sum(self.weights[agent] for agent in backlogged)
            to_first_end = min(self.left[agent] / (rate * self.weights[agent]) for agent in backlogged)
            step = min(then - self.now, to_first_end)
            self.now += step
            self.served_per_weight += rate * step
            for agent in backlogged:
                self.left[agent] -= rate * self.weights[agent] * step
                if self.left[agent] == 0:
                    self.finished[agent] = self.now
