"""An engine that does as it is told, over a real socket: for failures that a real one has only by chance.

What a real engine can show is shown on the real one, in `test_real_engine.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import uvicorn

Send = Callable[[dict[str, Any]], Awaitable[None]]
Answer = Callable[[dict[str, Any], Send, "ScriptedEngine"], Awaitable[None]]


def chunk(text: str) -> bytes:
    return (
        b"data: "
        + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}, separators=(",", ":")).encode()
        + b"\n\n"
    )


def usage_chunk(prompt: int, completion: int, cached: int = 0) -> bytes:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"choices": [], "usage": usage}, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def start(send: Send, content_type: bytes = b"text/event-stream", status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})


async def push(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def answer_at_once(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    """As a real engine would: a whole answer, or a stream of two chunks, usage, and the end."""
    if body.get("stream"):
        await start(send)
        await push(send, chunk("hel"))
        await push(send, chunk("lo"))
        if (body.get("stream_options") or {}).get("include_usage"):
            await push(send, usage_chunk(10, 4))
        await push(send, DONE, more=False)
    else:
        usage = {"prompt_tokens": 10, "completion_tokens": 4}
        await start(send, b"application/json")
        await push(send, json.dumps({"choices": [{"index": 0, "text": "hello"}], "usage": usage}).encode(), more=False)


async def wait_for_word(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    """The answer comes when `engine.go` is set."""
    await engine.go.wait()
    await answer_at_once(body, send, engine)


@dataclass
class ScriptedEngine:
    """answers: one for each task, in order; then `default`. bodies: what arrived. left: tasks whose client left. connections:
    on which something was asked, open or not. polls: of its metrics."""

    default: Answer = answer_at_once
    answers: list[Answer] = field(default_factory=list)
    healthy: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    polls: int = 0
    connections: set[Any] = field(default_factory=set)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    url: str = ""
    metrics: str = (
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1\n'
        "vllm:iteration_tokens_total_count 100\n"
        "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
    )

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.connections.add(send.__self__.transport)  # type: ignore[attr-defined]  # uvicorn's request cycle
        if scope["method"] == "GET":
            self.polls += scope["path"] == "/metrics"
            content = {"/metrics": self.metrics, "/v1/models": '{"object": "list", "data": []}'}.get(scope["path"], "")
            await start(send, b"application/json", 200 if self.healthy else 503)
            await push(send, content.encode(), more=False)
            return
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        async with self.arrived:
            self.raw.append(data)
            self.bodies.append(json.loads(data))
            self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
            self.arrived.notify_all()
        answer = self.answers.pop(0) if self.answers else self.default
        serving = asyncio.create_task(answer(self.bodies[-1], send, self))
        gone = asyncio.create_task(receive())
        await asyncio.wait((serving, gone), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            serving.cancel()
            async with self.arrived:
                self.left += 1
                self.arrived.notify_all()
        gone.cancel()
        if serving.done():
            serving.result()

    async def until(self, condition: Callable[[ScriptedEngine], bool]) -> None:
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: condition(self))

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[ScriptedEngine]:
        async with serving_asgi(self, port) as self.url:
            yield self


@asynccontextmanager
async def serving_asgi(application: Any, port: int = 0) -> AsyncIterator[str]:
    """The URL at which it is served."""
    async with serving_server(application, port) as server:
        yield url_of(server)


def url_of(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@asynccontextmanager
async def serving_server(application: Any, port: int = 0) -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(
        application, port=port, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = server.force_exit = True
        await task
