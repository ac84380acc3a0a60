"""What the gateway may answer by itself: the errors of its tree, each in the shape of its endpoint's dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from gateway.api.openapi import TRY_AGAIN
from gateway.api.passthrough import PASSTHROUGH
from gateway.protocol.dialects import ANTHROPIC, OPENAI, Dialect
from gateway.protocol.endpoints import ENDPOINTS
from gateway.protocol.errors import GatewayError

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT: dict[str, Any] = json.loads((ROOT / "docs" / "reference" / "openapi.json").read_text())
DIALECTS: dict[str, Dialect] = {thing.path: thing.dialect for thing in (*ENDPOINTS, *PASSTHROUGH)}


def _below(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for below in error.__subclasses__():
        yield below
        yield from _below(below)


ERRORS = {(error.status, error.code): error for error in _below(GatewayError)}


def assert_documented(path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Of an answer that is not the engine's. headers: by lower-case name."""
    assert headers["content-type"] == "application/json"
    told = json.loads(body)
    error = told["error"]
    assert type(error["message"]) is str
    assert error["message"]
    statuses = {status for status, _ in ERRORS}
    if DIALECTS.get(path, OPENAI) is ANTHROPIC and status in statuses:
        assert told.keys() == {"type", "error"}
        assert told["type"] == "error"
        assert error.keys() == {"type", "message"}
    else:
        assert told.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED) and error["code"] is None:
            return  # no such endpoint
        assert error["type"] == ERRORS[status, error["code"]].type
    if status in TRY_AGAIN:
        assert int(headers["retry-after"]) > 0
