"""The reference of two levels: tenants share the engine by weight, and each tenant's agents share what the tenant gets.

Each level is a `Reference`. The clock of a tenant's reference is the work done for the tenant, and its capacity is one: so its
V is again work per unit of weight, and with one tenant it is that of a reference without levels. A tenant is brought up to
date when it is used; in between, its share of the engine is a straight line in the outer virtual time. Tenants are few
(an API key each), and never forgotten.

Bennett and Zhang, Hierarchical packet fair queueing algorithms, 1996.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.flowcontrol.fairqueue.reference import Reference
from gateway.flowcontrol.fairqueue.types import AgentId, Iterations, KvTokenIterations, TenantId, VirtualTime


@dataclass(slots=True)
class _Share:
    weight: float
    counted: VirtualTime  # outer virtual time up to which `agents` has been advanced
    agents: Reference[AgentId] = field(default_factory=lambda: Reference(capacity_tokens=1.0))


class NestedReference:
    """Costs in token·iterations, time in engine iterations, capacity M in tokens."""

    def __init__(self) -> None:
        self._tenants: Reference[TenantId] = Reference()
        self._shares: dict[TenantId, _Share] = {}

    @property
    def now(self) -> Iterations:
        return self._tenants.now

    @property
    def outer_virtual_time(self) -> VirtualTime:
        """V of the tenants."""
        return self._tenants.virtual_time

    def advance(self, now: Iterations) -> None:
        self._tenants.advance(now)

    def set_capacity(self, tokens: float) -> None:
        self._tenants.set_capacity(tokens)

    def virtual_time(self, tenant_id: TenantId) -> VirtualTime:
        """V of the tenant's agents; 0 for an unknown tenant."""
        return self._agents(tenant_id).virtual_time if tenant_id in self._shares else VirtualTime(0.0)

    def arrive(
        self, tenant_id: TenantId, agent_id: AgentId, cost: KvTokenIterations, weight: float, tenant_weight: float
    ) -> None:
        """Work that has just arrived. An idle agent, and an idle tenant, starts at V of its level."""
        self._known(tenant_id, tenant_weight).arrive(agent_id, cost, weight)
        self._owe(tenant_id, cost, tenant_weight)

    def restore(self, tenant_id: TenantId, agent_id: AgentId, weight: float, tenant_weight: float) -> None:
        """An agent that was here before, with nothing left to serve."""
        self._known(tenant_id, tenant_weight).restore(agent_id, weight)

    def correct(self, tenant_id: TenantId, agent_id: AgentId, difference: KvTokenIterations) -> None:
        """A cost turned out to be larger or smaller. The tenant is refunded the work that was not yet done for its agent."""
        change = self._agents(tenant_id).correct(agent_id, difference)
        if change > 0:
            self._owe(tenant_id, change, self._shares[tenant_id].weight)
        elif change < 0:
            self._tenants.correct(tenant_id, change)

    def backlog_tag(self, tenant_id: TenantId, agent_id: AgentId) -> VirtualTime:
        """B of an agent; V for an unknown one."""
        return self._agents(tenant_id).backlog_tag(agent_id) if tenant_id in self._shares else VirtualTime(0.0)

    def forget(self, tenant_id: TenantId, agent_id: AgentId) -> None:
        """An agent has ended. It counts until V has reached its end."""
        self._agents(tenant_id).forget(agent_id)

    def end_busy_period(self) -> None:
        """Nothing waits and nothing is in flight: all work is done, on both levels."""
        self._tenants.end_busy_period()

    def _known(self, tenant_id: TenantId, weight: float) -> Reference[AgentId]:
        if tenant_id not in self._shares:
            self._shares[tenant_id] = _Share(weight, self._tenants.virtual_time)
        return self._agents(tenant_id)

    def _agents(self, tenant_id: TenantId) -> Reference[AgentId]:
        """The reference of a tenant's agents, brought up to date."""
        share = self._shares[tenant_id]
        is_backlogged = self._tenants.is_backlogged(tenant_id)
        if is_backlogged and share.counted == self._tenants.virtual_time:
            return share.agents  # nothing has happened since
        reached = VirtualTime(min(self._tenants.virtual_time, self._tenants.backlog_tag(tenant_id)))
        if reached > share.counted:
            agents = share.agents
            agents.advance(Iterations(agents.now + (reached - share.counted) * share.weight))
            share.counted = reached
        if not is_backlogged:
            share.agents.end_busy_period()  # rounding may have left a little
        return share.agents

    def _owe(self, tenant_id: TenantId, work: KvTokenIterations, weight: float) -> None:
        share = self._shares[tenant_id]
        share.weight = weight
        self._tenants.arrive(tenant_id, work, weight)
        share.counted = self._tenants.virtual_time
