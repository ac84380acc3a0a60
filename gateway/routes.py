"""The endpoints that clients use: a request comes in, is identified and estimated, and becomes a response that waits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from gateway.body import parse_body
from gateway.errors import BodyTooLarge, GatewayError, Outcome
from gateway.fairness import AgentId, TaskId
from gateway.identify import identify
from gateway.intake import BodyBudget, HeldBody
from gateway.parts import Parts
from gateway.relay import TaskRequest, TaskResponse

TASK_PATHS = ("/v1/chat/completions", "/v1/completions")


def task_routes(parts: Parts, bodies: BodyBudget, *, max_body_bytes: int) -> APIRouter:
    router = APIRouter()
    # Numbers that grow over restarts too, so that an engine which outlives the gateway never sees one twice.
    numbers = itertools.count(time.time_ns())

    def serve(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def serve_task(request: Request) -> Response:
            arrived_s = time.monotonic()
            held = HeldBody(bodies)
            try:
                body = parse_body(await _read(request, max_body_bytes, held))
                identity = identify(request.headers, body.fields)
            except GatewayError as error:
                held.release()
                parts.metrics.request_ended(path, error.outcome, time.monotonic() - arrived_s)
                raise
            except ClientDisconnect:
                held.release()
                parts.metrics.request_ended(path, Outcome.CANCELLED, time.monotonic() - arrived_s)
                return Response(status_code=499)  # to nobody
            task_id = TaskId(next(numbers))
            record = parts.feedback.arrived(AgentId(identity.agent_id or f"task-{task_id}"), identity)
            final = identity.final or identity.agent_id is None
            task = TaskRequest(task_id, path, body, dict(request.headers), record, arrived_s, final, held)
            return TaskResponse(parts, task)

        return serve_task

    for path in TASK_PATHS:
        router.add_api_route(path, serve(path), methods=["POST"], response_model=None, name=path)

    @router.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        """The engine's own answer."""
        answer = await parts.client.get("/v1/models", request.headers)
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    return router


async def _read(request: Request, limit_bytes: int, held: HeldBody) -> bytes:
    """The body. Raises `BodyTooLarge` before more than the limit has been read, `QueueFull` when there is no room for it."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    chunks = []
    if size <= limit_bytes:
        held.expect(size)
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                break
            held.grow(len(chunk))
            chunks.append(chunk)
    if size > limit_bytes:
        raise BodyTooLarge(f"the body is larger than {limit_bytes} bytes")
    return b"".join(chunks)
