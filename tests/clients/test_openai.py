"""The OpenAI SDK gets through the gateway what it gets from the engine, and its agent is charged what the answer says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.clients.comparing import plain, plain_chunks
from tests.clients.conftest import RUN, Both, charged, tokens
from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest

pytestmark = pytest.mark.engine

Sdks = Both[openai.AsyncOpenAI]

# Short prompts: of longer ones the second to ask would find a part in the engine's cache, and be told so.
MESSAGES = [{"role": "user", "content": "Hello"}]
SAMPLED = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "many": {"type": "boolean"}},
    "required": ["colour", "many"],
    "additionalProperties": False,
}
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

CHATS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 8},
    "sampled": {**SAMPLED, "top_p": 0.9, "frequency_penalty": 0.5},
    "max_completion_tokens": {"temperature": 0, "max_completion_tokens": 5},
    "three": {**SAMPLED, "n": 3},
    "logprobs": {**SAMPLED, "logprobs": True, "top_logprobs": 2},
    "tools that are not to be used": {**SAMPLED, "tools": [SEARCH], "tool_choice": "none"},
    "parts": {**SAMPLED, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    "fields of others": {**SAMPLED, "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "store": False},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "sampled": SAMPLED,
    "two prompts, two answers each": {**SAMPLED, "prompt": ["One", "Two"], "n": 2},
    "tokens, echoed, with logprobs": {**SAMPLED, "prompt": [40, 69, 76], "echo": True, "logprobs": 1},
}


async def chat(sdk: openai.AsyncOpenAI, stream: bool, fields: dict[str, Any]) -> tuple[Any, Any]:
    """What was said, and the usage."""
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **fields}
    if not stream:
        answer = await sdk.chat.completions.create(**asked)
        return plain(answer), answer.usage
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    ]
    return plain_chunks(chunks), chunks[-1].usage


async def complete(sdk: openai.AsyncOpenAI, stream: bool, fields: dict[str, Any]) -> tuple[Any, Any]:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", **fields}
    if not stream:
        answer = await sdk.completions.create(**asked)
        return plain(answer), answer.usage
    chunks = [
        chunk
        async for chunk in await sdk.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    ]
    return plain_chunks(chunks), chunks[-1].usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", CHATS)
async def test_chats(openai_sdk: Sdks, real: GatewayUnderTest, case: str, stream: bool) -> None:
    direct, _ = await chat(openai_sdk.direct, stream, CHATS[case])
    through, usage = await chat(openai_sdk.through, stream, CHATS[case])
    assert through == direct
    (task,) = await charged(real)
    assert tokens(task) == (usage.prompt_tokens, 0, usage.completion_tokens)
    assert task.sequences == CHATS[case].get("n", 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", COMPLETIONS)
async def test_completions(openai_sdk: Sdks, real: GatewayUnderTest, case: str, stream: bool) -> None:
    direct, _ = await complete(openai_sdk.direct, stream, COMPLETIONS[case])
    through, usage = await complete(openai_sdk.through, stream, COMPLETIONS[case])
    assert through == direct
    (task,) = await charged(real)
    assert tokens(task) == (usage.prompt_tokens, 0, usage.completion_tokens)


async def test_what_the_engine_had_cached_is_told_and_not_charged(
    openai_sdk: Sdks, real: GatewayUnderTest, engine: LiveEngine
) -> None:
    asked = {"messages": [{"role": "user", "content": "Cached. " * 40}], "max_tokens": 4}
    _, first = await chat(openai_sdk.through, False, asked)
    _, second = await chat(openai_sdk.through, True, asked)
    cached = second.prompt_tokens_details.cached_tokens
    assert first.prompt_tokens_details.cached_tokens == 0
    assert cached >= 32, "the engine's blocks are of 32 tokens"
    tasks = await charged(real)
    assert [tokens(task) for task in tasks] == [(first.prompt_tokens, 0, 4), (second.prompt_tokens, cached, 4)]


@pytest.fixture
async def unspaced(engine_url: str) -> dict[str, int]:
    """Bias against white space, which JSON allows and of which a model that makes noise would make a lot."""
    async with httpx.AsyncClient(base_url=engine_url) as client:
        return {
            str(token): -100
            for text in " \n\t\r"
            for token in (await client.post("/tokenize", json={"model": "tiny", "prompt": text})).json()["tokens"]
        }


@pytest.mark.parametrize("stream", [False, True])
async def test_structured_output_parses(openai_sdk: Sdks, unspaced: dict[str, int], stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    fields = {**SAMPLED, "max_tokens": 60, "response_format": wanted, "logit_bias": unspaced}
    direct, _ = await chat(openai_sdk.direct, stream, fields)
    through, _ = await chat(openai_sdk.through, stream, fields)
    assert through == direct
    said = json.loads(through["choices"][0]["delta" if stream else "message"]["content"])
    assert said["colour"] in ("red", "green")
    assert isinstance(said["many"], bool)


async def test_the_sdks_own_parser_gets_its_model(openai_sdk: Sdks, unspaced: dict[str, int]) -> None:
    class Flag(BaseModel):
        up: bool

    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 60, "logit_bias": unspaced}
    answer = await openai_sdk.through.chat.completions.parse(model="tiny", response_format=Flag, **fields)
    assert answer.choices[0].message.parsed in (Flag(up=True), Flag(up=False))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [SEARCH], "tool_choice": "auto"}, "--tool-call-parser"),
        ({"tools": [SEARCH], "tool_choice": "required"}, "--tool-call-parser"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]},
            "not a multimodal model",
        ),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_refused_in_its_words(
    openai_sdk: Sdks, real: GatewayUnderTest, fields: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as through:
        await chat(openai_sdk.through, stream, fields)
    with pytest.raises(openai.BadRequestError) as direct:
        await chat(openai_sdk.direct, stream, fields)
    assert through.value.body == direct.value.body
    assert real.app.flow.queue.agents[f"default/{RUN}"].arrived == 0  # type: ignore[index]


async def test_models_and_tokens(openai_sdk: Sdks, real: GatewayUnderTest, engine_url: str) -> None:
    assert plain(await openai_sdk.through.models.list()) == plain(await openai_sdk.direct.models.list())
    async with httpx.AsyncClient(base_url=engine_url) as direct:
        for path, body in (
            ("/tokenize", {"model": "tiny", "prompt": "Hello"}),
            ("/tokenize", {"model": "tiny", "messages": MESSAGES, "return_token_strs": True}),
            ("/detokenize", {"model": "tiny", "tokens": [40, 69, 76]}),
            ("/tokenize", {"model": "unknown", "prompt": "Hello"}),
        ):
            answer = await real.client.post(path, json=body)
            expected = await direct.post(path, json=body)
            assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    assert real.app.flow.agents.by_id == {}, "nobody is charged for that"


async def test_the_agent_and_where_it_was_found_come_back(openai_sdk: Sdks) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}
    raw = await openai_sdk.through.chat.completions.with_raw_response.create(model="tiny", **fields)
    assert raw.headers["x-agent-id"] == RUN
    assert raw.headers["x-agent-source"] == "x-agent-id"
    assert float(raw.headers["x-justitia-queue-ms"]) >= 0
