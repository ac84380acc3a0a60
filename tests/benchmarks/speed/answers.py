"""What the engine answers, as bytes made beforehand. An event is data of a stream; on the wire each is a chunk of its own."""

from __future__ import annotations

import re
from typing import Any

import msgspec

TOKENS = 16
EVENT_BYTES = 250
STAMP = re.compile(rb"@(\d{20})@")  # in an event: when it was written, in nanoseconds
# Far more than all tasks can be predicted to need: here nothing waits for memory.
KV_BLOCKS = 1_000_000


def _whole(kind: bytes, body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (status, kind, len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    chunk = {"id": "chatcmpl-" + "a" * 32, "object": "chat.completion.chunk", "created": 0, "model": "stand-in"}
    return b"data: " + msgspec.json.encode({**chunk, "choices": choices, **more}) + b"\n\n"


def _token(content: str, finish_reason: str | None = None) -> bytes:
    return _event([{"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": finish_reason}])


def _padded(content: str) -> bytes:
    return _token(content.ljust(EVENT_BYTES - len(_token("")), "."))


def _answer() -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "word " * TOKENS}, "finish_reason": "stop"}
    body = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "stand-in", "choices": [choice]}
    return _whole(b"application/json", msgspec.json.encode({**body, "usage": _USAGE}))


_USAGE = {"prompt_tokens": 10, "completion_tokens": TOKENS, "total_tokens": 10 + TOKENS}
_LAST = (_token("word", "stop"), _event([], usage=_USAGE), b"data: [DONE]\n\n")
WHOLE = _answer()
EVENT = _chunk(_padded("word"))
STAMPED = _chunk(_padded(f"@{0:020}@")).replace(b"0" * 20, b"%020d")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = HEAD + EVENT * (TOKENS - 1) + b"".join(map(_chunk, _LAST)) + b"0\r\n\r\n"
NOT_FOUND = _whole(b"text/plain", b"no such path or model", b"404 Not Found")
FIXED = {
    b"/health": _whole(b"text/plain", b""),
    b"/v1/models": _whole(b"application/json", b'{"object":"list","data":[]}'),
}


def metrics(*, iterations: int, running: int) -> bytes:
    """As long as vLLM's `/metrics`: a gateway without a link reads them four times a second, and pays for their length."""
    return _whole(b"text/plain; version=0.0.4", _EXPOSITION % (KV_BLOCKS, iterations, running))


def _exposition() -> bytes:
    """To be filled with blocks, iterations, and tasks that run."""
    labels = 'engine="0",model_name="stand-in"'
    lines = [f'vllm:cache_config_info{{{labels},block_size="16",num_gpu_blocks="%d"}} 1.0']
    lines += [f"vllm:iteration_tokens_total_count{{{labels}}} %d", f"vllm:num_requests_running{{{labels}}} %d"]
    lines += [f"vllm:num_requests_waiting{{{labels}}} 0.0", f"vllm:kv_cache_usage_perc{{{labels}}} 0.1"]
    for histogram in range(19):
        name = f"vllm:other_{histogram}_seconds"
        lines += [f"# HELP {name} One of vLLM's histograms.", f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{{labels},le="{bucket}.0"}} 0.0' for bucket in range(18)]
        lines += [
            f'{name}_bucket{{{labels},le="+Inf"}} 0.0',
            f"{name}_count{{{labels}}} 0.0",
            f"{name}_sum{{{labels}}} 0.0",
        ]
    for counter in range(23):
        lines += [f"# TYPE vllm:other_{counter}_total counter", f"vllm:other_{counter}_total{{{labels}}} 0.0"]
    return "\n".join([*lines, ""]).encode()


_EXPOSITION = _exposition()
