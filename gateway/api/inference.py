"""The endpoints that clients use: a request comes in, is identified, and is then relayed, in its turn.

They are ASGI of our own among FastAPI's routes: what FastAPI does for a request costs as much as all the rest of it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.api.passthrough import passthrough_routes
from gateway.flowcontrol.fairqueue import TaskId
from gateway.http.reading import ClientGone, HeldBody, headers_of, read_body
from gateway.http.writing import send_error
from gateway.parts import Parts
from gateway.protocol.body import Body, parse_body
from gateway.protocol.dialects import RESPONSES
from gateway.protocol.endpoints import ENDPOINTS, Endpoint
from gateway.protocol.errors import GatewayError, InvalidRequest, Outcome
from gateway.protocol.identify import identify
from gateway.relay.relay import Relay, TaskRequest
from gateway.relay.responses import answer_id, owns
from gateway.telemetry.request_span import RequestSpan
from gateway.tenancy.tenants import Tenant

logger = logging.getLogger(__name__)


def task_routes(parts: Parts) -> list[Route]:
    # Numbers that grow over restarts too, so that an engine which outlives the gateway never sees one twice.
    numbers = itertools.count(time.time_ns())
    tasks = [
        Route(endpoint.path, TaskRoute(parts, endpoint, numbers), methods=["POST"], name=endpoint.path)
        for endpoint in ENDPOINTS
    ]
    return [*tasks, *passthrough_routes(parts)]


class TaskRoute:
    """One endpoint, as an ASGI application."""

    def __init__(self, parts: Parts, endpoint: Endpoint, numbers: Iterator[int]) -> None:
        self._parts, self._endpoint, self._numbers = parts, endpoint, numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s = time.monotonic()
        headers = headers_of(scope)
        span = self._parts.observer.begins("POST", self._endpoint.path, headers, scope["headers"], arrived_s)
        try:
            request = await self._request(headers, receive, arrived_s, span)
        except GatewayError as error:
            await self._refuse(error, span, send)
        except ClientGone:
            span.ended(Outcome.CANCELLED)
        except Exception:
            logger.exception("a request failed")
            await self._refuse(GatewayError("internal error"), span, send)
        else:
            await Relay(self._parts, request).serve(scope, send)

    async def _request(
        self, headers: dict[str, str], receive: Receive, arrived_s: float, span: RequestSpan
    ) -> TaskRequest:
        """Raises `GatewayError`, or `ClientGone`."""
        tenant = self._parts.tenants.authenticate(headers)
        span.authenticated(tenant.name)
        held = HeldBody(self._parts.bodies, tenant)
        try:
            return await self._read(tenant, headers, receive, arrived_s, span, held)
        except BaseException:
            held.release()
            raise

    async def _read(
        self,
        tenant: Tenant,
        headers: dict[str, str],
        receive: Receive,
        arrived_s: float,
        span: RequestSpan,
        held: HeldBody,
    ) -> TaskRequest:
        parts = self._parts
        body = parse_body(await read_body(receive, headers, parts.settings.max_body_bytes, held), self._endpoint)
        identity = identify(headers, body.fields)
        keeps = self._endpoint.dialect is RESPONSES
        if keeps:
            _must_own(tenant.name, body)
        task_id = TaskId(next(self._numbers))
        name = identity.name or f"task-{task_id}"
        weight = parts.tenants.weight_of(tenant, identity.weight)
        root = parts.roots.fold(tenant.name, name, identity.parent)
        record = parts.feedback.arrived(tenant.name, root, identity)
        span.identified(record, task_id, body)
        final = identity.name is None or (identity.final and root == name)
        return TaskRequest(
            id=task_id,
            body=body,
            headers=headers,
            tenant=tenant,
            record=record,
            weight=weight,
            arrived_s=arrived_s,
            final=final,
            span=span,
            held=held,
            answer_id=answer_id(tenant.name) if keeps else None,
        )

    async def _refuse(self, error: GatewayError, span: RequestSpan, send: Send) -> None:
        """It never becomes a task."""
        span.failed(error)
        span.ended(error.outcome)
        await send_error(error, self._endpoint.dialect, send, [span.header])


def _must_own(tenant: str, body: Body) -> None:
    """Nobody goes on from another's response."""
    raw = body.fields.get("previous_response_id")
    if raw is None:
        return
    try:
        previous = msgspec.json.decode(raw, type=str | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("previous_response_id must be a string", param="previous_response_id") from error
    if previous is not None and not owns(tenant, previous):
        raise InvalidRequest(f"no response {previous[:80]!r} is kept", param="previous_response_id")
