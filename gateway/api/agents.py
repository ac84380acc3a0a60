"""The endpoints of live agents: their place in the queue, predicted cost and estimated finish, and a way to end one.

A tenant sees its own agents. For another tenant's agent the answer is 404, as for one that never existed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from gateway.api.instrumented import caller, own_routes
from gateway.flowcontrol import FlowController, LiveAgent, agent_id_of
from gateway.flowcontrol.fairqueue import Agent, AgentId, TenantId
from gateway.protocol.errors import AgentCancelled, NotFound
from gateway.relay.dispatcher import Dispatcher
from gateway.telemetry.request_span import Observer
from gateway.tenancy.tenants import Tenant, Tenants

# Seconds that the tasks of an agent that is ended are given to break off, before its end is answered for.
END_S = 5.0


def agent_routes(dispatcher: Dispatcher, tenants: Tenants, observer: Observer) -> APIRouter:
    router, flow = own_routes(observer), dispatcher.flow

    @router.get("/v1/agents")
    async def agents(request: Request) -> dict[str, Any]:
        """Waiting ones first, in the order in which they will be served."""
        tenant = caller(request, tenants)
        sees_all = tenants.sees_all(tenant)
        seen = [agent for agent in flow.agents if sees_all or agent.record.tenant == tenant.name]
        return {
            "object": "list",
            "virtual_time": flow.queue.virtual_time(TenantId(tenant.name)),
            "data": _views(flow, seen),
        }

    @router.get("/v1/agents/{name:path}")
    async def agent(request: Request, name: str, tenant: str | None = None) -> dict[str, Any]:
        """tenant: of the agent, for callers that see all."""
        (view,) = _views(flow, [_find(flow, tenants, caller(request, tenants), name, tenant)])
        return view

    @router.delete("/v1/agents/{name:path}", responses={202: {"description": "Some of its tasks have not ended yet."}})
    async def end_agent(request: Request, name: str, tenant: str | None = None) -> JSONResponse:
        """Its tasks are broken off, waiting and in flight, and are charged what they held. 202 if they take their time. A task
        that comes later begins a new agent."""
        found = _find(flow, tenants, caller(request, tenants), name, tenant)
        ends = dispatcher.end_agent(found, AgentCancelled("the agent of this task was ended"))
        if ends:
            await asyncio.wait(ends, timeout=END_S)
        has_ended = all(end.done() for end in ends)
        answer = {"object": "agent.deleted", "id": name, "deleted": has_ended, "tasks_cancelled": len(ends)}
        return JSONResponse(answer, 200 if has_ended else 202)

    return router


def state_of(agent: Agent | None) -> str:
    if agent is None or not agent.busy:
        return "idle"
    return "waiting" if agent.waiting else "running"


def estimated_finishes(
    agents: Collection[Agent], in_order: Iterable[Agent], work_per_s: float | None
) -> dict[AgentId, float]:
    """Seconds until each busy agent should have finished; empty while the engine's speed is unknown. in_order: the agents that
    wait, as `FairQueue.in_order` returns them.

    The estimate is the work before and beside the agent, and its own, over the KV token·iterations a second that the engine
    has done lately: what is left of all tasks in flight, and what is predicted but not yet released of the agents that go
    before it, and of itself. Later arrivals that will go first do not count, nor do waits for tools; a small agent beside
    large ones ends sooner. So it is a guess, not a promise: the bound is another matter.
    """
    if work_per_s is None:
        return {}
    beside = sum(
        max(0.0, flight.task.cost - flight.attained) for agent in agents for flight in agent.in_flight.values()
    )
    finishes: dict[AgentId, float] = {}
    before = 0.0
    for agent in in_order:
        before += agent.left_to_release
        finishes[agent.id] = (beside + before) / work_per_s
    for agent in agents:
        if agent.in_flight and not agent.waiting:
            finishes[agent.id] = (beside + agent.left_to_release) / work_per_s
    return finishes


def _find(flow: FlowController, tenants: Tenants, caller: Tenant, name: str, tenant: str | None) -> LiveAgent:
    """Raises `NotFound`."""
    owner = caller.name if tenant is None else tenant
    if owner == caller.name or tenants.sees_all(caller):
        agent = flow.agents.by_id.get(agent_id_of(owner, name))
        if agent is not None:
            return agent
    raise NotFound(f"there is no agent {name[:255]!r}")


def _views(flow: FlowController, agents: Iterable[LiveAgent]) -> list[dict[str, Any]]:
    waiting = list(flow.queue.in_order())
    places = {agent.id: place for place, agent in enumerate(waiting)}
    finishes = estimated_finishes(flow.queue.agents.values(), waiting, flow.engine.rate.per_s())
    in_order = sorted(agents, key=lambda agent: (places.get(agent.id, len(places)), agent.first_arrival_s))
    return [_view(flow, agent, places.get(agent.id), finishes.get(agent.id)) for agent in in_order]


def _view(
    flow: FlowController, live: LiveAgent, position: int | None, estimated_finish_s: float | None
) -> dict[str, Any]:
    """Costs in KV token·iterations, tags in token·iterations per unit of weight. position: among all that wait."""
    agent, record = flow.queue.agents[live.id], live.record
    prediction = record.prediction
    return {
        "object": "agent",
        "id": record.name,
        "source": record.source,
        "class": record.agent_class,
        "tenant": record.tenant,
        "state": state_of(agent),
        "final": record.final,
        "tasks": {
            "arrived": live.arrived,
            "waiting": len(agent.waiting),
            "in_flight": len(agent.in_flight),
            "ended": record.settled,
        },
        "position": position,
        "estimated_finish_s": estimated_finish_s,
        "observed_cost": live.cost_ended,
        "held_tokens": flow.engine.agents.get(live.id, 0.0),
        "weight": agent.weight,
        "predicted_cost": agent.predicted,
        "predicted_p90": None if prediction is None else max(prediction.p90, agent.predicted),
        "predicted_by": None if prediction is None else prediction.source,
        "arrived_cost": agent.arrived,
        "finish_tag": agent.finish_tag,
        "backlog_tag": flow.queue.backlog_tag(agent.id),
    }
