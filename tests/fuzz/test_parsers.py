"""The parsers, with what is nearly right."""

from __future__ import annotations

import json
import string

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.flowcontrol import agent_id_of
from gateway.flowcontrol.agents import Roots
from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect
from gateway.protocol.endpoints import CHAT, COMPLETIONS, Endpoint
from gateway.protocol.identify import ID_FIELDS
from tests.flowcontrol.test_roots import fold
from tests.fuzz.bounds import bounded
from tests.fuzz.properties import body_holds, identity_holds, metrics_hold, stream_holds, usage_holds
from tests.fuzz.values import HEADERS, any_body, endpoints, header_values, json_text


@given(any_body, endpoints)
@example(b"[" * 10_000_000, CHAT)
@example(b'{"prompt":[' + b'"",' * 10**6 + b'""]}', COMPLETIONS)
@bounded(1200)
def test_bodies(data: bytes, endpoint: Endpoint) -> None:
    body_holds(data, endpoint)


@given(
    st.dictionaries(st.sampled_from(HEADERS), header_values, max_size=6),
    st.dictionaries(st.sampled_from(ID_FIELDS), json_text, max_size=3),
)
@bounded(600)
def test_identities(headers: dict[str, str], fields: dict[str, str]) -> None:
    identity_holds(headers, {name: msgspec.Raw(text.encode("utf-8", "surrogatepass")) for name, text in fields.items()})


names = st.sampled_from("abcdef")


@given(st.lists(st.tuples(st.sampled_from(("red", "blue")), names, st.none() | names), max_size=30))
@bounded(500)
def test_folding_makes_no_circles(folds: list[tuple[str, str, str | None]]) -> None:
    """An agent's root is its own root, and who names one has it, unless it is below oneself."""
    roots = Roots()
    for tenant, name, parent in folds:
        root = fold(roots, name, parent, tenant)
        assert fold(roots, root, None, tenant) == root
        assert fold(roots, name, None, tenant) == root
        if parent is not None:
            assert fold(roots, parent, None, tenant) == root
    alone = Roots()
    for tenant, name, parent in folds:
        if tenant == "red":
            fold(alone, name, parent, tenant)
    for name in "abcdef":
        assert fold(alone, name, None, "red") == fold(roots, name, None, "red"), "another tenant's say changes nothing"


tenants = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=5)
ids = st.text(string.ascii_letters + "/.", min_size=1, max_size=8)


@given(tenants, ids, tenants, ids)
@bounded(300)
def test_no_tenant_can_name_anothers_agent(tenant: str, name: str, other: str, others: str) -> None:
    assert (agent_id_of(tenant, name) == agent_id_of(other, others)) == ((tenant, name) == (other, others))


EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"a\\n\\n"}}]}',
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
    b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
    b'data:{"usage" : {"input_tokens":3,"cache_read_input_tokens":2,"output_tokens":1}}',
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":3}}}',
    b"event: message_stop\ndata: {}",
    b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":9,"output_tokens":2}}}',
    b"event: error\ndata: {}",
    b"data: [DONE]",
    b": a comment",
    b"",
    b"\n",
)
streams = st.one_of(
    st.lists(st.sampled_from(EVENTS), max_size=8).map(lambda events: b"".join(event + b"\n\n" for event in events)),
    st.lists(st.sampled_from((*EVENTS, b"\n", b"\n\n", b"\r\n\r\n")) | st.binary(max_size=6), max_size=12).map(
        b"".join
    ),
)


@given(
    streams, st.lists(st.integers(0, 400), max_size=8), st.sampled_from((OPENAI, RESPONSES, ANTHROPIC)), st.booleans()
)
@bounded(1500)
def test_streams(data: bytes, cuts: list[int], dialect: Dialect, show: bool) -> None:
    stream_holds(data, cuts, dialect, show=show)


usage_numbers = st.one_of(st.integers(), st.sampled_from((0, 1, 2**32, 2**63, 10**200, -1, None, "5", 1.0, [], {})))
usages = st.dictionaries(
    st.sampled_from(
        (
            "prompt_tokens",
            "completion_tokens",
            "input_tokens",
            "output_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        )
    ),
    usage_numbers,
).flatmap(
    lambda usage: (
        st.sampled_from(("prompt_tokens_details", "input_tokens_details")).flatmap(
            lambda name: usage_numbers.map(lambda cached: usage | {name: {"cached_tokens": cached}})
        )
        | st.just(usage)
    )
)
answers = st.one_of(
    usages.map(lambda usage: {"usage": usage}),
    usages.map(lambda usage: {"response": {"usage": usage}}),
    usages.map(lambda usage: {"usage": None, "message": {"usage": usage}}),
)


@given(answers.map(lambda answer: json.dumps(answer).encode()) | any_body)
@bounded(800)
def test_usage(data: bytes) -> None:
    usage_holds(data)


NAMES = (
    *("vllm:iteration_tokens_total_count", "vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:iteration_tokens_total_created", "other"),
)
numbers = st.one_of(
    st.sampled_from(("0", "1", "100", "NaN", "+Inf", "-Inf", "-1", "1e400", "1e30", "²", "", "x", "0x10", "1_0")),
    st.integers().map(str),
)
sizes = st.sampled_from(("16", "1000", "²", "٣", "-1", "", "1.5", "9" * 400, "None"))
lines = st.one_of(
    st.builds("{} {}".format, st.sampled_from(NAMES), numbers),
    st.builds('{}{{engine="{}"}} {}'.format, st.sampled_from(NAMES), st.sampled_from("01"), numbers),
    st.builds('vllm:cache_config_info{{num_gpu_blocks="{}",block_size="{}"}} 1'.format, sizes, sizes),
    st.sampled_from(("# TYPE a counter", "# HELP", "#", "a{", 'a{b="', 'a{b="\\', "{} 1", 'a{b="c",} 1', "<html>")),
    st.text(max_size=12),
)
expositions = st.lists(lines, max_size=6).map("\n".join)


@given(
    st.lists(expositions | expositions.map(lambda text: f"vllm:iteration_tokens_total_count 7\n{text}\n"), max_size=3)
)
@bounded(600)
def test_metrics(told: list[str]) -> None:
    metrics_hold(told)


@pytest.mark.parametrize("fuzzed", [usage_holds, lambda data: body_holds(data, CHAT)])
@given(st.binary(max_size=200))
@bounded(200)
def test_any_bytes(fuzzed, data: bytes) -> None:  # type: ignore[no-untyped-def]
    fuzzed(data)
