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


CACHED_START = {
    "input_tokens": 400,
    "cache_creation_input_tokens": 40,
    "cache_read_input_tokens": 60,
    "output_tokens": 1,
}
STARTED = event("message_start", message={"id": "msg_1", "role": "assistant", "content": [], "usage": CACHED_START})


def in_the_order_of_anthropic(*deltas: dict[str, Any]) -> bytes:
    """The events of Anthropic's own API, in its order, with these usages at the end of the message."""
    block = {"type": "text", "text": ""}
    return b"".join(
        (
            STARTED,
            event("content_block_start", index=0, content_block=block),
            event("ping"),
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi"}),
            event("content_block_stop", index=0),
            *(event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage) for usage in deltas),
            event("message_stop"),
        )
    )


@pytest.mark.parametrize(
    ("deltas", "usage"),
    [
        ([{"output_tokens": 15}], Usage(500, 15, 60)),
        ([{"output_tokens": 7}, {"output_tokens": 15}], Usage(500, 15, 60)),
        ([{"input_tokens": None, "output_tokens": 15}], Usage(500, 15, 60)),
        ([{"input_tokens": 410, "output_tokens": 15}], Usage(510, 15, 60)),
        ([{**CACHED_START, "output_tokens": 15, "server_tool_use": {"web_search_requests": 1}}], Usage(500, 15, 60)),
        ([{}], Usage(500, 1, 60)),
        ([{"output_tokens": -1}, {"output_tokens": 15}], Usage(500, 15, 60)),
        ([{"output_tokens": "15"}], Usage(500, 1, 60)),
        ([], Usage(500, 1, 60)),
    ],
)
@given(data=st.data())
def test_what_a_later_event_of_a_message_leaves_out_keeps_its_value(
    deltas: list[dict[str, Any]], usage: Usage, data: st.DataObject
) -> None:
    stream = in_the_order_of_anthropic(*deltas)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    events = UsageFilter(ANTHROPIC, show=False)
    out = b"".join(events.feed(stream[b:e]) for b, e in itertools.pairwise([0, *sorted(cuts), len(stream)]))
    assert out == stream
    assert (events.usage, events.done) == (usage, True)


def of_chunk(usage: dict[str, Any] | None, *, choices: bool = True) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0}] if choices else [], "usage": usage}).encode() + b"\n\n"


def test_what_a_later_chunk_of_a_completion_leaves_out_keeps_its_value() -> None:
    """The order of OpenAI: null until the last chunk; and that of `continuous_usage_stats`, where every chunk has one."""
    details = {"cached_tokens": 2}
    last = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": details}
    null_first = UsageFilter(OPENAI, show=True)
    null_first.feed(of_chunk(None) + of_chunk(None) + of_chunk(last, choices=False) + DONE)
    assert null_first.usage == Usage(5, 3, 2)

    continuous = UsageFilter(OPENAI, show=True)
    continuous.feed(of_chunk({"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": details}))
    assert continuous.usage == Usage(5, 1, 2)
    continuous.feed(of_chunk({"completion_tokens": 2}))
    assert continuous.usage == Usage(5, 2, 2)
    continuous.feed(of_chunk({"prompt_tokens": 5, "completion_tokens": 3}, choices=False) + DONE)
    assert continuous.usage == Usage(5, 3, 2)


@pytest.mark.parametrize("end", ["response.completed", "response.incomplete", "response.failed"])
def test_the_usage_of_a_response_is_that_of_its_last_event(end: str) -> None:
    """The order of OpenAI's Responses: null until the event that ends it."""
    usage = {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 3, "total_tokens": 8}
    events = UsageFilter(RESPONSES, show=False)
    for kind in ("response.created", "response.in_progress"):
        events.feed(event(kind, response={"status": "in_progress", "usage": None}))
    events.feed(event("response.output_item.added", item={"type": "message"}))
    events.feed(event("response.output_text.delta", delta="Hi"))
    events.feed(event("response.output_text.done", text="Hi"))
    assert events.usage is None
    events.feed(event(end, response={"status": end.removeprefix("response."), "usage": usage}))
    assert events.usage == Usage(5, 3, 2)


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
        ({"usage": {"output_tokens": 2}}, Usage(0, 2, 0)),
        ({"usage": {"cache_read_input_tokens": 3, "output_tokens": 2}}, Usage(3, 2, 3)),
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
