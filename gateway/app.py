"""The composition root: the only place that puts the parts together, and gives each the few that it needs."""

from __future__ import annotations

import asyncio
import itertools
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
from gateway.api.inference import TaskRoute
from gateway.api.openapi import describe
from gateway.api.operations import operation_routes
from gateway.api.passthrough import passthrough_routes
from gateway.api.usage import usage_routes
from gateway.config.settings import GatewaySettings, Live
from gateway.flowcontrol import FlowController, Quotas
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.fairqueue import POLICIES, FairQueue
from gateway.learning.accuracy import Accuracy
from gateway.learning.guarded import GuardedPredictor
from gateway.learning.outcomes import Outcomes
from gateway.learning.serving import Learning
from gateway.learning.training import Training
from gateway.protocol.endpoints import ENDPOINTS
from gateway.protocol.errors import outcome_of
from gateway.relay.dispatcher import Dispatcher, now
from gateway.relay.engine_client import EngineClient
from gateway.relay.engine_monitor import EngineMonitor
from gateway.relay.relay import GATHERED_BYTES, Engine
from gateway.relay.responses import Background
from gateway.reload import flow_options
from gateway.restart import Restart
from gateway.state import Journal, Store, open_store
from gateway.supervise import keep_running, sweep_agents, watch_keys
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_log import open_request_log
from gateway.telemetry.request_span import REQUEST_ID, UNKNOWN, Observer, open_tracing
from gateway.tenancy.keys import Keys
from gateway.tenancy.tenants import Tenants
from predictor.learned import Learned
from predictor.types import Predictor

logger = logging.getLogger(__name__)


class Gateway(FastAPI):
    """The application, and what it was composed of. Requests of clients go straight to their routes: FastAPI's own way there
    takes as long as all the rest."""

    live: Live
    metrics: Metrics
    tenants: Tenants
    journal: Journal
    predictor: Predictor
    accuracy: Accuracy
    flow: FlowController
    outcomes: Outcomes
    dispatcher: Dispatcher
    client: EngineClient
    learning: Learning
    observer: Observer
    bodies: ConcurrencyLimit  # of requests
    gathered: ConcurrencyLimit  # of large answers
    background: Background

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
) -> Gateway:
    """The gateway for these settings; what is not given is made from them. Call it in the event loop that will serve. Raises
    `KeysError`, `RequestLogError`, and `NoOpenTelemetry`."""
    version = distribution_version("justitia")
    app = Gateway(title="justitia", version=version)
    app.live = Live(settings)
    app.metrics = Metrics(CollectorRegistry())
    app.tenants = Tenants(Keys.load(settings.keys_file), settings.tenants)
    app.journal = Journal(
        store or open_store(settings.state, settings.kept_agents),
        settings.journal_directory,
        kept_agents=settings.kept_agents,
    )
    app.predictor = predictor or Learned()
    guarded = GuardedPredictor(app.predictor, app.metrics.learning)
    app.accuracy = Accuracy()
    app.flow = _flow(settings, guarded, app.tenants, app.journal.id)
    app.outcomes = Outcomes(guarded, app.accuracy, app.metrics)
    app.dispatcher = Dispatcher(app.flow, app.journal, app.metrics, app.outcomes)
    key = None if settings.engine_key is None else settings.engine_key.get_secret_value()
    tenants = app.tenants
    app.client = client or EngineClient(settings.engine, key, relays_keys=lambda: not tenants.keys.configured)
    app.learning = Learning(app.predictor, settings.models_directory, app.metrics)
    app.observer = Observer(
        app.metrics,
        open_tracing(settings.otlp_endpoint, version, app.metrics.process.spans_dropped),
        open_request_log(settings.request_log, app.metrics.process.log_dropped),
    )
    app.bodies = ConcurrencyLimit(settings.max_held_bytes, lambda: tenants.total_weight)
    app.gathered = ConcurrencyLimit(GATHERED_BYTES, lambda: tenants.total_weight)
    app.background = Background()
    _add_readings(app)
    app.router.lifespan_context = _lifespan(app, settings)
    _add_routes(app)
    _answer_errors(app, app.observer)
    describe(app)
    return app


def _flow(settings: GatewaySettings, predictor: GuardedPredictor, tenants: Tenants, journal: str) -> FlowController:
    options = flow_options(settings)
    quotas = Quotas(settings.max_waiting, settings.max_waiting_bytes)
    quotas.set_limits(now(), tenants.limits)
    queue = FairQueue(POLICIES[settings.policy](), options.limits)
    flow = FlowController(queue, quotas, predictor, options, journal=journal)
    flow.engine.declared_capacity_tokens = settings.capacity_tokens
    flow.engine.declared_max_num_seqs = settings.max_in_flight
    return flow


def _add_readings(app: Gateway) -> None:
    """What metrics read at a scrape."""
    flow, metrics = app.flow, app.metrics
    metrics.process.reads(app.version, app.live)
    metrics.queue.reads(flow.queue, flow.quotas)
    metrics.agents.reads(lambda: [state_of(flow.queue.agents[agent.id]) for agent in flow.agents])
    metrics.engine.reads(flow.engine)
    metrics.learning.reads(app.accuracy, app.learning)
    metrics.state.reads(app.journal)


def _add_routes(app: Gateway) -> None:
    # Numbers that grow over restarts too, so that an engine which outlives the gateway never sees one twice.
    numbers = itertools.count(time.time_ns())
    engine = Engine(app.dispatcher, app.client, app.gathered, app.background, app.live)
    tasks = [
        Route(
            endpoint.path,
            TaskRoute(endpoint, numbers, engine, app.tenants, app.observer, app.bodies, app.live),
            methods=["POST"],
            name=endpoint.path,
        )
        for endpoint in ENDPOINTS
    ]
    app.serve([*tasks, *passthrough_routes(app.client, app.tenants, app.observer, app.bodies, app.live)])
    app.include_router(agent_routes(app.dispatcher, app.tenants, app.observer))
    app.include_router(usage_routes(app.tenants, app.observer, app.journal.store, app.journal.flush))
    app.include_router(operation_routes(app.dispatcher, app.journal, app.live, version=app.version))


def _lifespan(app: Gateway, settings: GatewaySettings) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        restart = Restart(app.dispatcher, app.journal, app.outcomes)
        await app.journal.start(restart.recall, restart.rewrite)
        monitor, link = EngineMonitor(app.dispatcher, app.client, app.metrics), settings.link
        loops: list[Callable[[], Awaitable[None]]] = [
            monitor.watch_health,
            app.journal.run,
            partial(monitor.follow_link, link) if link is not None else monitor.poll_metrics,
            partial(sweep_agents, app.dispatcher, app.live),
            partial(watch_keys, app.tenants, app.dispatcher),
        ]
        loops += _learning_loops(app, settings)
        tasks = [asyncio.create_task(keep_running(loop)) for loop in loops]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await app.background.cancel()
        await app.journal.close()
        await app.journal.store.close()
        await app.client.close()
        await app.observer.close()

    return lifespan


def _learning_loops(app: Gateway, settings: GatewaySettings) -> list[Callable[[], Awaitable[None]]]:
    models = settings.models_directory
    if models is None or app.learning.learned is None:
        logger.info(
            "no models: %s", "the state is in memory (--state)" if models is None else "this predictor takes none"
        )
        return []
    loops: list[Callable[[], Awaitable[None]]] = [app.learning.watch]
    if settings.state == "memory:":
        logger.info("no models are trained: the state is in memory (--state)")
    else:
        loops.append(Training(app.live, models, app.journal.store, app.learning, app.accuracy, app.metrics).watch)
    return loops


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
