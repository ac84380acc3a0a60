"""Which dialect a path has, and an error as a whole answer in it."""

from __future__ import annotations

import json

import pytest

from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect, dialect_of_path, error_answer
from gateway.protocol.endpoints import ENDPOINTS
from gateway.protocol.errors import QueueFull, Unauthorized


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", OPENAI),
        ("/v1/messages", ANTHROPIC),
        ("/v1/messages/count_tokens", ANTHROPIC),
        ("/v1/messages/", ANTHROPIC),
        ("/v1/messagesque", OPENAI),
        ("/v1/responses", RESPONSES),
        ("/v1/responses/resp_1/cancel", RESPONSES),
        ("/x/v1/messages", OPENAI),
        ("/v1", OPENAI),
        ("", OPENAI),
    ],
)
def test_dialect_of_path(path: str, dialect: Dialect) -> None:
    assert dialect_of_path(path) is dialect


def test_endpoints_have_their_paths_dialect() -> None:
    assert {endpoint.path: endpoint.dialect for endpoint in ENDPOINTS if endpoint.dialect is not OPENAI} == {
        "/v1/messages": ANTHROPIC,
        "/v1/responses": RESPONSES,
    }


def test_an_error_as_a_whole_answer() -> None:
    status, headers, body = error_answer(QueueFull("full", retry_after_s=7), ANTHROPIC)
    assert status == 429
    assert headers == {"content-type": "application/json", "content-length": str(len(body)), "retry-after": "7"}
    assert json.loads(body) == {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}}
    answer = error_answer(Unauthorized("no key"), OPENAI)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(answer.body)["error"]["code"] == "invalid_api_key"
