"""The Anthropic SDK, as the other two: the same through the gateway as from the engine, and charged."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import RawMessageStreamEvent

from tests.clients.comparing import plain, plain_events
from tests.clients.conftest import RUN, Both, charged, tokens
from tests.wire.conftest import GatewayUnderTest

pytestmark = pytest.mark.engine

Sdks = Both[anthropic.AsyncAnthropic]

HELLO = [{"role": "user", "content": "Hello"}]
SEARCH = {"name": "search", "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}}}
CASES: dict[str, dict[str, Any]] = {
    "text": {"messages": HELLO},
    "system": {"system": "Hm", "messages": [{"role": "user", "content": "Hi"}]},
    "blocks": {
        "system": [{"type": "text", "text": "Hm", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "metadata": {"user_id": "somebody"},
    },
    "tools that are not to be used": {"messages": HELLO, "tools": [SEARCH], "tool_choice": {"type": "none"}},
    "stopped": {"messages": HELLO, "stop_sequences": ["\n\n"]},
}


def asked(case: str) -> dict[str, Any]:
    # The newest models of Anthropic's take no temperature, and neither does its SDK any more, unless told so.
    return {"model": "tiny", "max_tokens": 6, "extra_body": {"temperature": 0}, **CASES[case]}


async def events_of(sdk: anthropic.AsyncAnthropic, **fields: Any) -> list[RawMessageStreamEvent]:
    return [event async for event in await sdk.messages.create(**fields, stream=True)]


@pytest.mark.parametrize("case", CASES)
async def test_messages(anthropic_sdk: Sdks, real: GatewayUnderTest, case: str) -> None:
    direct = await anthropic_sdk.direct.messages.create(**asked(case))
    through = await anthropic_sdk.through.messages.create(**asked(case))
    assert plain(through) == plain(direct)
    (task,) = await charged(real)
    assert tokens(task) == (through.usage.input_tokens, 0, through.usage.output_tokens)


@pytest.mark.parametrize("case", CASES)
async def test_streams(anthropic_sdk: Sdks, real: GatewayUnderTest, case: str) -> None:
    direct = await events_of(anthropic_sdk.direct, **asked(case))
    through = await events_of(anthropic_sdk.through, **asked(case))
    assert plain_events(through) == plain_events(direct)
    assert [through[0].type, through[-1].type] == ["message_start", "message_stop"]
    (end,) = [event for event in through if event.type == "message_delta"]
    (task,) = await charged(real)
    assert tokens(task) == (end.usage.input_tokens, 0, end.usage.output_tokens)


async def test_the_sdks_own_reading_of_a_stream(anthropic_sdk: Sdks) -> None:
    async with anthropic_sdk.through.messages.stream(**asked("text")) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert message.content[0].type == "text"
    assert "".join(texts) == message.content[0].text
    assert message.usage.output_tokens == 6


async def test_what_the_engine_had_cached_is_told_and_not_charged(anthropic_sdk: Sdks, real: GatewayUnderTest) -> None:
    """Anthropic's usage counts it apart from the rest of the prompt."""
    fields = {**asked("text"), "messages": [{"role": "user", "content": "Kept. " * 40}]}
    first = (await anthropic_sdk.through.messages.create(**fields)).usage
    (end,) = [e for e in await events_of(anthropic_sdk.through, **fields) if e.type == "message_delta"]
    second = end.usage
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens
    assert second.cache_read_input_tokens >= 32, "the engine's blocks are of 32 tokens"
    prompt = first.input_tokens + (first.cache_creation_input_tokens or 0)
    tasks = await charged(real)
    assert [tokens(task) for task in tasks] == [(prompt, 0, 6), (prompt, second.cache_read_input_tokens, 6)]


@pytest.mark.parametrize("case", ["text", "system", "blocks", "tools that are not to be used"])
async def test_tokens_are_counted(anthropic_sdk: Sdks, real: GatewayUnderTest, case: str) -> None:
    fields = {name: asked(case)[name] for name in asked(case) if name not in ("max_tokens", "extra_body", "metadata")}
    direct = await anthropic_sdk.direct.messages.count_tokens(**fields)
    through = await anthropic_sdk.through.messages.count_tokens(**fields)
    assert plain(through) == plain(direct)
    assert through.input_tokens > 0
    assert real.app.flow.agents.by_id == {}, "nobody is charged for that"


async def test_models(anthropic_sdk: Sdks) -> None:
    assert [model.id async for model in anthropic_sdk.through.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tools": [SEARCH]}, anthropic.BadRequestError),  # this engine has no parser for tools
        ({"max_tokens": 20_000}, anthropic.BadRequestError),  # with more its SDK insists on a stream
        ({"model": "unknown"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_refused_in_its_words(
    anthropic_sdk: Sdks,
    real: GatewayUnderTest,
    fields: dict[str, Any],
    error: type[anthropic.APIStatusError],
    stream: bool,
) -> None:
    with pytest.raises(error) as through:
        await anthropic_sdk.through.messages.create(**{**asked("text"), **fields}, stream=stream)
    with pytest.raises(error) as direct:
        await anthropic_sdk.direct.messages.create(**{**asked("text"), **fields}, stream=stream)
    assert through.value.body == direct.value.body
    assert through.value.body["type"] == "error"  # type: ignore[index]
    assert real.app.flow.queue.agents[f"default/{RUN}"].arrived == 0  # type: ignore[index]


async def test_both_ways_to_send_a_key_reach_the_engine(real: GatewayUnderTest) -> None:
    """It has none set, and does not mind."""
    body = {"model": "tiny", "max_tokens": 6, "messages": HELLO}
    for headers in ({"x-api-key": "k"}, {"Authorization": "Bearer k"}):
        answer = await real.client.post("/v1/messages", json=body, headers=headers)
        assert answer.status_code == httpx.codes.OK
