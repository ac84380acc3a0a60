"""The composition root: the only place that puts the parts together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import version as distribution_version

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from gateway.accuracy import Accuracy
from gateway.capacity import EngineView
from gateway.engine_client import EngineClient, EngineUnreachable
from gateway.errors import GatewayError, NoEngine
from gateway.fairness import POLICIES, FairQueue, ReleaseLimits
from gateway.feedback import Feedback
from gateway.intake import BodyBudget
from gateway.learning.serving import Learning
from gateway.learning.training import Training
from gateway.metrics import Metrics
from gateway.operations import operation_routes
from gateway.parts import Parts
from gateway.release import Dispatcher
from gateway.routes import task_routes
from gateway.settings import GatewaySettings
from gateway.state import Store, open_store
from gateway.tool_waits import ToolWaits
from gateway.watch import follow_link, keep_running, poll_metrics, sweep_agents, watch_health
from predictor.learned import Learned
from predictor.types import Predictor

logger = logging.getLogger(__name__)

MIB = 2**20


async def create_app(
    settings: GatewaySettings,
    *,
    client: EngineClient | None = None,
    predictor: Predictor | None = None,
    store: Store | None = None,
) -> FastAPI:
    """The gateway for these settings; what is not given is made from them. Call it in the event loop that will serve."""
    version = distribution_version("justitia")
    engine = EngineView(settings.capacity_tokens, settings.max_in_flight)
    limits = ReleaseLimits(beta=settings.beta, engine_waiting=settings.max_engine_waiting)
    queue = FairQueue(POLICIES[settings.policy](), limits)
    metrics = Metrics(CollectorRegistry(), version=version, policy=settings.policy)
    predictor = predictor or Learned()
    accuracy = Accuracy()
    store = store or open_store(settings.state, settings.kept_agents)
    waits = ToolWaits()
    dispatcher = Dispatcher(queue, engine, max_waiting=settings.max_waiting, waits=waits if settings.keep_kv else None)
    parts = Parts(
        queue=queue,
        dispatcher=dispatcher,
        engine=engine,
        client=client or EngineClient(settings.engine),
        predictor=predictor,
        feedback=Feedback(
            queue,
            predictor,
            store,
            metrics,
            accuracy,
            now=lambda: engine.now,
            waits=waits,
            keep=dispatcher.keep,
            correct=dispatcher.correct,
        ),
        metrics=metrics,
        accuracy=accuracy,
        learning=Learning(predictor, settings.models_directory, metrics),
        suspect=asyncio.Event(),
        max_queue_s=settings.max_queue_s,
        keep_text=settings.keep_text,
    )
    app = FastAPI(title="justitia", version=version, lifespan=_lifespan(settings, parts, store))
    app.state.parts = parts
    bodies = BodyBudget(int(settings.max_waiting_mib * MIB))
    app.include_router(task_routes(parts, bodies, max_body_bytes=int(settings.max_body_mib * MIB)))
    app.include_router(operation_routes(parts, version=version, policy=settings.policy))
    _answer_errors(app)
    return app


def _lifespan(
    settings: GatewaySettings, parts: Parts, store: Store
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        remembered = await parts.feedback.recall()
        logger.info("learned from %d agents that the state store had kept", remembered)
        link = settings.link
        watches: list[Callable[[], Awaitable[None]]] = [
            partial(watch_health, parts),
            partial(follow_link, parts, link) if link is not None else partial(poll_metrics, parts),
            partial(sweep_agents, parts, settings.agent_idle_s),
        ]
        watches += _learning_watches(settings, parts, store)
        tasks = [asyncio.create_task(keep_running(watch)) for watch in watches]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await parts.feedback.flush()
        await store.close()
        await parts.client.close()

    return lifespan


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
    elif settings.train:
        watches.append(Training(settings, models, store, parts.learning, parts.accuracy, parts.metrics).watch)
    return watches


def _answer_errors(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    @app.exception_handler(GatewayError)
    async def gateway_error(request: Request, error: GatewayError) -> Response:
        if isinstance(error, EngineUnreachable):
            error = NoEngine(error.message, retry_after_s=5)
        return Response(error.body(), error.status, error.headers(), media_type="application/json")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        answer = _plain(error.status_code, str(error.detail), "invalid_request_error")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return _plain(500, "internal error", "internal_error")


def _plain(status: int, message: str, kind: str) -> Response:
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": None}})
    return Response(body, status, media_type="application/json")
