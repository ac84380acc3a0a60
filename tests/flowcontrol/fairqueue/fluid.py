"""Independent fluid GPS simulators: the oracles. Naive on purpose: steps of exact length, no heap, no tags.

They know only how much work each agent has left, and serve all backlogged agents at once in proportion to their weights.
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


@dataclass
class FluidTenants:
    """Two levels: tenants share the capacity, and each tenant's agents what it is given. Agents are named within a tenant."""

    capacity: Fraction
    now: Fraction = Fraction(0)
    left: dict[tuple[str, str], Fraction] = field(default_factory=dict)  # by tenant and agent
    weights: dict[tuple[str, str], Fraction] = field(default_factory=dict)
    tenant_weights: dict[str, Fraction] = field(default_factory=dict)
    served_per_weight: dict[str, Fraction] = field(default_factory=dict)  # of each tenant's agents
    finished: dict[tuple[str, str], Fraction] = field(default_factory=dict)

    def arrive(
        self,
        tenant: str,
        agent: str,
        work: Fraction,
        weight: Fraction = Fraction(1),
        tenant_weight: Fraction = Fraction(1),
    ) -> None:
        self.left[tenant, agent] = self.left.get((tenant, agent), Fraction(0)) + work
        self.weights[tenant, agent] = weight
        self.tenant_weights[tenant] = tenant_weight
        self.served_per_weight.setdefault(tenant, Fraction(0))

    def correct(self, tenant: str, agent: str, difference: Fraction) -> None:
        """More work, or less. What has been served stays served."""
        self.left[tenant, agent] = max(Fraction(0), self.left[tenant, agent] + difference)

    def run_until(self, then: Fraction) -> None:
        while self.now < then:
            backlogged = [key for key, work in self.left.items() if work > 0]
            if not backlogged:
                self.now = then
                return
            tenants = {tenant for tenant, _ in backlogged}
            of_all = sum(self.tenant_weights[tenant] for tenant in tenants)
            slopes = {}  # of the virtual time of each tenant's agents
            for tenant in tenants:
                of_tenant = sum(self.weights[key] for key in backlogged if key[0] == tenant)
                slopes[tenant] = self.capacity * self.tenant_weights[tenant] / of_all / of_tenant
            rates = {key: slopes[key[0]] * self.weights[key] for key in backlogged}
            step = min(then - self.now, *(self.left[key] / rate for key, rate in rates.items()))
            self.now += step
            for tenant, slope in slopes.items():
                self.served_per_weight[tenant] += slope * step
            for key, rate in rates.items():
                self.left[key] -= rate * step
                if self.left[key] == 0:
                    self.finished[key] = self.now
