from __future__ import annotations

import msgspec
import pytest
from starlette.datastructures import Headers

from gateway.errors import InvalidRequest
from gateway.identify import Identity, identify


def identified(headers: dict[str, str] | None = None, **fields: object) -> Identity:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return identify(Headers(headers or {}), raw)


@pytest.mark.parametrize(
    ("headers", "fields", "agent_id", "source"),
    [
        ({"X-Agent-ID": "a", "X-Session-ID": "s"}, {"prompt_cache_key": "k"}, "a", "x-agent-id"),
        ({"X-Session-ID": "s"}, {"prompt_cache_key": "k"}, "s", "x-session-id"),
        ({}, {"prompt_cache_key": "k"}, "k", "prompt_cache_key"),
        ({}, {"prompt_cache_key": None}, None, "none"),
        ({}, {"prompt_cache_key": ""}, None, "none"),
        ({"X-Request-ID": "r"}, {"user": "u"}, None, "none"),
    ],
)
def test_where_the_id_comes_from(
    headers: dict[str, str], fields: dict[str, object], agent_id: str | None, source: str
) -> None:
    found = identified(headers, **fields)
    assert (found.agent_id, found.source) == (agent_id, source)


def test_class_and_final() -> None:
    found = identified({"X-Agent-Class": "map-reduce", "X-Agent-Final": "True"})
    assert (found.agent_class, found.final) == ("map-reduce", True)
    assert identified().final is False


def test_how_many_tasks_the_client_expects() -> None:
    assert identified({"X-Agent-Tasks": "17"}).expected_tasks == 17
    assert identified().expected_tasks is None


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "1.5", "9999999", "²"])
def test_no_number_of_tasks_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="x-agent-tasks"):
        identified({"X-Agent-Tasks": value})


@pytest.mark.parametrize("value", ["", "two words", "x" * 256, "tab\there", "\x80"])
def test_absurd_ids_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="visible ASCII"):
        identified({"X-Agent-ID": value})


@pytest.mark.parametrize("key", ["support bot / user 42", "é", "x" * 256])
def test_any_prompt_cache_key_names_an_agent(key: str) -> None:
    found, again, other = (identified(prompt_cache_key=text).agent_id for text in (key, key, key + "!"))
    assert found == again != other
    assert found is not None
    assert len(found) == 64
