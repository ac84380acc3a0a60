"""The endpoints for operators: `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.flowcontrol.engine_state import EngineView
from gateway.parts import Parts


def operation_routes(parts: Parts, *, version: str) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """200 while the gateway itself lives; the body says how its engine and its state are."""
        return {
            "status": "draining" if parts.dispatcher.draining else "ok",
            "engine": "up" if parts.engine.up else "down",
            "link": _link(parts.engine),
            "state": "ok" if parts.journal.up else "alone",
            "capacity_tokens": parts.engine.capacity_tokens,
            "policy": parts.settings.policy,
            "version": version,
        }

    @router.get("/ready", responses={503: {"description": "It would not be served."}})
    async def ready() -> JSONResponse:
        """200 if a task that arrives now would be served, else 503."""
        is_ready = parts.engine.up and not parts.dispatcher.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """All metrics, in Prometheus' text format."""
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _link(engine: EngineView) -> str:
    if not engine.linked:
        return "none"
    return "reporting" if engine.up and engine.reporting else "silent"
