"""The endpoints for operators: `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.config.settings import Live
from gateway.flowcontrol.engine_state import EngineState
from gateway.relay.dispatcher import Dispatcher
from gateway.state import Journal


def operation_routes(dispatcher: Dispatcher, journal: Journal, live: Live, *, version: str) -> APIRouter:
    router, flow = APIRouter(), dispatcher.flow

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """200 while the gateway itself lives; the body says how its engine and its state are."""
        return {
            "status": "draining" if flow.draining else "ok",
            "engine": "up" if flow.engine.up else "down",
            "link": _link(flow.engine),
            "state": "ok" if journal.up else "alone",
            "capacity_tokens": flow.engine.capacity_tokens,
            "policy": live.settings.policy,
            "version": version,
        }

    @router.get("/ready", responses={503: {"description": "It would not be served."}})
    async def ready() -> JSONResponse:
        """200 if a task that arrives now would be served, else 503."""
        is_ready = flow.engine.up and not flow.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """All metrics, in Prometheus' text format."""
        return Response(generate_latest(dispatcher.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _link(engine: EngineState) -> str:
    if not engine.linked:
        return "none"
    return "reporting" if engine.up and engine.reporting else "silent"
