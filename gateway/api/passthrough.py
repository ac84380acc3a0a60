"""Requests that hold no KV: relayed at once, beside the queue. Tokenizing, counting, models, and what has been done earlier."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.config.settings import Live
from gateway.http import writing as answers
from gateway.http.disconnect import Client
from gateway.http.reading import BodyBudget, ClientGone, HeldBody, headers_of, read_body
from gateway.protocol.dialects import ANTHROPIC, OPENAI, Dialect
from gateway.protocol.errors import EngineLost, GatewayError, NoEngine, NotFound, Outcome, QueueFull, outcome_of
from gateway.relay.engine_client import EVENTS, EngineClient, EngineUnreachable
from gateway.relay.responses import owns
from gateway.telemetry.request_span import Observer, RequestSpan
from gateway.tenancy.tenants import Tenants

logger = logging.getLogger(__name__)

# At once. They cost the engine's front-end some work.
MAX_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Passed:
    """path: as routes have it; with an `{id}` it is of an answer that somebody owns."""

    method: str
    path: str
    dialect: Dialect = OPENAI


PASSED = (
    Passed("GET", "/v1/models"),
    Passed("POST", "/tokenize"),
    Passed("POST", "/detokenize"),
    Passed("POST", "/v1/messages/count_tokens", ANTHROPIC),
    Passed("GET", "/v1/responses/{id}"),
    Passed("POST", "/v1/responses/{id}/cancel"),
)


def passing_routes(
    client: EngineClient, tenants: Tenants, observer: Observer, bodies: BodyBudget, live: Live
) -> list[Route]:
    at_once = AtOnce()
    return [
        Route(
            passed.path,
            Passing(passed, at_once, client, tenants, observer, bodies, live),
            methods=[passed.method],
            name=f"{passed.method} {passed.path}",
        )
        for passed in PASSED
    ]


@dataclass(slots=True)
class AtOnce:
    requests: int = 0


class Passing:
    """One endpoint, as an ASGI application."""

    def __init__(
        self,
        passed: Passed,
        at_once: AtOnce,
        client: EngineClient,
        tenants: Tenants,
        observer: Observer,
        bodies: BodyBudget,
        live: Live,
    ) -> None:
        self._passed, self._at_once, self._client = passed, at_once, client
        self._tenants, self._observer, self._bodies, self._live = tenants, observer, bodies, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s, headers, passed = time.monotonic(), headers_of(scope), self._passed
        span = self._observer.begins(passed.method, passed.path, headers, scope["headers"], arrived_s)
        outcome = Outcome.CANCELLED
        self._at_once.requests += 1
        try:
            outcome = await self._serve(scope, headers, receive, send, span)
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
            self._at_once.requests -= 1
            span.ended(outcome)

    async def _refuse(self, error: GatewayError, span: RequestSpan, send: Send) -> None:
        span.failed(error)
        await answers.send_error(error, self._passed.dialect, send, [span.header])

    async def _serve(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send, span: RequestSpan
    ) -> Outcome:
        """Raises `GatewayError`, and `ClientGone`."""
        if self._at_once.requests > MAX_AT_ONCE:
            raise QueueFull(f"{MAX_AT_ONCE} requests of such a kind are being served already", retry_after_s=1)
        tenant = self._tenants.authenticate(headers)
        span.authenticated(tenant.name)
        path = self._passed.path
        if (answer_id := scope.get("path_params", {}).get("id")) is not None:
            if not owns(tenant.name, answer_id):
                raise NotFound(f"no response {answer_id[:80]!r} is kept")
            path = path.format(id=answer_id)
        if query := scope["query_string"]:
            path += "?" + query.decode("latin-1")
        held = HeldBody(self._bodies)
        try:
            body = await read_body(receive, headers, self._live.settings.max_body_bytes, held)
            return await self._relay_until_left(path, body, headers, scope, send, span)
        finally:
            held.release()

    async def _relay_until_left(
        self, path: str, body: bytes, headers: dict[str, str], scope: Scope, send: Send, span: RequestSpan
    ) -> Outcome:
        client = Client(scope)
        try:
            return await self._relay(path, body, headers, send, span)
        except asyncio.CancelledError:
            if not client.cancelled():
                raise
            return Outcome.CANCELLED
        finally:
            client.done()

    async def _relay(self, path: str, body: bytes, headers: dict[str, str], send: Send, span: RequestSpan) -> Outcome:
        span.asks_engine(headers)
        try:
            answer = await self._client.ask(self._passed.method, path, body, headers)
        except EngineUnreachable as error:
            raise NoEngine(error.message, retry_after_s=5) from error
        try:
            span.answered(answer.status)
            await send(answers.start(answer.status, answer.content_type, [span.header, *answer.headers]))
            if answer.content_type.startswith(EVENTS):
                await send(answers.body(b"", more=True))  # its first event may take its time
            while chunk := await answer.read_some():
                await send(answers.body(chunk, more=True))
            await send(answers.body(b"", more=False))
        except EngineLost:
            return Outcome.FAILED  # the connection is closed in the middle of the answer, which says it all
        finally:
            answer.close()
        return outcome_of(answer.status)
