"""What fuzzing has found, and the edges of what is accepted. What holds of any body: tests/fuzz."""

from __future__ import annotations

import json

import msgspec
import pytest

from engine.hints import Hints
from gateway.protocol.body import LARGEST_LIMIT, MAX_FIELDS, MAX_SEQUENCES, parse_body
from gateway.protocol.endpoints import CHAT, COMPLETIONS, ENDPOINTS
from gateway.protocol.errors import InvalidRequest
from gateway.protocol.identify import identify

HINTS = Hints(tag=5, agent="default/a", task=7)
RESPONSES = next(endpoint for endpoint in ENDPOINTS if endpoint.path == "/v1/responses")


def sent(data: bytes) -> dict[str, bytes]:
    fields = msgspec.json.decode(parse_body(data).for_engine(HINTS), type=dict[str, msgspec.Raw])
    return {name: bytes(raw) for name, raw in fields.items()}


def test_a_client_cannot_give_itself_a_tag() -> None:
    fields = sent(
        b'{"priority": -9, "vllm_xargs": {"justitia_tag": -9, "justitia_agent": "other/b", "justitia_task": 1}}'
    )
    assert fields["priority"] == b"5"
    assert json.loads(fields["vllm_xargs"]) == {"justitia_agent": "default/a", "justitia_task": 7}


def test_what_is_beside_our_fields_stays_as_it_came() -> None:
    huge = b"9" * 5000
    fields = sent(b'{"stream": true, "vllm_xargs": {"a": 1.50, "b": %s}, "stream_options": {"c": 1e400}}' % huge)
    assert fields["vllm_xargs"].startswith(b'{"a":1.50,"b":' + huge)
    assert fields["stream_options"] == b'{"c":1e400,"include_usage":true}'


@pytest.mark.parametrize(
    ("written", "limit"), [(b"5", 5), (b"5.0", 5), (b"5e2", 500), (b"9" * 30, LARGEST_LIMIT), (b"null", None)]
)
def test_a_whole_number_is_one_however_it_is_written(written: bytes, limit: int | None) -> None:
    body = parse_body(b'{"max_tokens": %s}' % written)
    assert body.max_tokens == limit
    assert body.fields["max_tokens"] == msgspec.Raw(written)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"n": 1.5}', "n"),
        (b'{"n": true}', "n"),
        (b'{"n": "2"}', "n"),
        (b'{"n": 1e400}', "n"),
        (b'{"n": %s}' % (b"9" * 4300), "n"),
        (b'{"prompt": ["a", "b"], "n": %s}' % (b"9" * 4300), "n"),
        (b'{"prompt": ["a", "b"], "n": 1025}', "n"),
        (b'{"max_tokens": -1}', "max_tokens"),
        (b'{"prompt": [%s"a"]}' % (b'"a",' * MAX_SEQUENCES), "prompt"),
        (b'{"prompt": ["\\udc00"]}', None),
        (b'{"model": "\xff"}', None),
        (b'{"model": "\xed\xa0\x80"}', None),
        (b'{"vllm_xargs": [1]}', "vllm_xargs"),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
    ],
)
def test_what_cannot_be_is_refused(data: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_body(data, COMPLETIONS)
    assert refused.value.param == param


@pytest.mark.parametrize("prompt", [b'"a"', b"[1, 2]", b'{"text": "%s"}' % (b"x" * 50)])
def test_prompts_are_counted_up_to_what_an_engine_takes(prompt: bytes) -> None:
    for count in (1, 2, 1000, MAX_SEQUENCES):
        body = parse_body(b'{"prompt": [%s]}' % b",".join([prompt] * count), COMPLETIONS)
        assert body.prompts == body.sequences == count
    with pytest.raises(InvalidRequest, match="sequences"):
        parse_body(b'{"prompt": [%s]}' % b",".join([prompt] * (MAX_SEQUENCES + 1)), COMPLETIONS)


@pytest.mark.parametrize("value", [b"0", b'"%s"' % (b"x" * 30)])
def test_fields_are_counted_before_they_fill_the_memory(value: bytes) -> None:
    fields = [b'"%04d": %s' % (number, value) for number in range(MAX_FIELDS)]
    assert len(parse_body(b"{" + b",".join(fields) + b"}").fields) == MAX_FIELDS
    with pytest.raises(InvalidRequest, match="fields"):
        parse_body(b"{" + b",".join([*fields, b'"x": 0']) + b"}")


def test_only_responses_are_made_in_the_background() -> None:
    data = b'{"background": true}'
    assert parse_body(data, RESPONSES).background
    assert not parse_body(data, CHAT).background


def test_as_deep_as_a_body_may_be_it_can_be_identified() -> None:
    """Python's stack ends somewhere; it must not be between the two."""
    for depth in range(900, 1010):
        try:
            body = parse_body(b'{"metadata":' + b'{"user_id":' * depth + b"0" + b"}" * (depth + 1))
        except InvalidRequest:
            return
        assert identify({}, body.fields).name is None
    raise AssertionError("deeper than any stack")
