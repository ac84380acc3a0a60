from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol import sse
from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from gateway.protocol.errors import EngineLost
from gateway.protocol.sse import UsageFilter
from gateway.protocol.usage import Usage, UsageSearch, parse_usage
from tests.wire.scripted_engine import DONE, chunk, usage_chunk

STREAM = chunk("a\\n\\n") + chunk('"usage":{ in the text') + chunk("ü") + usage_chunk(5, 3, cached=2) + DONE


def event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


OF_MESSAGES = b"".join(
    (
        event(
            "message_start", message={"usage": {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 0}}
        ),
        event("content_block_delta", delta={"text": "event: message_stop"}),
        event("message_delta", usage={"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 3}),
        event("message_stop"),
    )
)
OF_RESPONSES = b"".join(
    (
        event("response.created", response={"usage": None}),
        event("response.output_text.delta", delta="event: response.completed"),
        event(
            "response.completed",
            response={
                "usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 3},
            },
        ),
    )
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=20), st.booleans())
def test_however_it_is_cut_the_same_comes_out(cuts: list[int], show: bool) -> None:
    events = UsageFilter(OPENAI, show=show)
    places = [0, *sorted(cuts), len(STREAM)]
    out = b"".join(events.feed(STREAM[begin:end]) for begin, end in itertools.pairwise(places))
    assert out == (STREAM if show else STREAM.replace(usage_chunk(5, 3, cached=2), b""))
    assert events.usage == Usage(5, 3, 2)
    assert events.events == 5
    assert events.done


@pytest.mark.parametrize(("dialect", "stream"), [(ANTHROPIC, OF_MESSAGES), (RESPONSES, OF_RESPONSES)])
@given(data=st.data())
def test_other_dialects_pass_whole_and_tell_their_usage(dialect: Dialect, stream: bytes, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20))
    events = UsageFilter(dialect, show=False)
    out = b"".join(events.feed(stream[b:e]) for b, e in itertools.pairwise([0, *sorted(cuts), len(stream)]))
    assert out == stream
    assert events.usage == Usage(5, 3, 2)
    assert events.done


@pytest.mark.parametrize(("dialect", "stream"), [(OPENAI, STREAM), (ANTHROPIC, OF_MESSAGES), (RESPONSES, OF_RESPONSES)])
def test_a_stream_that_is_cut_off_is_not_done(dialect: Dialect, stream: bytes) -> None:
    whole = stream.split(b"\n\n")[:-2]
    events = UsageFilter(dialect, show=False)
    events.feed(b"\n\n".join(whole) + b"\n\n")
    assert not events.done


@pytest.mark.parametrize(
    ("dialect", "end", "failed"),
    [
        (ANTHROPIC, b"event: message_stop\n", False),
        (ANTHROPIC, b"event: error\n", True),
        (RESPONSES, b"event: response.completed\n", False),
        (RESPONSES, b"event: response.failed\n", True),
        (RESPONSES, b"event: error\n", True),
    ],
)
def test_an_error_ends_a_stream_too(dialect: Dialect, end: bytes, failed: bool) -> None:
    events = UsageFilter(dialect, show=False)
    events.feed(b'event: ping\ndata: {"text":"\\nevent: error\\n"}\n\n')
    assert not events.done
    events.feed(end + b"data: {}\n\n")
    assert (events.done, events.failed) == (True, failed)


def test_events_without_a_token_are_not_counted() -> None:
    """A stream of Anthropic's or of responses says a lot before, between and after."""
    for dialect, name, others in (
        (ANTHROPIC, "content_block_delta", ("message_start", "content_block_start", "ping")),
        (RESPONSES, "response.output_text.delta", ("response.created", "response.in_progress")),
    ):
        events = UsageFilter(dialect, show=False)
        for event in (*others, name, name):
            events.feed(f"event: {event}\ndata: {{}}\n\n".encode())
        assert events.events == 2


def test_usage_beside_choices_is_seen_and_stays() -> None:
    """`continuous_usage_stats`: the client asked for it in every chunk."""
    continuous = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    events = UsageFilter(OPENAI, show=False)
    assert events.feed(continuous) == continuous
    assert events.usage is not None
    assert not events.done


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({"usage": {"prompt_tokens": 7, "total_tokens": 7}}, Usage(7, 0, 0)),
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": None}}, Usage(7, 1, 0)),
        ({"usage": {"input_tokens": 7, "output_tokens": 2, "cache_creation_input_tokens": 1}}, Usage(8, 2, 0)),
        ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 9}}}, Usage(3, 0, 3)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"multimodal_tokens": {"image": 5}}}}, Usage(9, 0, 0)),
        ({"meta": {"billed_units": {"input_tokens": 4, "image_tokens": 2}}}, Usage(6, 0, 0)),
        ({"meta": {"api_version": {"version": "2"}}}, None),
        ({"usage": {"prompt_tokens": -3}}, None),
        ({"usage": {"prompt_tokens": "3"}}, None),
        ({"usage": {"prompt_tokens": 10**200, "completion_tokens": 1}}, None),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 2**40}}, None),
        ({"usage": {"input_tokens": 1, "cache_read_input_tokens": -5, "output_tokens": 1}}, None),
        ({"usage": None, "message": "not an object"}, None),
        ({}, None),
    ],
)
def test_what_answers_say_was_used(answer: dict[str, Any], usage: Usage | None) -> None:
    told = json.dumps(answer).encode()
    assert parse_usage(told) == usage
    for size in (1, 7, len(told)):
        search = UsageSearch()
        for place in range(0, len(told), size):
            search.feed(told[place : place + size])
        assert search.usage == usage, "the same, when it goes by in parts"


def test_a_usage_that_a_client_has_put_into_its_answer_makes_nothing_cheaper() -> None:
    schema = b'"tools":[{"parameters":{"usage":{"input_tokens":0,"output_tokens":0}}}]'
    search = UsageSearch()
    search.feed(b'{"usage":{"input_tokens":5,"output_tokens":2},' + schema + b"}")
    assert search.usage == Usage(5, 2, 0)


@pytest.mark.parametrize("cut", range(8))
def test_a_newline_too_many_is_lost_nowhere(cut: int) -> None:
    stream = b"data: [DONE]\n\n\n" + usage_chunk(5, 3) + b"\n" * 5
    events = UsageFilter(OPENAI, show=True)
    out = events.feed(stream[: 12 + cut]) + events.feed(stream[12 + cut :])
    assert out == stream[:-1]
    assert events.done


def test_an_event_that_does_not_end_is_the_engines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    events = UsageFilter(OPENAI, show=False)
    for _ in range(2):
        assert events.feed(b"data: " + b"x" * 80) == b""
        assert events.feed(b"\n\n") != b""
    for _ in range(100):
        events.feed(b"x")
    with pytest.raises(EngineLost, match="does not end"):
        events.feed(b"x")


def test_a_long_event_in_many_pieces_takes_no_longer_than_in_one() -> None:
    """Once it was put together anew with each piece: 200 MB were copied for this one, each time 64 KiB more."""
    events = UsageFilter(OPENAI, show=False)
    pieces = [b"data: ", *[b"x" * 10] * 200_000]
    assert not any(events.feed(piece) for piece in pieces)
    assert events.feed(b"\n\n") == b"".join(pieces) + b"\n\n"


@pytest.mark.parametrize("cut", [0, 60])
def test_what_comes_after_the_end_changes_nothing(cut: int) -> None:
    stream = event("message_stop") + event("error", error={"type": "api_error", "message": "late"})
    events = UsageFilter(ANTHROPIC, show=False)
    assert events.feed(stream[:cut]) + events.feed(stream[cut:]) == stream
    assert events.done
    assert not events.failed
