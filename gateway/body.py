"""The body of a request: what the gateway reads of it, and what it adds for the engine.

Only the top level is taken apart. The values stay the bytes that the client sent, and leave as they came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from engine.hints import Hints, to_fields
from gateway.errors import InvalidRequest

Fields = dict[str, msgspec.Raw]

# Where the text is, in the bodies of both endpoints: its bytes are what the prompt's length is predicted from.
_TEXT_FIELDS = ("messages", "prompt", "tools", "suffix")
MAX_SEQUENCES = 1024
# Of a field that is taken apart, which needs twenty times its size.
MAX_VALUE_BYTES = 2**16
_BATCH = re.compile(rb'\s*\[\s*["\[]')

_decode_fields = msgspec.json.Decoder(Fields).decode
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Body:
    """fields: the top level, undecoded. stream: whether the answer is to be one of events. wants_usage: whether the client
    asked for the usage event of a stream. prompt_bytes: size of the text. prompts: how many it carries.
    sequences: how many the engine will decode for it (prompts × n). max_tokens: the client's limit for each, if any."""

    fields: Fields
    stream: bool
    wants_usage: bool
    prompt_bytes: int
    prompts: int
    sequences: int
    max_tokens: int | None

    def for_engine(self, hints: Hints) -> bytes:
        """The body with our fields: the tag, agent and task, and, for a stream, the wish for a usage event."""
        priority, xargs = to_fields(hints)
        fields: dict[str, Any] = dict(self.fields)
        fields["priority"] = priority
        fields["vllm_xargs"] = {**_mapping(self.fields, "vllm_xargs"), **xargs}
        if self.stream:
            fields["stream_options"] = {**_mapping(self.fields, "stream_options"), "include_usage": True}
        return msgspec.json.encode(fields)


def parse_body(data: bytes) -> Body:
    """Raises `InvalidRequest` for what is not an object, or where a field that we read has the wrong type. The rest is for
    the engine to judge."""
    try:
        fields = _decode_fields(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not a JSON object: {error}") from error
    _mapping(fields, "vllm_xargs")
    prompts = _prompts(fields)
    sequences = prompts * (_limit(fields, "n", 1) or 1)
    if sequences > MAX_SEQUENCES:
        raise InvalidRequest(f"at most {MAX_SEQUENCES} sequences per request, not {sequences}", param="n")
    return Body(
        fields=fields,
        stream=_value(fields, "stream", bool) or False,
        wants_usage=_mapping(fields, "stream_options").get("include_usage") is True,
        prompt_bytes=sum(len(memoryview(fields[name])) for name in _TEXT_FIELDS if name in fields),
        prompts=prompts,
        sequences=sequences,
        max_tokens=_limit(fields, "max_completion_tokens", 0) or _limit(fields, "max_tokens", 0),
    )


def _value(fields: Fields, name: str, kind: type[_Value]) -> _Value | None:
    raw = fields.get(name)
    if raw is None:
        return None
    if len(memoryview(raw)) > MAX_VALUE_BYTES:
        raise InvalidRequest(f"{name} must be at most {MAX_VALUE_BYTES} bytes", param=name)
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from error


def _mapping(fields: Fields, name: str) -> Mapping[str, Any]:
    return _value(fields, name, dict) or {}


def _limit(fields: Fields, name: str, at_least: int) -> int | None:
    number = _value(fields, name, int)
    if number is not None and number < at_least:
        raise InvalidRequest(f"{name} must be at least {at_least}, not {number}", param=name)
    return number


def _prompts(fields: Fields) -> int:
    """How many prompts a completion carries: a list of strings, or of lists of token ids, is a batch."""
    prompt = fields.get("prompt")
    if prompt is None:
        return 1
    if not _BATCH.match(prompt):
        return 1  # one string, one list of token ids, or something that the engine will refuse
    return max(1, len(msgspec.json.decode(prompt, type=list[msgspec.Raw])))
