"""What a body holds that a predictor goes by, and how it is counted."""

from __future__ import annotations

import pytest

from gateway.protocol.body import parse_body
from gateway.protocol.endpoints import CHAT, COMPLETIONS
from gateway.protocol.texts import content_of


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ('"one"', 1),
        ("[1, 2, 3]", 1),
        ('["a", "b"]', 2),
        ("[[1, 2], [3]]", 2),
        ("[]", 1),
        ("null", 1),
        ("7", 1),
        (' [ "a" ]', 1),
    ],
)
def test_prompts_of_a_batch_are_counted(prompt: str, prompts: int) -> None:
    assert parse_body(b'{"prompt": %s}' % prompt.encode(), COMPLETIONS).prompts == prompts


def test_no_limit_is_a_limit_too() -> None:
    assert parse_body(b'{"max_tokens": 0}').max_tokens == 0
    assert parse_body(b'{"max_tokens": null}').max_tokens is None
    assert parse_body(b'{"stream": null, "stream_options": null}').stream is False


@pytest.mark.parametrize(
    ("body", "system", "text", "messages"),
    [
        (
            '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}, {}]}',
            b"Be brief.",
            b"Why?\n",
            3,
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"image_url": {}}]}]}',
            b"",
            b"What is it?",
            1,
        ),
        ('{"prompt": "Once\\nupon"}', b"", b"Once\nupon", 1),
        ('{"prompt": ["a", "b"]}', b"", b'["a", "b"]', 1),
        ('{"prompt": [1, 2]}', b"", b"[1, 2]", 1),
        ('{"messages": [{"role": 7}]}', b"", b'[{"role": 7}]', 1),
        ("{}", b"", b"", 1),
    ],
)
def test_what_a_request_says(body: str, system: bytes, text: bytes, messages: int) -> None:
    content = content_of(parse_body(body.encode(), COMPLETIONS if "prompt" in body else CHAT))
    assert (content.system, content.text, content.messages) == (system, text, messages)


def test_what_stands_beside_the_text() -> None:
    content = content_of(
        parse_body(
            b'{"messages": [], "tools": [{"type": "function"}, {}], "max_tokens": 9, "n": 3, "response_format": {}}'
        )
    )
    assert (content.tools, content.tool_bytes, content.max_tokens, content.sequences) == (2, 26, 9, 3)
    assert content.structured
    assert content_of(parse_body(b'{"messages": [], "tools": "odd"}')).tools == 0


def test_what_was_just_not_too_deep_for_the_parser_is_taken_as_it_came() -> None:
    messages = b'[{"role": "user", "new": ' + b"[" * 700 + b"]" * 700 + b"}]"
    body = parse_body(b'{"messages": ' + messages + b"}")

    def called_so_deep(calls: int) -> bytes:
        return called_so_deep(calls - 1) if calls else content_of(body).text

    assert called_so_deep(400) in (messages, b""), "as it came, or, where Python counts otherwise, read"


def test_a_body_of_megabytes_is_not_taken_apart() -> None:
    huge = b"[" + b'{"role": "user", "content": "x"},' * 100_000 + b"{}]"
    content = content_of(parse_body(b'{"messages": ' + huge + b"}"))
    assert content.text == huge
