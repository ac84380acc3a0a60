"""Trace context by the specification's own rules: https://www.w3.org/TR/trace-context/#traceparent-header-field-values."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.trace_context import (
    TraceContext,
    parse_traceparent,
    parse_tracestate,
    take_trace_context,
)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"


def taken(*given: tuple[str, str]) -> tuple[TraceContext | None, dict[str, str]]:
    """What comes of the headers of a request, of which the first of a name counts."""
    headers = dict(reversed(given))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given]
    return take_trace_context(headers, raw), headers


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-03", True),  # what other flags mean is not known
        (f"00-{TRACE}-{PARENT}-fe", False),
        (f"cc-{TRACE}-{PARENT}-01", True),  # a later version
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", True),
    ],
)
def test_what_is_right_is_read(value: str, sampled: bool) -> None:
    assert parse_traceparent(value) == TraceContext(TRACE, PARENT, sampled)
    assert taken(("traceparent", value))[1] == {"traceparent": value}, "and goes on as it came"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}0-01",
        f"00-{TRACE}-{PARENT}-1",
        f"0-{TRACE}-{PARENT}-01",
        f"00_{TRACE}_{PARENT}_01",
        f"{GOOD}\n",
        f"{GOOD},{GOOD}",
        f"00-{TRACE[:-1]}²-{PARENT}-01",
        f"00-{TRACE[:-1]}٣-{PARENT}-01",
    ],
)
def test_what_is_malformed_is_passed_over_with_its_state(value: str) -> None:
    assert parse_traceparent(value) is None
    if value.isascii():
        assert taken(("traceparent", value), ("tracestate", "a=1")) == (None, {})


@given(
    st.text(max_size=80)
    | st.text(alphabet=string.hexdigits + "-", max_size=60)
    | st.from_regex(r"\A..-.{32}-.{16}-..\Z")
)
def test_nothing_but_the_form_is_ever_taken_for_one(value: str) -> None:
    context = parse_traceparent(value)
    if context is None:
        return
    assert value[:55] == f"{value[:2]}-{context.trace_id}-{context.parent_id}-{value[53:55]}"
    assert value[:2] != "ff"
    assert int(context.trace_id, 16) and int(context.parent_id, 16)
    assert context.sampled == bool(int(value[53:55], 16) & 1)
    assert set(value[:55]) <= set("0123456789abcdef-")


@given(st.binary(max_size=100))
def test_whatever_is_sent_what_goes_on_is_well_formed(value: bytes) -> None:
    text = value.decode("latin-1")
    headers = {"traceparent": text, "tracestate": text}
    take_trace_context(headers, [(b"traceparent", value), (b"tracestate", value)])
    assert "traceparent" not in headers or parse_traceparent(headers["traceparent"]) is not None
    assert "tracestate" not in headers or parse_tracestate(headers["tracestate"]) == headers["tracestate"] != ""


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 255), st.integers(0, 254))
def test_every_context_is_read_back(trace: int, parent: int, flags: int, version: int) -> None:
    value = f"{version:02x}-{trace:032x}-{parent:016x}-{flags:02x}"
    assert parse_traceparent(value) == TraceContext(f"{trace:032x}", f"{parent:016x}", flags % 2 == 1)


def test_a_parent_that_is_given_twice_is_none() -> None:
    assert taken(("traceparent", GOOD), ("traceparent", f"00-{TRACE}-{PARENT}-00")) == (None, {})


def test_a_state_may_be_spread_over_several_headers() -> None:
    context, headers = taken(("traceparent", GOOD), ("tracestate", "a=1, b=2,"), ("tracestate", "\tc@d=3"))
    assert context == TraceContext(TRACE, PARENT, True, "a=1,b=2,c@d=3")
    assert headers["tracestate"] == "a=1,b=2,c@d=3"


@pytest.mark.parametrize(
    "state", ["a", "a=", "=1", "A=1", "a=1=2", "a=1,a=2", "a=\x7f", "é=1", ",".join(f"k{n}=1" for n in range(33))]
)
def test_a_malformed_state_goes_and_the_parent_stays(state: str) -> None:
    context, headers = taken(("traceparent", GOOD), ("tracestate", state))
    assert context == TraceContext(TRACE, PARENT, True)
    assert headers == {"traceparent": GOOD}


def test_a_state_without_a_parent_goes() -> None:
    assert taken(("tracestate", "a=1")) == (None, {})
