from __future__ import annotations

import msgspec
import pytest

from gateway.protocol.errors import InvalidRequest
from gateway.protocol.identify import Identity, identify


def identified(headers: dict[str, str] | None = None, **fields: object) -> Identity:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return identify({name.lower(): value for name, value in (headers or {}).items()}, raw)


# In the order in which they count.
SAID: list[tuple[dict[str, str], dict[str, object], str, str]] = [
    ({"X-Agent-ID": "a"}, {}, "a", "x-agent-id"),
    ({}, {"agent_id": "b"}, "b", "agent_id"),
    ({}, {"program_id": "p"}, "p", "program_id"),
    ({"x-llm-d-inference-fairness-id": "f"}, {}, "f", "x-llm-d-inference-fairness-id"),
    ({"x-gateway-inference-fairness-id": "g"}, {}, "g", "x-gateway-inference-fairness-id"),
    ({"X-Dynamo-Session-ID": "d"}, {}, "d", "x-dynamo-session-id"),
    ({"x-litellm-trace-id": "t"}, {}, "t", "x-litellm-trace-id"),
    ({"x-litellm-session-id": "l"}, {}, "l", "x-litellm-session-id"),
    ({"x-bf-session-id": "bf"}, {}, "bf", "x-bf-session-id"),
    ({"x-claude-code-session-id": "c", "x-claude-code-agent-id": "sub"}, {}, "c", "x-claude-code-session-id"),
    ({"thread-id": "th"}, {}, "th", "thread-id"),
    ({"session-id": "s-"}, {}, "s-", "session-id"),
    ({"session_id": "s_"}, {}, "s_", "session_id"),
    ({"x-session-affinity": "o"}, {}, "o", "x-session-affinity"),
    ({"X-Qwen-Code-Session-Id": "q"}, {}, "q", "x-qwen-code-session-id"),
    ({"X-Amp-Thread-Id": "T-1"}, {}, "T-1", "x-amp-thread-id"),
    ({"X-Session-ID": "xs"}, {}, "xs", "x-session-id"),
    ({"x-some-vendor-session-id": "v"}, {}, "v", "x-some-vendor-session-id"),
    ({}, {"session_id": "bs"}, "bs", "session_id"),
    ({}, {"metadata": {"session_id": "ms", "agent_id": "x"}}, "ms", "metadata.session_id"),
    ({}, {"metadata": {"agent_id": "ma"}}, "ma", "metadata.agent_id"),
    ({}, {"metadata": {"user_id": "mu"}}, "mu", "metadata.user_id"),
    ({}, {"prompt_cache_key": "k"}, "k", "prompt_cache_key"),
    ({}, {"safety_identifier": "si"}, "si", "safety_identifier"),
    ({}, {"user": "u"}, "u", "user"),
]


@pytest.mark.parametrize(("headers", "fields", "name", "source"), SAID)
def test_where_the_name_comes_from(headers: dict[str, str], fields: dict[str, object], name: str, source: str) -> None:
    found = identified(headers, **fields)
    assert (found.name, found.source) == (name, source)


@pytest.mark.parametrize("place", range(len(SAID) - 1))
def test_the_first_of_them_counts(place: int) -> None:
    """Each goes before all that come after it; one `metadata` holds one of its three."""
    headers: dict[str, str] = {}
    fields: dict[str, object] = {}
    for more_headers, more_fields, _, _ in reversed(SAID[place:]):
        headers |= more_headers
        fields |= more_fields
    assert identified(headers, **fields).source == SAID[place][3]


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({}, {}),
        ({"X-Request-ID": "r", "traceparent": "00-1-2-01"}, {}),
        ({"X-Session-ID": "", "x-vendor-session-id": ""}, {"user": "", "prompt_cache_key": None}),
        ({"x-vendor-parent-session-id": "p", "x-parent-session-id": "p"}, {}),
        ({}, {"user": 5, "metadata": "m", "prompt_cache_key": ["k"], "session_id": {}}),
        ({}, {"metadata": {"session_id": 7, "other": "o"}}),
        ({"X-Agent-Parent": "root"}, {}),
    ],
)
def test_none_is_made_up(headers: dict[str, str], fields: dict[str, object]) -> None:
    found = identified(headers, **fields)
    assert (found.name, found.source) == (None, "none")


def test_class_and_final() -> None:
    found = identified({"X-Agent-Class": "map-reduce", "X-Agent-Final": "True"})
    assert (found.agent_class, found.final) == ("map-reduce", True)
    assert identified().final is False
    assert identified({"X-Dynamo-Session-ID": "d", "X-Dynamo-Session-Final": "true"}).final is True
    assert identified({"X-Agent-ID": "a", "X-Dynamo-Session-Final": "true"}).final is False


def test_a_part_of_claude_codes_does_not_end_the_whole() -> None:
    session = {"x-claude-code-session-id": "c", "X-Agent-Final": "true"}
    assert identified(session).final
    assert not identified({**session, "x-claude-code-agent-id": "sub"}).final


def test_how_many_tasks_the_client_expects() -> None:
    assert identified({"X-Agent-Tasks": "17"}).expected_tasks == 17
    assert identified().expected_tasks is None


@pytest.mark.parametrize(("value", "weight"), [("2", 2.0), ("0.25", 0.25), ("1000000", 1e6)])
def test_the_weight_that_is_asked_for(value: str, weight: float) -> None:
    assert identified({"X-Agent-Weight": value}).weight == weight
    assert identified().weight is None


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "1e3", "1000001", "²", "1.", "0.0"])
def test_no_weight_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="x-agent-weight"):
        identified({"X-Agent-Weight": value})


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "1.5", "9999999", "²"])
def test_no_number_of_tasks_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="x-agent-tasks"):
        identified({"X-Agent-Tasks": value})


@pytest.mark.parametrize("name", ["X-Agent-ID", "X-Agent-Parent", "X-Agent-Class"])
@pytest.mark.parametrize("value", ["", "two words", "x" * 256, "tab\there", "\x80"])
def test_absurd_ids_of_ours_are_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match="visible ASCII"):
        identified({name: value})


@pytest.mark.parametrize("value", [5, "two words", ["a"]])
def test_our_fields_are_checked_too(value: object) -> None:
    with pytest.raises(InvalidRequest, match="agent_id"):
        identified(agent_id=value)


@pytest.mark.parametrize("fields", [{"agent_id": 5}, {"program_id": ""}, {"agent_id": "ok", "program_id": "two words"}])
def test_our_fields_are_checked_also_where_another_goes_before_them(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"agent_id|program_id"):
        identified({"X-Agent-ID": "a"}, **fields)


@pytest.mark.parametrize("key", ["support bot / user 42", "é", "x" * 256])
def test_any_text_of_others_names_an_agent(key: str) -> None:
    for found, again, other in (
        [identified(prompt_cache_key=text).name for text in (key, key, key + "!")],
        [identified({"X-Session-ID": text}).name for text in (key, key, key + "!")],
    ):
        assert found == again != other
        assert found is not None
        assert len(found) == 64


@pytest.mark.parametrize(
    ("headers", "parent"),
    [
        ({"X-Agent-ID": "c", "X-Agent-Parent": "p"}, "p"),
        ({"X-Dynamo-Session-ID": "c", "X-Dynamo-Parent-Session-ID": "p"}, "p"),
        ({"thread-id": "c", "x-codex-parent-thread-id": "p"}, "p"),
        ({"thread-id": "c", "session-id": "root", "x-codex-parent-thread-id": "p"}, "root"),
        ({"thread-id": "c", "session-id": "c", "x-codex-parent-thread-id": "p"}, "p"),
        ({"thread-id": "c", "session-id": "c"}, None),
        ({"session_id": "c", "x-codex-parent-thread-id": "p"}, "p"),
        ({"x-session-affinity": "c", "X-Session-Id": "c", "x-parent-session-id": "p"}, "p"),
        ({"X-Session-Id": "c", "x-parent-session-id": "p"}, "p"),
        ({"thread-id": "c", "x-codex-parent-thread-id": "p", "X-Agent-Parent": "ours"}, "ours"),
        ({"X-Agent-ID": "c", "x-codex-parent-thread-id": "p"}, None),
    ],
)
def test_whose_part_it_is(headers: dict[str, str], parent: str | None) -> None:
    assert identified(headers).parent == parent
