"""The endpoints that operators use: is it alive, is it ready, what does it measure, who is in the queue."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.capacity import EngineView
from gateway.fairness import Agent
from gateway.feedback import AgentRecord
from gateway.parts import Parts


def operation_routes(parts: Parts, *, version: str) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """200 for as long as the gateway itself lives."""
        return {
            "status": "draining" if parts.dispatcher.draining else "ok",
            "engine": "up" if parts.engine.up else "down",
            "link": _link(parts.engine),
            "capacity_tokens": parts.engine.capacity_tokens,
            "policy": parts.settings.policy,
            "version": version,
        }

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """200 when a task that comes now would be served, else 503."""
        is_ready = parts.engine.up and not parts.dispatcher.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        _refresh(parts)
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/agents")
    async def agents() -> dict[str, Any]:
        """Those that have not ended: waiting ones first, in the order in which they will be served."""
        waiting = [agent.id for agent in parts.queue.in_order()]
        position = {agent_id: place for place, agent_id in enumerate(waiting)}
        records = sorted(
            parts.feedback.records.values(), key=lambda r: (position.get(r.id, len(position)), r.first_arrival_s)
        )
        data = [_view(parts, record, parts.queue.agents.get(record.id), position.get(record.id)) for record in records]
        return {"object": "list", "virtual_time": parts.queue.virtual_time(), "data": data}

    return router


def _link(engine: EngineView) -> str:
    if not engine.linked:
        return "none"
    return "reporting" if engine.up and engine.reporting else "silent"


def _state(agent: Agent | None) -> str:
    if agent is None or not agent.busy:
        return "idle"
    return "waiting" if agent.waiting else "running"


def _view(parts: Parts, record: AgentRecord, agent: Agent | None, position: int | None) -> dict[str, Any]:
    """Costs in KV token·iterations, tags in token·iterations per unit of weight."""
    view: dict[str, Any] = {
        "object": "agent",
        "id": record.name,
        "source": record.source,
        "class": record.agent_class,
        "tenant": record.tenant,
        "state": _state(agent),
        "final": record.final,
        "tasks": {"arrived": record.tasks_arrived, "waiting": 0, "in_flight": 0, "ended": len(record.tasks)},
        "position": position,
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


def _refresh(parts: Parts) -> None:
    """Gauges are read off at the time of the scrape."""
    queue, engine = parts.queue, parts.engine
    parts.metrics.queue_is(
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        predicted_tokens=queue.peak_tokens,
        virtual_time=queue.virtual_time(),
    )
    states = [_state(queue.agents.get(agent_id)) for agent_id in parts.feedback.records]
    parts.metrics.agents_are(
        waiting=states.count("waiting"), running=states.count("running"), idle=states.count("idle")
    )
    parts.metrics.model_failed(parts.learning.new_failures())
    accuracy = parts.accuracy
    serves = parts.learning.serves
    parts.metrics.predictions_are(
        below_p90=accuracy.share_below_p90(),
        order=accuracy.order(),
        error=accuracy.error()[1],
        model_error=math.nan if serves is None else accuracy.error(serves.name)[1],
    )
    parts.metrics.engine_is(
        up=engine.up,
        link_up=_link(engine) == "reporting",
        running=engine.running,
        waiting=engine.waiting,
        held_tokens=engine.held_tokens,
        kept_tokens=engine.kept_tokens,
        capacity_tokens=engine.capacity_tokens,
        iterations=engine.iterations,
    )
