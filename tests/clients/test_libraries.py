"""SDKs and frameworks that say nothing of themselves: one line names the agent. Without it each request is its own."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import openai
import pytest

from tests.clients.conftest import anthropic_client, openai_client
from tests.wire.conftest import GatewayUnderTest
from tests.wire.scripted_dialects import in_dialect
from tests.wire.scripted_engine import ScriptedEngine

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def answers(scripted: ScriptedEngine) -> None:
    scripted.default = in_dialect


async def agents(gateway: GatewayUnderTest) -> dict[str, tuple[str, int]]:
    """Where each was found, and its tasks that have ended."""
    listed = (await gateway.client.get("/v1/agents")).json()["data"]
    return {agent["id"]: (agent["source"], agent["tasks"]["ended"]) for agent in listed}


async def by_all_three(sdk: openai.AsyncOpenAI, **fields: Any) -> set[tuple[str, str]]:
    """A request to each of the SDK's endpoints for text: the agent, and where it was found, of each."""
    chat = await sdk.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, **fields)
    completion = await sdk.completions.with_raw_response.create(
        model="tiny",
        prompt="Hello",
        extra_headers=fields.get("extra_headers"),
        extra_body={name: value for name, value in fields.items() if name not in ("extra_headers", "extra_body")}
        | fields.get("extra_body", {}),
    )
    response = await sdk.responses.with_raw_response.create(model="tiny", input="Hello", **fields)
    return {(raw.headers["x-agent-id"], raw.headers["x-agent-source"]) for raw in (chat, completion, response)}


async def test_a_run_by_the_clients_default_headers(gateway: GatewayUnderTest) -> None:
    """As LangChain, LlamaIndex, CrewAI and AutoGen take them, and hand them to the SDK."""
    for run in ("run-1", "run-2"):
        async with openai_client(gateway.url, default_headers={"X-Agent-ID": run, "X-Agent-Class": "report"}) as sdk:
            assert await by_all_three(sdk) == {(run, "x-agent-id")}
    assert await agents(gateway) == {"run-1": ("x-agent-id", 3), "run-2": ("x-agent-id", 3)}
    classes = [agent["class"] for agent in (await gateway.client.get("/v1/agents")).json()["data"]]
    assert classes == ["report", "report"]


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"extra_headers": {"X-Agent-ID": "a"}}, "x-agent-id"),  # as OpenAI's Agents SDK has it in its model settings
        ({"extra_headers": {"X-Session-ID": "a"}}, "x-session-id"),
        ({"extra_body": {"agent_id": "a"}}, "agent_id"),
        ({"extra_body": {"program_id": "a"}}, "program_id"),
        ({"extra_body": {"session_id": "a"}}, "session_id"),
        ({"metadata": {"session_id": "a", "purpose": "test"}}, "metadata.session_id"),
        ({"metadata": {"agent_id": "a"}}, "metadata.agent_id"),
        ({"prompt_cache_key": "a"}, "prompt_cache_key"),
        ({"safety_identifier": "a"}, "safety_identifier"),
        ({"user": "a"}, "user"),
    ],
)
async def test_a_run_by_what_each_request_says(gateway: GatewayUnderTest, fields: dict[str, Any], source: str) -> None:
    async with openai_client(gateway.url) as sdk:
        assert await by_all_three(sdk, **fields) == {("a", source)}
    assert await agents(gateway) == {"a": (source, 3)}


async def test_a_user_of_anthropics(gateway: GatewayUnderTest) -> None:
    async with anthropic_client(gateway.url) as sdk:
        for user in ("a", "b", "a"):
            await sdk.messages.create(model="tiny", max_tokens=5, messages=MESSAGES, metadata={"user_id": user})
    assert await agents(gateway) == {"a": ("metadata.user_id", 2), "b": ("metadata.user_id", 1)}


async def test_parts_of_a_run(gateway: GatewayUnderTest) -> None:
    """A framework that numbers its steps can say of what they are steps."""
    async with openai_client(gateway.url, default_headers={"X-Agent-Parent": "run-1"}) as sdk:
        for step in ("run-1", "step-1", "step-2"):
            await sdk.chat.completions.create(model="tiny", messages=MESSAGES, extra_headers={"X-Agent-ID": step})
    assert await agents(gateway) == {"run-1": ("x-agent-id", 3)}


async def test_the_last_request_ends_its_agent(gateway: GatewayUnderTest) -> None:
    async with openai_client(gateway.url, default_headers={"X-Agent-ID": "run-1"}) as sdk:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES)
        assert list(await agents(gateway)) == ["run-1"]
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, extra_headers={"X-Agent-Final": "true"})
    assert await agents(gateway) == {}


async def test_without_any_id_each_request_is_its_own_agent(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    async with openai_client(gateway.url) as sdk, anthropic_client(gateway.url) as other:
        found = await by_all_three(sdk) | await by_all_three(sdk)
        raw = await other.messages.with_raw_response.create(model="tiny", max_tokens=5, messages=MESSAGES)
    assert len(found) == 6
    assert {source for _, source in found} | {raw.headers["x-agent-source"]} == {"none"}
    assert len({body["vllm_xargs"]["justitia_agent"] for body in scripted.bodies}) == 7
    assert await agents(gateway) == {}, "each has ended with its only request"


async def test_nobody_sets_the_gateways_own_hints(gateway: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    """They would be those of another agent, or go before all others."""
    theirs = {"justitia_agent": "default/b", "justitia_task": 1, "justitia_tag": -5, "mine": 1}
    async with openai_client(gateway.url, default_headers={"X-Agent-ID": "a", "x-vllm-priority": "-5"}) as sdk:
        await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={"priority": -5, "vllm_xargs": theirs}
        )
    async with anthropic_client(gateway.url, default_headers={"X-Agent-ID": "a", "x-vllm-priority": "-5"}) as other:
        await other.messages.create(model="tiny", max_tokens=5, messages=MESSAGES, extra_body={"vllm_xargs": theirs})
    chat, message = scripted.bodies
    for body in (chat, message):
        assert body["vllm_xargs"]["justitia_agent"] == "default/a"
        assert body["vllm_xargs"]["justitia_task"] > 10**18
        assert body["vllm_xargs"]["mine"] == 1
    assert chat["priority"] > 0
    assert "justitia_tag" not in chat["vllm_xargs"]
    assert message["vllm_xargs"]["justitia_tag"] > 0
    # For vLLM the header goes over the body.
    tags = [headers.get("x-vllm-priority") for headers in scripted.headers]
    assert tags == [None, str(message["vllm_xargs"]["justitia_tag"])]


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "responses"])
async def test_images_arrive_byte_for_byte(gateway: GatewayUnderTest, scripted: ScriptedEngine, dialect: str) -> None:
    data = "iVBORw0KGgo/+A" * 20_000
    url = f"data:image/png;base64,{data}"
    async with openai_client(gateway.url) as sdk, anthropic_client(gateway.url) as other:
        content: Any
        if dialect == "openai":
            content = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}]
            await sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
        elif dialect == "responses":
            content = [{"type": "input_image", "image_url": url, "detail": "auto"}]
            await sdk.responses.create(model="tiny", input=[{"role": "user", "content": content}])
        else:
            content = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}]
            await other.messages.create(model="tiny", max_tokens=5, messages=[{"role": "user", "content": content}])
    (body,) = scripted.bodies
    (message,) = body["input"] if dialect == "responses" else body["messages"]
    assert message["content"] == content
    assert data.encode() in scripted.raw[0]


async def test_tools_and_structures_arrive_as_they_were_given(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    schema = {"type": "object", "properties": {"π": {"type": "number", "default": 3.10}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    choice: Any = {"type": "function", "function": {"name": "f"}}
    async with openai_client(gateway.url) as sdk:
        await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[tool], tool_choice=choice, response_format=wanted  # type: ignore[list-item]
        )  # fmt: skip
    (body,) = scripted.bodies
    assert (body["tools"], body["tool_choice"], body["response_format"]) == ([tool], choice, wanted)


async def test_the_synchronous_clients(gateway: GatewayUnderTest) -> None:
    def run() -> tuple[str | None, str]:
        with (
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as sdk,
            anthropic.Anthropic(base_url=gateway.url, api_key="none") as other,
            other.messages.stream(model="tiny", max_tokens=5, messages=MESSAGES) as stream,
        ):
            chat = sdk.chat.completions.create(model="tiny", messages=MESSAGES, user="sync")
            return chat.choices[0].message.content, "".join(stream.text_stream)

    assert await asyncio.to_thread(run) == ("hello", "hello")
