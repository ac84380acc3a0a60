"""The three ways in which clients speak, where they differ in what the gateway itself says, or has to notice."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from gateway.protocol.errors import GatewayError

_encode = msgspec.json.encode


class Dialect(ABC):
    """hides_usage: whether a stream's usage comes in an event of its own, for those who asked. ends: what only the end of a
    stream holds, in whole events; its group `error`, where it is one. fails: how a stream begins of which the engine could
    not even begin the answer. counts: what is in each event with a token, and once in it."""

    hides_usage = False
    ends: re.Pattern[bytes]
    fails: bytes
    counts: bytes

    @abstractmethod
    def error(self, error: GatewayError) -> bytes:
        """The body of an answer."""

    @abstractmethod
    def error_event(self, error: GatewayError) -> bytes:
        """How a stream ends that fails after its first byte."""


class _OpenAI(Dialect):
    hides_usage = True
    ends = re.compile(rb"data: \[DONE\]\n\n")
    fails = b'data: {"error"'
    counts = b"\n\n"

    def error(self, error: GatewayError) -> bytes:
        return _encode({"error": _described(error)})

    def error_event(self, error: GatewayError) -> bytes:
        return b"data: " + self.error(error) + b"\n\ndata: [DONE]\n\n"


class _Responses(_OpenAI):
    hides_usage = False
    ends = re.compile(rb"(?:\A|\n)event: (?:response\.(?:completed|incomplete)|(?P<error>response\.failed|error))\n")
    fails = b"event: error"
    counts = b".delta\n"

    def error_event(self, error: GatewayError) -> bytes:
        event = {**_described(error), "type": "error", "sequence_number": 0}
        return b"event: error\ndata: " + _encode(event) + b"\n\n"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class _Anthropic(Dialect):
    ends = re.compile(rb"(?:\A|\n)event: (?:message_stop|(?P<error>error))\n")
    fails = b"event: error"
    counts = b"event: content_block_delta\n"

    def error(self, error: GatewayError) -> bytes:
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        return _encode({"type": "error", "error": {"type": kind, "message": error.message}})

    def error_event(self, error: GatewayError) -> bytes:
        return b"event: error\ndata: " + self.error(error) + b"\n\n"


def _described(error: GatewayError) -> dict[str, Any]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


OPENAI, RESPONSES, ANTHROPIC = _OpenAI(), _Responses(), _Anthropic()
