"""The endpoints of live agents: their place in the queue, predicted cost and estimated finish, and a way to end one.

A tenant sees its own agents. For another tenant's agent the answer is 404, as for one that never existed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from gateway.errors import AgentCancelled, NotFound
from gateway.fairness import Agent, AgentId, TenantId
from gateway.own_routes import caller, own_routes
from gateway.parts import Parts
from gateway.record import AgentRecord, agent_id_of
from gateway.tenants import Tenant

# Seconds that the tasks of an agent that is ended are given to break off, before its end is answered for.
END_S = 5.0


def agent_routes(parts: Parts) -> APIRouter:
    router = own_routes(parts.observer)

    @router.get("/v1/agents")
    async def agents(request: Request) -> dict[str, Any]:
        """Waiting ones first, in the order in which they will be served."""
        who = caller(request, parts.tenants)
        sees_all = parts.tenants.sees_all(who)
        records = [r for r in parts.feedback.records.values() if sees_all or r.tenant == who.name]
        return {
            "object": "list",
            "virtual_time": parts.queue.virtual_time(TenantId(who.name)),
            "data": _views(parts, records),
        }

    @router.get("/v1/agents/{name:path}")
    async def agent(request: Request, name: str, tenant: str | None = None) -> dict[str, Any]:
        """tenant: whose it is, for those who see all."""
        (view,) = _views(parts, [_find(parts, caller(request, parts.tenants), name, tenant)])
        return view

    @router.delete("/v1/agents/{name:path}", responses={202: {"description": "Some of its tasks have not ended yet."}})
    async def end_agent(request: Request, name: str, tenant: str | None = None) -> JSONResponse:
        """Its tasks are broken off, waiting and in flight, and are charged what they held. 202 if they take their time. A task
        that comes later begins a new agent."""
        record = _find(parts, caller(request, parts.tenants), name, tenant)
        ends = parts.dispatcher.abort(record.id, AgentCancelled("the agent of this task was ended"))
        parts.feedback.dismissed(record)
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


def _find(parts: Parts, who: Tenant, name: str, tenant: str | None) -> AgentRecord:
    """Raises `NotFound`."""
    whose = who.name if tenant is None else tenant
    if whose == who.name or parts.tenants.sees_all(who):
        record = parts.feedback.records.get(agent_id_of(whose, name))
        if record is not None:
            return record
    raise NotFound(f"there is no agent {name[:255]!r}")


def _views(parts: Parts, records: Iterable[AgentRecord]) -> list[dict[str, Any]]:
    waiting = list(parts.queue.in_order())
    places = {agent.id: place for place, agent in enumerate(waiting)}
    finishes = estimated_finishes(parts.queue.agents.values(), waiting, parts.dispatcher.rate.per_s())
    in_order = sorted(records, key=lambda record: (places.get(record.id, len(places)), record.first_arrival_s))
    return [_view(parts, record, places.get(record.id), finishes.get(record.id)) for record in in_order]


def _view(parts: Parts, record: AgentRecord, position: int | None, estimated_finish_s: float | None) -> dict[str, Any]:
    """Costs in KV token·iterations, tags in token·iterations per unit of weight. position: among all that wait."""
    agent = parts.queue.agents.get(record.id)
    view: dict[str, Any] = {
        "object": "agent",
        "id": record.name,
        "source": record.source,
        "class": record.agent_class,
        "tenant": record.tenant,
        "state": state_of(agent),
        "final": record.final,
        "tasks": {"arrived": record.tasks_arrived, "waiting": 0, "in_flight": 0, "ended": len(record.tasks)},
        "position": position,
        "estimated_finish_s": estimated_finish_s,
        "observed_cost": sum(task.cost for task in record.tasks),
        "held_tokens": parts.engine.agents.get(record.id, 0.0),
    }
    if agent is not None:
        view["tasks"] |= {"waiting": len(agent.waiting), "in_flight": len(agent.in_flight)}
        view |= {
            "weight": agent.weight,
            "predicted_cost": agent.predicted,
            "predicted_p90": None if record.prediction is None else max(record.prediction.p90, agent.predicted),
            "predicted_by": None if record.prediction is None else record.prediction.source,
            "arrived_cost": agent.arrived,
            "finish_tag": agent.finish_tag,
            "backlog_tag": parts.queue.backlog_tag(agent.id),
        }
    return view
