"""What the scripted engine says, in the dialect of the endpoint that was asked. The usage is 10 tokens of a prompt, and 4."""

from __future__ import annotations

import json
from typing import Any

from tests.wire.scripted_engine import DONE, ScriptedEngine, Send, chunk, push, start, usage_chunk

# A body for each way to ask for text.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "tiny", "input": "hello"},
    "/v1/messages": {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]},
}


async def in_dialect(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    if body.get("stream"):
        events = events_of(body, send)
        await start(send)
        for event in events:
            await push(send, event, more=event is not events[-1])
    else:
        await start(send, b"application/json")
        await push(send, json.dumps(_whole(body, send)).encode(), more=False)


async def in_dialect_when_told(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    await engine.go.wait()
    await in_dialect(body, send, engine)


async def half_then_wait(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    """The first half of a stream, with some text in it; the rest when `engine.go` is set."""
    events = events_of(body, send)
    half = len(events) // 2
    await start(send)
    for event in events[:half]:
        await push(send, event)
    await engine.go.wait()
    await push(send, b"".join(events[half:]), more=False)


def events_of(body: dict[str, Any], send: Send) -> list[bytes]:
    path = path_of(send)
    if path == "/v1/messages":
        return [_named(event) for event in _message_events()]
    if path == "/v1/responses":
        return [_named(event) for event in _response_events(body)]
    asked = bool((body.get("stream_options") or {}).get("include_usage"))
    return [chunk("hel"), chunk("lo"), *([usage_chunk(10, 4)] if asked else []), DONE]


def path_of(send: Send) -> str:
    path: str = send.__self__.scope["path"]  # type: ignore[attr-defined]  # uvicorn's request cycle
    return path


def error_event() -> bytes:
    """As both named kinds of streams have it."""
    return _named({"type": "error", "error": {"type": "internal_error", "message": "out of luck"}})


def _named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _whole(body: dict[str, Any], send: Send) -> dict[str, Any]:
    path = path_of(send)
    if path == "/v1/messages":
        return {**_message([{"type": "text", "text": "hello"}]), "usage": {"input_tokens": 10, "output_tokens": 4}}
    if path == "/v1/responses":
        return _response(body, "completed")
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    return {"id": "chat-1", "object": "chat.completion", "model": "tiny", "choices": [choice], "usage": usage}


def _message(content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": "tiny",
        "stop_reason": None,
    }


def _message_events() -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": {**_message([]), "usage": {"input_tokens": 10, "output_tokens": 0}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"input_tokens": 10, "output_tokens": 4},
        },
        {"type": "message_stop"},
    ]


def _response(body: dict[str, Any], status: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": body["request_id"],
        "object": "response",
        "created_at": 1,
        "model": "tiny",
        "status": status,
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    if status == "completed":
        text = {"type": "output_text", "text": "hello", "annotations": []}
        answer["output"] = [
            {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [text]},
        ]
        answer["usage"] = {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 14,
        }
    return answer


def _response_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(body, "in_progress")},
        {"type": "response.in_progress", "response": _response(body, "in_progress")},
        {"type": "response.output_text.delta", **place, "delta": "hel", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", **place, "text": "hello", "logprobs": []},
        {"type": "response.completed", "response": _response(body, "completed")},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]
