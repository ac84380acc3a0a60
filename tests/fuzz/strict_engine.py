"""An engine that takes nothing but JSON, and remembers what of a task the gateway should not have let through."""

from __future__ import annotations

import json
from typing import Any

from gateway.protocol.endpoints import ENDPOINTS
from tests.wire.scripted_engine import DONE, ScriptedEngine, Send, chunk, push, start, usage_chunk

_TASKS = {endpoint.path: endpoint for endpoint in ENDPOINTS}
_USAGE = {"prompt_tokens": 10, "completion_tokens": 4}
_INPUT_USAGE = {"input_tokens": 10, "output_tokens": 4}


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


_STREAMS = {
    "/v1/messages": [_event("message_start", message={"usage": _INPUT_USAGE}), _event("message_stop")],
    "/v1/responses": [
        _event("response.created", response={"usage": None}),
        _event("response.completed", response={"usage": _INPUT_USAGE}),
    ],
}


class StrictEngine(ScriptedEngine):
    """wrong: bodies that no gateway should send. served: the last body of a task, as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[bytes] = []
        self.served = b""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        data, more = b"", True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["method"] == "GET":
            answer = self.metrics if path == "/metrics" else json.dumps({"status": "completed", "usage": _INPUT_USAGE})
            await self._answer(send, 200, answer.encode())
            return
        endpoint = _TASKS.get(path)
        try:
            body = _parsed(data)
        except (ValueError, RecursionError):
            body = None
            if endpoint is None:
                await self._answer(send, 400, _error(path, "no JSON"))
                return
        if endpoint is None:
            await self._answer(send, 200, b"{}")
            return
        self.served = data
        hinted = isinstance(body, dict) and (not endpoint.priority or type(body.get("priority")) is int)
        if not isinstance(body, dict) or not hinted or (endpoint.xargs and "vllm_xargs" not in body):
            self.wrong.append(data)
            await self._answer(send, 400, _error(path, "not a task"))
        elif body.get("stream") is True and endpoint.decodes:
            await start(send)
            asked = (body.get("stream_options") or {}).get("include_usage")
            events = [chunk("hel"), chunk("lo"), *([usage_chunk(10, 4)] if asked else []), DONE]
            await push(send, b"".join(_STREAMS.get(path, events)), more=False)
        else:
            usage = _INPUT_USAGE if path in _STREAMS else _USAGE
            status = "queued" if body.get("background") else "completed"
            await self._answer(send, 200, json.dumps({"status": status, "usage": usage}).encode())

    async def _answer(self, send: Send, status: int, data: bytes) -> None:
        await start(send, b"application/json", status)
        await push(send, data, more=False)


def _parsed(data: bytes) -> Any:
    """Raises `ValueError`, or `RecursionError`. Whole numbers may be of any length."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(data.decode(), parse_constant=refuse, parse_int=lambda digits: int(digits[:100]))


def _error(path: str, message: str) -> bytes:
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error"}
    if path.startswith("/v1/messages"):
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": {**error, "param": None, "code": 400}}).encode()
