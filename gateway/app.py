"""The composition root: the only place that puts the parts together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.metadata import version as distribution_version
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api.agents import agent_routes, state_of
from gateway.api.inference import task_routes
from gateway.api.openapi import describe
from gateway.api.operations import operation_routes
from gateway.api.usage import usage_routes
from gateway.config.settings import GatewaySettings, Live
from gateway.flowcontrol.engine_state import EngineView
from gateway.flowcontrol.fairqueue import POLICIES, FairQueue, ReleaseLimits
from gateway.flowcontrol.feedback import Feedback
from gateway.flowcontrol.quotas import DAY_S
from gateway.flowcontrol.tool_waits import ToolWaits
from gateway.http.reading import BodyBudget
from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Learning
from gateway.learning.training import Training
from gateway.parts import Parts
from gateway.protocol.errors import outcome_of
from gateway.protocol.identify import Roots
from gateway.relay.dispatcher import Dispatcher
from gateway.relay.engine_client import EngineClient
from gateway.relay.relay import GATHERED_BYTES
from gateway.relay.responses import Background
from gateway.state import Journal, Store, TenantUsage, UsageRow, open_store
from gateway.state.types import HOUR_S
from gateway.supervise import follow_link, keep_running, poll_metrics, sweep_agents, watch_health, watch_keys
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_log import open_request_log
from gateway.telemetry.request_span import REQUEST_ID, UNKNOWN, Observer, open_tracing
from gateway.tenancy.keys import Keys
from gateway.tenancy.tenants import Tenants
from predictor.learned import Learned
from predictor.types import Predictor

logger = logging.getLogger(__name__)


class Gateway(FastAPI):
    """What clients ask for goes straight to who serves it: FastAPI's own way there takes as long as all the rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._straight: dict[tuple[str, str], ASGIApp] = {}

    def serve(self, routes: list[Route]) -> None:
        self.router.routes += routes  # for what they do not take: a wrong method, a path with an id in it
        for route in [route for route in routes if "{" not in route.path]:
            self._straight |= {(method, route.path): route.app for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        straight = self._straight.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if straight is None:
            await super().__call__(scope, receive, send)
        else:
            await straight(scope, receive, send)


async def create_app(
    settings: GatewaySettings,
    *,
    client: EngineClient | None = None,
    predictor: Predictor | None = None,
    store: Store | None = None,
) -> FastAPI:
    """The gateway for these settings; what is not given is made from them. Call it in the event loop that will serve. Raises
    `KeysError`, `RequestLogError`, and `NoOpenTelemetry`."""
    version = distribution_version("justitia")
    engine = EngineView(settings.capacity_tokens, settings.max_in_flight)
    limits = ReleaseLimits(beta=settings.beta, engine_waiting=settings.max_engine_waiting)
    queue = FairQueue(POLICIES[settings.policy](), limits)
    metrics = Metrics(CollectorRegistry())
    predictor = predictor or Learned()
    accuracy = Accuracy()
    store = store or open_store(settings.state, settings.kept_agents)
    journal = Journal(store, settings.journal_directory, kept_agents=settings.kept_agents)
    waits = ToolWaits()
    tenants = Tenants(
        Keys.load(settings.keys_file),
        settings.tenants,
        max_waiting=settings.max_waiting,
        max_waiting_bytes=settings.max_waiting_bytes,
    )
    roots = Roots()
    dispatcher = Dispatcher(queue, engine, tenants, waits=waits if settings.keep_kv else None)
    observer = Observer(
        metrics,
        open_tracing(settings.otlp_endpoint, version, metrics.process.spans_dropped),
        open_request_log(settings.request_log, metrics.process.log_dropped),
    )
    parts = Parts(
        queue=queue,
        dispatcher=dispatcher,
        engine=engine,
        client=client
        or EngineClient(
            settings.engine,
            None if settings.engine_key is None else settings.engine_key.get_secret_value(),
            relays_keys=lambda: not tenants.keys.configured,
        ),
        tenants=tenants,
        predictor=predictor,
        feedback=Feedback(
            queue,
            predictor,
            journal,
            metrics,
            accuracy,
            now=lambda: engine.now,
            waits=waits,
            keep=dispatcher.keep,
            correct=dispatcher.correct,
            charge=partial(_charge, tenants, metrics),
            tenant_weight=lambda tenant: tenants.named(tenant).weight,
            restored=roots.restore,
        ),
        journal=journal,
        metrics=metrics,
        observer=observer,
        accuracy=accuracy,
        learning=Learning(predictor, settings.models_directory, metrics),
        roots=roots,
        bodies=BodyBudget(settings.max_held_bytes),
        gathered=BodyBudget(GATHERED_BYTES),
        background=Background(),
        suspect=asyncio.Event(),
        live=Live(settings),
    )
    metrics.process.reads(version, parts.live)
    metrics.queue.reads(queue, tenants)
    metrics.agents.reads(lambda: [state_of(queue.agents.get(agent_id)) for agent_id in parts.feedback.records])
    metrics.engine.reads(engine)
    metrics.learning.reads(accuracy, parts.learning)
    metrics.state.reads(journal)
    app = Gateway(title="justitia", version=version, lifespan=_lifespan(settings, parts, store))
    app.state.parts = parts
    app.serve(task_routes(parts))
    app.include_router(agent_routes(parts))
    app.include_router(usage_routes(tenants, observer, store, parts.feedback.flush))
    app.include_router(operation_routes(parts, version=version))
    _answer_errors(app, observer)
    describe(app)
    return app


def _lifespan(
    settings: GatewaySettings, parts: Parts, store: Store
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await parts.journal.start(partial(_recall, parts, store), parts.feedback.rewrite)
        link = settings.link
        watches: list[Callable[[], Awaitable[None]]] = [
            partial(watch_health, parts),
            parts.journal.run,
            partial(follow_link, parts, link) if link is not None else partial(poll_metrics, parts),
            partial(sweep_agents, parts),
            partial(watch_keys, parts.tenants),
        ]
        watches += _learning_watches(settings, parts, store)
        tasks = [asyncio.create_task(keep_running(watch)) for watch in watches]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await parts.background.cancel()
        await parts.journal.close()
        await store.close()
        await parts.client.close()
        await parts.observer.close()

    return lifespan


async def _recall(parts: Parts, store: Store) -> None:
    """Raises `StateError`."""
    now_s = int(time.time())
    today = await store.usage(now_s - now_s % DAY_S, now_s + HOUR_S)
    await parts.feedback.recall()
    parts.tenants.restore(today)


def _charge(tenants: Tenants, metrics: Metrics, tenant: str, used: TenantUsage) -> UsageRow:
    row = tenants.charge(tenants.named(tenant), used)
    metrics.tenants.charged(row)
    return row


def _learning_watches(settings: GatewaySettings, parts: Parts, store: Store) -> list[Callable[[], Awaitable[None]]]:
    models = settings.models_directory
    if models is None or parts.learning.learned is None:
        logger.info(
            "no models: %s", "the state is in memory (--state)" if models is None else "this predictor takes none"
        )
        return []
    watches: list[Callable[[], Awaitable[None]]] = [parts.learning.watch]
    if settings.state == "memory:":
        logger.info("no models are trained: the state is in memory (--state)")
    else:
        watches.append(Training(parts.live, models, store, parts.learning, parts.accuracy, parts.metrics).watch)
    return watches


def _answer_errors(app: FastAPI, observer: Observer) -> None:
    """What has no route, and what nobody has foreseen, in OpenAI's shape."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        span = observer.begins(
            request.method, UNKNOWN, dict(request.headers), request.scope["headers"], time.monotonic()
        )
        span.answered(error.status_code)
        span.ended(outcome_of(error.status_code))
        answer = _plain(error.status_code, str(error.detail), "invalid_request_error")
        answer.headers.update({**(error.headers or {}), REQUEST_ID: span.request_id})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette names those of one route
            answer.headers["allow"] = ", ".join(_allowed(app, request.scope))
        return answer

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return _plain(500, "internal error", "internal_error")


def _allowed(app: FastAPI, scope: Scope) -> list[str]:
    found = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in route.methods or ()})


def _plain(status: int, message: str, kind: str) -> Response:
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": None}})
    return Response(body, status, media_type="application/json")
