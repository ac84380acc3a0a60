"""The order of service: tenants by their next agents, the agents of a tenant by rank, and the tasks of an agent.

Each tenant orders its waiting agents by the policy's rank. Tenants are ordered by their first agent. If the policy is nested,
the key is the outer virtual time at which the reference will have done that agent's work for the tenant (agents are its
packets); if it is not, tenants do not count, and the key is the agent's rank. Either way the first agent of the first tenant
is the next. With one tenant the outer level vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gateway.flowcontrol.fairqueue.order import Order, Place
from gateway.flowcontrol.fairqueue.policies import Policy
from gateway.flowcontrol.fairqueue.types import Agent, AgentId, Flight, Release, Task, Tenant, TenantId


class Ranking:
    """What waits, in order, and the ranks of what is in flight."""

    def __init__(self, policy: Policy, agents: Mapping[AgentId, Agent]) -> None:
        self.policy = policy
        self._agents = agents  # all known agents: the queue's own table
        self._tenants: dict[TenantId, Tenant] = {}
        self._order: Order[TenantId] = Order()  # tenants with waiting tasks; used only while there are several tenants
        self._revised: set[AgentId] = set()  # agents with tasks in flight whose rank may have changed

    def tenant(self, tenant_id: TenantId, seq: int) -> Tenant:
        """The tenant, made if it is unknown: then `seq` is its place in the order of arrival."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = self._tenants[tenant_id] = Tenant(tenant_id, seq, 1.0)
            if len(self._tenants) == 2:  # until now there was no order among them
                for known in self._tenants.values():
                    self._place_tenant(known)
                self._revised.update(self._agents)
        return tenant

    def weigh(self, tenant: Tenant, weight: float) -> None:
        """Set the tenant's weight, from now on."""
        if weight != tenant.weight:
            tenant.weight = weight
            if self.policy.revised and len(self._tenants) > 1:
                self._revised.update(agent.id for agent in self._agents.values() if agent.tenant is tenant)

    def wait(self, agent: Agent, task: Task) -> None:
        """Queue one more task of this agent."""
        agent.waiting[task.id] = task
        if agent.order is not None:
            agent.order.put(task.id, self._task_place(task))
        elif len(agent.waiting) > 1:  # one task needs no order, and most agents have no more
            self._order_tasks(agent)

    def place(self, agent: Agent) -> None:
        """Move the agent, and its tenant, to where they now belong."""
        head = agent.head()
        if head is None:
            agent.tenant.order.remove(agent.id)
        else:
            agent.tenant.order.put(agent.id, (self.policy.rank(agent, head), agent.seq))
        if len(self._tenants) > 1:
            self._place_tenant(agent.tenant)

    def first(self) -> Agent | None:
        """The agent that goes next; None if no task waits."""
        tenant_id = self._order.first() if len(self._tenants) > 1 else next(iter(self._tenants), None)
        agent_id = self._tenants[tenant_id].order.first() if tenant_id is not None else None
        return None if agent_id is None else self._agents[agent_id]

    def least(self) -> float | None:
        """The policy's rank of the agent that goes next; None if no task waits."""
        first = self.first()
        return None if first is None else first.tenant.order.place(first.id)[0]

    def in_order(self) -> Iterator[Agent]:
        """The agents with waiting tasks, the next one first. O(N log N): for reports, not for decisions."""
        turns: list[tuple[tuple[float, int, int], Agent]] = []
        for tenant in self._tenants.values():
            tag: float = tenant.start_tag
            for number, agent_id in enumerate(tenant.order):
                agent = self._agents[agent_id]
                tag += agent.left_to_release / tenant.weight
                nested = (tag, tenant.seq, number)
                turns.append((nested if self.policy.nested else (*tenant.order.place(agent_id), 0), agent))
        return (agent for _, agent in sorted(turns, key=lambda turn: turn[0]))

    def rank(self, agent: Agent) -> float:
        """The rank that the engine is to order by, of the agent that goes next: that of the outermost level that counts."""
        level = self._order.place(agent.tenant.id) if len(self._tenants) > 1 else agent.tenant.order.place(agent.id)
        return level[0]

    # What is in flight

    def moved(self, agent: Agent) -> None:
        """More is known of this agent than when its tasks in flight were released."""
        if self.policy.revised and agent.in_flight:
            self._revised.add(agent.id)

    def forget(self, agent: Agent) -> None:
        self._revised.discard(agent.id)

    def change_policy(self, policy: Policy) -> None:
        """Order what waits by this policy, and give what is in flight the rank that this policy would give it."""
        self.policy = policy
        policy.begin(self._agents.values())
        for agent in self._agents.values():
            if agent.order is not None:
                self._order_tasks(agent)
            self.place(agent)
            for flight in agent.in_flight.values():
                flight.lasting_rank = policy.rank(agent, flight.task)
        self._revised.update(self._agents)

    def revise(self) -> list[Release]:
        """In-flight tasks whose rank has changed since the engine last received it; marks them as sent."""
        revised: list[Release] = []
        for agent_id in self._revised:
            agent = self._agents.get(agent_id)
            for flight in agent.in_flight.values() if agent is not None else ():
                assert agent is not None
                rank = self._rank_in_flight(agent, flight)
                if rank != flight.rank:
                    flight.rank = rank
                    revised.append(Release(flight.task, rank))
        self._revised.clear()
        return revised

    def _rank_in_flight(self, agent: Agent, flight: Flight) -> float:
        """The rank that the task would have been released with, had it been known then what is known now."""
        if not self.policy.revised:
            return flight.lasting_rank
        if len(self._tenants) == 1:
            return self.policy.rank(agent, flight.task)
        return flight.tenant_tag + max(0.0, agent.predicted - flight.agent_released) / agent.tenant.weight

    def _order_tasks(self, agent: Agent) -> None:
        agent.order = Order()
        for task in agent.waiting.values():
            agent.order.put(task.id, self._task_place(task))

    def _task_place(self, task: Task) -> Place:
        return self.policy.task_rank(task), task.id

    def _place_tenant(self, tenant: Tenant) -> None:
        first = tenant.order.first()
        if first is None:
            self._order.remove(tenant.id)
        else:
            self._order.put(tenant.id, self._turn(tenant, first))

    def _turn(self, tenant: Tenant, first: AgentId) -> Place:
        if not self.policy.nested:
            return tenant.order.place(first)
        return tenant.start_tag + self._agents[first].left_to_release / tenant.weight, tenant.seq
