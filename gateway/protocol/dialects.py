"""The three dialects of clients, where they differ in what the gateway itself sends or has to recognize."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import msgspec

from gateway.protocol.errors import GatewayError

_encode = msgspec.json.encode


class Dialect(ABC):
    """How a client's API shapes errors and streams."""

    # Whether the usage of a stream is an event of its own, which the client has to ask for.
    hides_usage = False
    # Matches only the end of a stream, in whole events; its group `error`, where there is one, an end with an error.
    ends: re.Pattern[bytes]
    # The beginning of a stream in which the engine failed before the answer began.
    fails: bytes
    # Occurs once in each event that holds a token, and in no other.
    counts: bytes

    @abstractmethod
    def error(self, error: GatewayError) -> bytes:
        """The body of an answer that is an error."""

    @abstractmethod
    def error_event(self, error: GatewayError) -> bytes:
        """The last events of a stream that fails after its first byte."""


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


OPENAI, RESPONSES, ANTHROPIC = _OpenAI(), _Responses(), _Anthropic()

# By the first two parts of a path; every other path has OpenAI's older dialect.
_BY_ROOT = {"/v1/responses": RESPONSES, "/v1/messages": ANTHROPIC}


def dialect_of_path(path: str) -> Dialect:
    """The dialect that clients of a path expect, whether or not the path is served."""
    return _BY_ROOT.get("/".join(path.split("/", 3)[:3]), OPENAI)


class ErrorAnswer(NamedTuple):
    """An error as a whole answer."""

    status: int
    headers: dict[str, str]  # by lower-case name; all that the answer needs, its length included
    body: bytes


def error_answer(error: GatewayError, dialect: Dialect) -> ErrorAnswer:
    body = dialect.error(error)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    return ErrorAnswer(error.status, headers, body)


def _described(error: GatewayError) -> dict[str, Any]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
