"""The endpoints that operators use: is it alive, is it ready, what does it measure."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.api.agents import state_of
from gateway.config.settings import Live
from gateway.flowcontrol import FlowController
from gateway.flowcontrol.engine_state import EngineState
from gateway.flowcontrol.fairqueue import TenantId
from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Learning
from gateway.relay.dispatcher import Dispatcher
from gateway.state import Journal
from gateway.telemetry.metrics import Metrics


def operation_routes(
    dispatcher: Dispatcher, journal: Journal, accuracy: Accuracy, learning: Learning, live: Live, *, version: str
) -> APIRouter:
    router, flow, metrics = APIRouter(), dispatcher.flow, dispatcher.metrics

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """200 for as long as the gateway itself lives."""
        return {
            "status": "draining" if flow.draining else "ok",
            "engine": "up" if flow.engine.up else "down",
            "link": _link(flow.engine),
            "state": "ok" if journal.up else "alone",
            "capacity_tokens": flow.engine.capacity_tokens,
            "policy": live.settings.policy,
            "version": version,
        }

    @router.get("/ready", responses={503: {"description": "It would not."}})
    async def ready() -> JSONResponse:
        """200 when a task that comes now would be served, else 503."""
        is_ready = flow.engine.up and not flow.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """As Prometheus reads them."""
        _refresh(metrics, flow, journal, accuracy, learning)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _link(engine: EngineState) -> str:
    if not engine.linked:
        return "none"
    return "reporting" if engine.up and engine.reporting else "silent"


def _refresh(metrics: Metrics, flow: FlowController, journal: Journal, accuracy: Accuracy, learning: Learning) -> None:
    """Gauges are read off at the time of the scrape."""
    queue, engine = flow.queue, flow.engine
    metrics.queue_is(
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        predicted_tokens=queue.peak_tokens,
    )
    for tenant in flow.quotas:
        metrics.virtual_time_is(tenant.name, queue.virtual_time(TenantId(tenant.name)))
    states = [state_of(queue.agents[agent.id]) for agent in flow.agents]
    metrics.agents_are(waiting=states.count("waiting"), running=states.count("running"), idle=states.count("idle"))
    metrics.state_is(
        up=journal.up, waiting_bytes=journal.waiting_bytes, unreadable=journal.store.unreadable + journal.unreadable
    )
    counts = journal.take_counts()
    metrics.state_counted(counts.errors, counts.unwritten, counts.given_up)
    metrics.model_failed(learning.new_failures())
    serves = learning.serves
    metrics.predictions_are(
        below_p90=accuracy.share_below_p90(),
        order=accuracy.order(),
        error=accuracy.error()[1],
        model_error=math.nan if serves is None else accuracy.error(serves.name)[1],
    )
    metrics.engine_is(
        up=engine.up,
        link_up=_link(engine) == "reporting",
        running=engine.running,
        waiting=engine.waiting,
        held_tokens=engine.held_tokens,
        kept_tokens=engine.kept_tokens,
        capacity_tokens=engine.capacity_tokens,
        iterations=engine.iterations,
    )
