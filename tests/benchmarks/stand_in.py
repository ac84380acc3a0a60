"""A stand-in for an OpenAI engine that answers at once: `python -m tests.benchmarks.stand_in --port 9000`.

For what must be measured or tested without an engine's own time in it. Bare ASGI, no framework, so that what it costs
is small beside what is measured. Serves chat completions (whole and streamed, with usage), `/health`, `/v1/models`, and
of vLLM's `/metrics` those that a gateway without a link reads.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MODEL = "stand-in"
JSON = [(b"content-type", b"application/json")]
PLAIN = [(b"content-type", b"text/plain; version=0.0.4")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

_MODELS = msgspec.json.encode(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "nobody"}]}
)
_HEAD = {"id": "chatcmpl-stand-in", "created": 0, "model": MODEL}
_encode = msgspec.json.Encoder().encode


class _Xargs(msgspec.Struct):
    forced_length_key: str | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Request(msgspec.Struct):
    """The few fields that change the answer; all others are passed over without being decoded."""

    stream: bool = False
    max_tokens: int | None = None
    stream_options: _StreamOptions | None = None
    vllm_xargs: _Xargs | None = None


_decode = msgspec.json.Decoder(_Request).decode


class StandIn:
    """The ASGI application.

    output_tokens: of an answer whose request has neither `max_tokens` nor a key that `lengths` knows.
    token_s: time for each token, slept without work.
    kv_blocks: of 16 tokens; only told in `/metrics`, never filled.
    """

    def __init__(
        self,
        output_tokens: int = 16,
        token_s: float = 0.0,
        lengths: dict[str, int] | None = None,
        kv_blocks: int = 1000,
    ) -> None:
        self._output_tokens = output_tokens
        self._token_s = token_s
        self._lengths = lengths or {}
        self._kv_blocks = kv_blocks
        self.running = 0
        self.iterations = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope["path"], receive, send)

    async def _serve(self, path: str, receive: Receive, send: Send) -> None:
        if path == "/v1/chat/completions":
            body = await _read(receive)
            self.running += 1
            try:
                await self._complete(body, send)
            finally:
                self.running -= 1
        elif path == "/health":
            await _answer(send, 200, PLAIN, b"")
        elif path == "/v1/models":
            await _answer(send, 200, JSON, _MODELS)
        elif path == "/metrics":
            await _answer(send, 200, PLAIN, self._metrics())
        else:
            await _answer(send, 404, JSON, _error(f"no such path: {path}", 404))

    async def _complete(self, body: bytes, send: Send) -> None:
        try:
            request = _decode(body)
        except msgspec.DecodeError as error:
            await _answer(send, 400, JSON, _error(str(error), 400))
            return
        key = request.vllm_xargs.forced_length_key if request.vllm_xargs else None
        tokens = self._lengths.get(key or "", request.max_tokens or self._output_tokens)
        # A guess at a tokenizer, as good as any here.
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": tokens, "total_tokens": len(body) // 4 + tokens}
        if request.stream:
            asked = request.stream_options is not None and request.stream_options.include_usage
            await self._stream(send, tokens, usage if asked else None)
            return
        self.iterations += tokens
        if self._token_s:
            await asyncio.sleep(self._token_s * tokens)
        message = {"role": "assistant", "content": "word " * tokens}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await _answer(
            send, 200, JSON, _encode({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})
        )

    async def _stream(self, send: Send, tokens: int, usage: dict[str, int] | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for position in range(tokens):
            if self._token_s:
                await asyncio.sleep(self._token_s)
            self.iterations += 1
            choice: dict[str, Any] = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
            if position == 0:
                choice["delta"]["role"] = "assistant"
            if position == tokens - 1:
                choice["finish_reason"] = "stop"
            await _send_event(send, _chunk([choice]))
        if usage is not None:
            await _send_event(send, _chunk([], usage))
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b""})

    def _metrics(self) -> bytes:
        label = f'model_name="{MODEL}"'
        return (
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self._kv_blocks}"}} 1.0\n'
            f"vllm:iteration_tokens_total_count{{{label}}} {self.iterations}\n"
            f"vllm:num_requests_running{{{label}}} {self.running}\n"
            f"vllm:num_requests_waiting{{{label}}} 0\n"
            f"vllm:kv_cache_usage_perc{{{label}}} {min(1.0, self.running / 1000)}\n"
        ).encode()


def _chunk(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    chunk = {**_HEAD, "object": "chat.completion.chunk", "choices": choices}
    return _encode(chunk if usage is None else {**chunk, "usage": usage})


def _error(message: str, code: int) -> bytes:
    return _encode({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.stand_in", description="An engine that answers at once."
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--token-s", type=float, default=0.0, help="time for each token, in seconds")
    parser.add_argument(
        "--kv-blocks", type=int, default=1000, help="KV cache that /metrics tells, in blocks of 16 tokens"
    )
    options = parser.parse_args()
    uvicorn.run(
        StandIn(options.output_tokens, options.token_s, kv_blocks=options.kv_blocks),
        host="127.0.0.1",
        port=options.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
    )


if __name__ == "__main__":
    main()
