"""Forwards requests that use no KV cache without queuing: tokenizing, counting, models, and responses that were made earlier.

How many are forwarded at once is bounded, and shared between tenants as the queue is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.config.settings import Live
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.http import writing
from gateway.http.disconnect import Client
from gateway.http.reading import ClientGone, HeldBody, headers_of, read_body
from gateway.protocol.dialects import Dialect, dialect_of_path
from gateway.protocol.errors import EngineLost, GatewayError, NoEngine, NotFound, Outcome, QueueFull, outcome_of
from gateway.relay.engine_client import EVENTS, EngineClient, EngineUnreachable
from gateway.relay.responses import owns
from gateway.telemetry.request_span import Observer, RequestSpan
from gateway.tenancy.tenants import Tenant, Tenants

logger = logging.getLogger(__name__)

# Of all tenants together. Each costs the engine's front-end some work.
MAX_CONCURRENT = 256


@dataclass(frozen=True, slots=True)
class PassthroughEndpoint:
    """One of the engine's endpoints that use no KV cache."""

    method: str
    path: str  # as routes have it; an `{id}` in it is that of a response, which belongs to one tenant

    @property
    def dialect(self) -> Dialect:
        return dialect_of_path(self.path)


PASSTHROUGH = (
    PassthroughEndpoint("GET", "/v1/models"),
    PassthroughEndpoint("POST", "/tokenize"),
    PassthroughEndpoint("POST", "/detokenize"),
    PassthroughEndpoint("POST", "/v1/messages/count_tokens"),
    PassthroughEndpoint("GET", "/v1/responses/{id}"),
    PassthroughEndpoint("POST", "/v1/responses/{id}/cancel"),
)


def passthrough_routes(
    client: EngineClient, tenants: Tenants, observer: Observer, bodies: ConcurrencyLimit, live: Live
) -> list[Route]:
    limit = ConcurrencyLimit(MAX_CONCURRENT, lambda: tenants.total_weight)
    return [
        Route(
            endpoint.path,
            PassthroughRoute(endpoint, limit, client, tenants, observer, bodies, live),
            methods=[endpoint.method],
            name=f"{endpoint.method} {endpoint.path}",
        )
        for endpoint in PASSTHROUGH
    ]


class PassthroughRoute:
    """One endpoint, as an ASGI application."""

    def __init__(
        self,
        endpoint: PassthroughEndpoint,
        limit: ConcurrencyLimit,
        client: EngineClient,
        tenants: Tenants,
        observer: Observer,
        bodies: ConcurrencyLimit,
        live: Live,
    ) -> None:
        self._endpoint, self._limit, self._client = endpoint, limit, client
        self._tenants, self._observer, self._bodies, self._live = tenants, observer, bodies, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s, headers, endpoint = time.monotonic(), headers_of(scope), self._endpoint
        span = self._observer.begins(endpoint.method, endpoint.path, headers, scope["headers"], arrived_s)
        outcome = Outcome.CANCELLED
        try:
            tenant = self._tenants.authenticate(headers)
            span.authenticated(tenant.name)
            outcome = await self._serve(tenant, scope, headers, receive, send, span)
        except GatewayError as error:
            outcome = error.outcome
            await self._refuse(error, span, send)
        except ClientGone:
            pass
        except Exception:
            logger.exception("a request failed")
            outcome = Outcome.FAILED
            await self._refuse(GatewayError("internal error"), span, send)
        finally:
            span.ended(outcome)

    async def _refuse(self, error: GatewayError, span: RequestSpan, send: Send) -> None:
        span.failed(error)
        await writing.send_error(error, self._endpoint.dialect, send, [span.header])

    async def _serve(
        self, tenant: Tenant, scope: Scope, headers: dict[str, str], receive: Receive, send: Send, span: RequestSpan
    ) -> Outcome:
        """Raises `GatewayError` and `ClientGone`."""
        path = self._path(tenant, scope)
        limit = self._limit
        if not limit.take(tenant):
            raise QueueFull(
                f"tenant {tenant.name} already has {limit.held_by(tenant.name)} requests of this kind in progress, all tenants"
                f" together {limit.held} of at most {limit.limit}, and each leaves room for the others",
                retry_after_s=1,
            )
        held = HeldBody(self._bodies, tenant)
        try:
            body = await read_body(receive, headers, self._live.settings.max_body_bytes, held)
            return await self._forward_until_disconnect(path, body, headers, scope, send, span)
        finally:
            held.release()
            limit.give_back(tenant.name)

    def _path(self, tenant: Tenant, scope: Scope) -> str:
        """The path to ask the engine for, with its query. Raises `NotFound` for another tenant's response."""
        path = self._endpoint.path
        if (answer_id := scope.get("path_params", {}).get("id")) is not None:
            if not owns(tenant.name, answer_id):
                raise NotFound(f"no response {answer_id[:80]!r} is kept")
            path = path.format(id=answer_id)
        query: bytes = scope["query_string"]
        return f"{path}?{query.decode('latin-1')}" if query else path

    async def _forward_until_disconnect(
        self, path: str, body: bytes, headers: dict[str, str], scope: Scope, send: Send, span: RequestSpan
    ) -> Outcome:
        client = Client(scope)
        try:
            return await self._forward(path, body, headers, send, span)
        except asyncio.CancelledError:
            if not client.cancelled():
                raise
            return Outcome.CANCELLED
        finally:
            client.done()

    async def _forward(self, path: str, body: bytes, headers: dict[str, str], send: Send, span: RequestSpan) -> Outcome:
        span.asks_engine(headers)
        try:
            answer = await self._client.ask(self._endpoint.method, path, body, headers)
        except EngineUnreachable as error:
            raise NoEngine(error.message, retry_after_s=5) from error
        try:
            span.answered(answer.status)
            await send(writing.start(answer.status, answer.content_type, [span.header, *answer.headers]))
            if answer.content_type.startswith(EVENTS):
                await send(writing.body(b"", more=True))  # the head leaves at once: the first event may take long
            while chunk := await answer.read_some():
                await send(writing.body(chunk, more=True))
            await send(writing.body(b"", more=False))
        except EngineLost:
            return Outcome.FAILED  # the connection is closed in the middle of the answer; no more can be reported
        finally:
            answer.close()
        return outcome_of(answer.status)
