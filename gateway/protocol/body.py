"""The body of a request: what the gateway reads of it, and what it adds for the engine.

Only the top level is parsed. The values stay the bytes that the client sent, and are forwarded unchanged.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect
from typing import Any

import msgspec

from engine.hints import TAG_XARG, Hints, to_fields
from gateway.protocol.dialects import RESPONSES
from gateway.protocol.endpoints import CHAT, Endpoint
from gateway.protocol.errors import InvalidRequest

Fields = dict[str, msgspec.Raw]

MAX_SEQUENCES = 2048
# In one object. Millions of fields, or of prompts, would stop the gateway for seconds and fill its memory.
MAX_FIELDS = 1024
# A limit above this many tokens limits nothing.
LARGEST_LIMIT = 2**31 - 1
# A body of at most so many bytes may be parsed before its fields are counted.
_FEW_BYTES = 2**14
# The gateway's own: the engine would log a warning about each.
_OWN_FIELDS = ("agent_id", "program_id")
# Of a field that is parsed, which takes twenty times its size in memory.
MAX_VALUE_BYTES = 2**16
_BATCH = re.compile(rb"\s*\[\s*[\"\[{]")

# A list of at most so many items, which are not parsed. One more is refused when it is reached, not when all have been read.
_Batch = msgspec.defstruct(
    "_Batch",
    [(f"prompt_{place}", msgspec.Raw, msgspec.Raw()) for place in range(MAX_SEQUENCES)],
    array_like=True,
    forbid_unknown_fields=True,
)

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_flag = msgspec.json.Decoder(bool | None).decode
_decode_number = msgspec.json.Decoder(float | None).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Body(msgspec.Struct, frozen=True):
    """The body of a task, as far as the gateway reads it."""

    endpoint: Endpoint
    fields: Fields  # the top level, undecoded
    size: int  # in bytes, as it arrived
    stream: bool  # whether the answer is to be a stream of events
    wants_usage: bool  # whether the client asked for the usage event of a stream
    background: bool  # whether the answer is to be fetched later
    prompt_bytes: int  # the size of the texts
    prompts: int
    sequences: int  # how many the engine will run: prompts × n
    max_tokens: int | None  # the client's limit for each sequence, if any

    def for_engine(self, hints: Hints, request_id: str | None = None) -> bytes:
        """The body with the gateway's fields: tag, agent and task, for a stream the request for a usage event, and the id by
        which the answer can be fetched."""
        priority, own = to_fields(hints)
        xargs: dict[str, Any] = dict(own)
        fields: dict[str, Any] = dict(self.fields)
        for name in _OWN_FIELDS:
            fields.pop(name, None)
        if self.endpoint.priority:
            fields["priority"] = priority
        else:
            xargs[TAG_XARG] = priority
        if self.endpoint.xargs:
            if "vllm_xargs" in fields:
                clients = _mapping(self.fields, "vllm_xargs")
                clients.pop(TAG_XARG, None)  # it would override the priority
                xargs = {**clients, **xargs}
            fields["vllm_xargs"] = xargs
        if self.stream and self.endpoint.dialect.hides_usage:
            fields["stream_options"] = {**_mapping(self.fields, "stream_options"), "include_usage": True}
        if request_id is not None:
            fields["request_id"] = request_id
        return msgspec.json.encode(fields)


def parse_body(data: bytes, endpoint: Endpoint = CHAT) -> Body:
    """Raises `InvalidRequest` if it is not an object, or if a field that the gateway reads has the wrong type. The engine
    validates the rest."""
    try:
        _check_utf8(data)  # the decoder skips values without checking them
        fields = _decode_object(data)
    except _UNREADABLE as error:
        raise InvalidRequest(f"the body is not a JSON object: {error}") from error
    _mapping(fields, "vllm_xargs")
    prompts = _prompts(fields, endpoint)
    sequences = prompts * ((_limit(fields, "n", 1) or 1) if endpoint.decodes else 1)
    if sequences > MAX_SEQUENCES:
        raise InvalidRequest(f"at most {MAX_SEQUENCES} sequences per request", param="n")
    return Body(
        endpoint=endpoint,
        fields=fields,
        size=len(data),
        stream=_flag(fields, "stream"),
        wants_usage=_is_true(_mapping(fields, "stream_options").get("include_usage")),
        background=_flag(fields, "background") and endpoint.dialect is RESPONSES,
        prompt_bytes=sum(len(memoryview(fields[name])) for name in endpoint.texts if name in fields),
        prompts=prompts,
        sequences=sequences,
        max_tokens=_max_tokens(fields, endpoint),
    )


def _check_utf8(data: bytes) -> None:
    """Raises `UnicodeDecodeError`."""
    if data.isascii():
        return
    decode = _utf8_decoder().decode
    for begin in range(0, len(data), MAX_VALUE_BYTES):
        decode(data[begin : begin + MAX_VALUE_BYTES])
    decode(b"", final=True)


class _Key(str):
    """The name of a field in an object so large that its fields are counted while it is read."""

    __slots__ = ()


def _decode_object(data: bytes | msgspec.Raw) -> Fields:
    """Raises `InvalidRequest` for too many fields, and msgspec's errors for what is not an object."""
    if len(memoryview(data)) <= _FEW_BYTES:
        fields = _decode_fields(data)
        if len(fields) > MAX_FIELDS:
            raise _too_many_fields()
        return fields
    found = 0

    def key(kind: type, name: str) -> _Key:
        nonlocal found
        found += 1
        if found > MAX_FIELDS:
            raise _too_many_fields()
        return _Key(name)

    return {
        str(name): raw for name, raw in msgspec.json.decode(data, type=dict[_Key, msgspec.Raw], dec_hook=key).items()
    }


def _too_many_fields() -> InvalidRequest:
    return InvalidRequest(f"at most {MAX_FIELDS} fields per object")


def _flag(fields: Fields, name: str) -> bool:
    raw = _small(fields, name)
    if raw is None:
        return False
    try:
        return bool(_decode_flag(raw))
    except _UNREADABLE as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from error


def _small(fields: Fields, name: str) -> msgspec.Raw | None:
    raw = fields.get(name)
    if raw is not None and len(memoryview(raw)) > MAX_VALUE_BYTES:
        raise InvalidRequest(f"{name} must be at most {MAX_VALUE_BYTES} bytes", param=name)
    return raw


def _mapping(fields: Fields, name: str) -> Fields:
    """A new mapping, its values undecoded."""
    raw = _small(fields, name)
    if raw is None or bytes(raw) == b"null":
        return {}
    try:
        return _decode_object(raw)
    except _UNREADABLE as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from error


def _is_true(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw) == b"true"


def _limit(fields: Fields, name: str, at_least: int) -> int | None:
    """A whole number, which may be written as 5.0."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        number = _decode_number(raw)
    except _UNREADABLE:
        number = -1.0
    if number is None:
        return None
    if not (number >= at_least and number.is_integer()):
        raise InvalidRequest(f"{name} must be a whole number of at least {at_least}", param=name)
    return int(number)


def _max_tokens(fields: Fields, endpoint: Endpoint) -> int | None:
    """A prompt that is not decoded is held for one iteration, as if one token were."""
    if not endpoint.decodes:
        return 1
    limits = [limit for name in endpoint.limits if (limit := _limit(fields, name, 0)) is not None]
    return min(limits[0], LARGEST_LIMIT) if limits else None


def _prompts(fields: Fields, endpoint: Endpoint) -> int:
    """How many prompts a request carries: a list of strings, of lists of token ids, or of documents, is a batch."""
    for name in endpoint.batch:
        prompt = fields.get(name)
        # Otherwise it is one string, one list of token ids, or something that the engine will refuse.
        if prompt is not None and _BATCH.match(prompt):
            return max(1, _count(prompt, name))
    return 1


def _count(batch: msgspec.Raw, name: str) -> int:
    """The number of items, which are skipped rather than parsed."""
    try:
        if len(memoryview(batch)) <= MAX_VALUE_BYTES:
            count = len(_decode_list(batch))
        else:
            taken = _decode_batch(batch)
            count = bisect(_Batch.__struct_fields__, 0, key=lambda place: not memoryview(getattr(taken, place)))
    except msgspec.ValidationError:
        count = MAX_SEQUENCES + 1
    except _UNREADABLE as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from error
    if count > MAX_SEQUENCES:
        raise InvalidRequest(f"at most {MAX_SEQUENCES} sequences per request", param=name)
    return count
