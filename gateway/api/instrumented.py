"""Routes that the gateway answers itself under `/v1`, with metrics, request log and traces as for any other request."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from gateway.http.reading import headers_of
from gateway.protocol.dialects import dialect_of_path, error_answer
from gateway.protocol.errors import GatewayError, InvalidRequest, Outcome, outcome_of
from gateway.telemetry.request_span import REQUEST_ID, Observer, RequestSpan
from gateway.tenancy.tenants import Tenant, Tenants

_Serve = Callable[[Request], Coroutine[Any, Any, Response]]


def own_routes(observer: Observer) -> APIRouter:
    """A router whose routes may raise `GatewayError`."""

    class OwnRoute(APIRoute):
        def get_route_handler(self) -> _Serve:
            serve = super().get_route_handler()

            async def instrumented(request: Request) -> Response:
                headers, raw = headers_of(request.scope), request.scope["headers"]
                span = observer.begins(request.method, self.path_format, headers, raw, time.monotonic())
                request.state.span = span
                outcome = Outcome.FAILED
                try:
                    answer = await _answered(serve, request, span)
                    span.answered(answer.status_code)
                    outcome = outcome_of(answer.status_code)
                finally:
                    span.ended(outcome)
                answer.headers[REQUEST_ID] = span.request_id
                return answer

            return instrumented

    return APIRouter(route_class=OwnRoute)


def caller(request: Request, tenants: Tenants) -> Tenant:
    """The tenant of the request's key. Raises what `Tenants.authenticate` raises."""
    tenant = tenants.authenticate(request.headers)
    request.state.span.authenticated(tenant.name)
    return tenant


async def _answered(serve: _Serve, request: Request, span: RequestSpan) -> Response:
    try:
        return await serve(request)
    except RequestValidationError as invalid:
        first = invalid.errors()[0]
        error: GatewayError = InvalidRequest(first["msg"], param=str(first["loc"][-1]))
    except GatewayError as raised:
        error = raised
    span.failed(error)
    status, headers, body = error_answer(error, dialect_of_path(request.url.path))
    return Response(body, status, headers)
