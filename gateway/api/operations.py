"""The endpoints that operators use: is it alive, is it ready, what does it measure."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.api.agents import state_of
from gateway.flowcontrol.engine_state import EngineView
from gateway.flowcontrol.fairqueue import TenantId
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
            "state": "ok" if parts.journal.up else "alone",
            "capacity_tokens": parts.engine.capacity_tokens,
            "policy": parts.settings.policy,
            "version": version,
        }

    @router.get("/ready", responses={503: {"description": "It would not."}})
    async def ready() -> JSONResponse:
        """200 when a task that comes now would be served, else 503."""
        is_ready = parts.engine.up and not parts.dispatcher.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """As Prometheus reads them."""
        _refresh(parts)
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _link(engine: EngineView) -> str:
    if not engine.linked:
        return "none"
    return "reporting" if engine.up and engine.reporting else "silent"


def _refresh(parts: Parts) -> None:
    """Gauges are read off at the time of the scrape."""
    queue, engine = parts.queue, parts.engine
    parts.metrics.queue_is(
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        predicted_tokens=queue.peak_tokens,
    )
    for tenant in parts.tenants:
        parts.metrics.virtual_time_is(tenant.name, queue.virtual_time(TenantId(tenant.name)))
    states = [state_of(queue.agents.get(agent_id)) for agent_id in parts.feedback.records]
    parts.metrics.agents_are(
        waiting=states.count("waiting"), running=states.count("running"), idle=states.count("idle")
    )
    journal = parts.journal
    parts.metrics.state_is(
        up=journal.up, waiting_bytes=journal.waiting_bytes, unreadable=journal.store.unreadable + journal.unreadable
    )
    counts = journal.take_counts()
    parts.metrics.state_counted(counts.errors, counts.unwritten, counts.given_up)
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
