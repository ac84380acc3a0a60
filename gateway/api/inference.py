"""The endpoints of tasks: a request is read and identified, and is then relayed, in its turn.

They are ASGI applications of our own among FastAPI's routes: FastAPI's work for a request costs as much as all the rest of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import msgspec
from starlette.types import Receive, Scope, Send

from gateway.config.settings import Live
from gateway.flowcontrol import Arriving
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.fairqueue import TaskId
from gateway.http.reading import ClientGone, HeldBody, headers_of, read_body
from gateway.http.writing import send_error
from gateway.protocol.body import Body, parse_body
from gateway.protocol.dialects import RESPONSES
from gateway.protocol.endpoints import Endpoint
from gateway.protocol.errors import GatewayError, InvalidRequest, Outcome
from gateway.protocol.identify import identify
from gateway.protocol.texts import content_of
from gateway.relay.relay import Engine, Relay, TaskRequest
from gateway.relay.responses import answer_id, owns
from gateway.telemetry.request_span import Observer, RequestSpan
from gateway.tenancy.tenants import Tenant, Tenants

logger = logging.getLogger(__name__)


class TaskRoute:
    """One endpoint of tasks, as an ASGI application."""

    def __init__(
        self,
        endpoint: Endpoint,
        numbers: Iterator[int],
        engine: Engine,
        tenants: Tenants,
        observer: Observer,
        bodies: ConcurrencyLimit,
        live: Live,
    ) -> None:
        self._endpoint, self._numbers = endpoint, numbers
        self._engine, self._tenants, self._observer = engine, tenants, observer
        self._bodies, self._live = bodies, live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s = time.monotonic()
        headers = headers_of(scope)
        span = self._observer.begins("POST", self._endpoint.path, headers, scope["headers"], arrived_s)
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
            await Relay(self._engine, request).serve(scope, send)

    async def _request(
        self, headers: dict[str, str], receive: Receive, arrived_s: float, span: RequestSpan
    ) -> TaskRequest:
        """Raises `GatewayError`, or `ClientGone`."""
        tenant = self._tenants.authenticate(headers)
        span.authenticated(tenant.name)
        held = HeldBody(self._bodies, tenant)
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
        max_bytes = self._live.settings.max_body_bytes
        body = parse_body(await read_body(receive, headers, max_bytes, held), self._endpoint)
        identity = identify(headers, body.fields)
        keeps = self._endpoint.dialect is RESPONSES
        if keeps:
            _must_own(tenant.name, body)
        task_id = TaskId(next(self._numbers))
        name = identity.name or f"task-{task_id}"
        roots = self._engine.dispatcher.flow.agents.roots
        root = roots.root_of(tenant.name, name, identity.parent)
        arriving = Arriving(
            id=task_id,
            tenant=tenant.name,
            agent=root,
            source=identity.source,
            content=content_of(body),
            alias=name if name != root else None,
            agent_class=identity.agent_class,
            weight=self._tenants.weight_of(tenant, identity.weight),
            expected_tasks=identity.expected_tasks,
            final=identity.name is None or (identity.final and root == name),
            prompts=body.prompts,
            decodes=self._endpoint.decodes,
            counted=self._endpoint.xargs,
            body_bytes=body.size,
            arrived_s=arrived_s,
        )
        span.identified(arriving, body)
        return TaskRequest(tenant, arriving, body, headers, span, held, answer_id(tenant.name) if keeps else None)

    async def _refuse(self, error: GatewayError, span: RequestSpan, send: Send) -> None:
        """It never becomes a task."""
        span.failed(error)
        span.ended(error.outcome)
        await send_error(error, self._endpoint.dialect, send, [span.header])


def _must_own(tenant: str, body: Body) -> None:
    """A tenant continues only its own responses."""
    raw = body.fields.get("previous_response_id")
    if raw is None:
        return
    try:
        previous = msgspec.json.decode(raw, type=str | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("previous_response_id must be a string", param="previous_response_id") from error
    if previous is not None and not owns(tenant, previous):
        raise InvalidRequest(f"no response {previous[:80]!r} is kept", param="previous_response_id")
