"""Clients → gateway → fair queue → real vLLM with our scheduler."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest, running_gateway

pytestmark = pytest.mark.engine


@pytest.fixture
async def real(engine: LiveEngine) -> AsyncIterator[GatewayUnderTest]:
    engine.wait_ready()
    async with running_gateway(engine=engine.url, link=engine.link_address) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        yield gateway


@pytest.fixture
async def sdk(real: GatewayUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    """The one line that a user changes: the base URL; and the agent's id, for all requests of a run."""
    client = openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", default_headers={"X-Agent-ID": "run-1"})
    yield client
    await client.close()


async def engine_gauge(engine: LiveEngine, name: str) -> float:
    """Of vLLM's own metrics, not of what it tells us."""
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=engine.socket), base_url="http://engine"
    ) as client:
        exposition = (await client.get("/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", exposition, re.MULTILINE))


async def test_the_openai_sdk_is_answered(sdk: openai.AsyncOpenAI, real: GatewayUnderTest) -> None:
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    answer = await sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, seed=1
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    completion = await sdk.completions.create(model="tiny", prompt="Hello", max_tokens=4)
    assert completion.choices[0].text
    agents = (await real.client.get("/v1/agents")).json()["data"]
    assert [(agent["id"], agent["tasks"]["ended"]) for agent in agents] == [("run-1", 2)]
    record = real.app.flow.agents.by_id["default/run-1"]  # type: ignore[index]
    assert [task.decode_tokens for task in record.tasks] == [answer.usage.completion_tokens, 4]
    assert record.tasks[0].prompt_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize("asked", [True, False])
async def test_the_openai_sdk_streams(sdk: openai.AsyncOpenAI, real: GatewayUnderTest, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    stream = await sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        stream=True,
        extra_body=options,
    )
    chunks = [chunk async for chunk in stream]
    assert sum(len(chunk.choices) for chunk in chunks) >= 2
    assert [bool(chunk.usage) for chunk in chunks].count(True) == (1 if asked else 0)
    record = real.app.flow.agents.by_id["default/run-1"]  # type: ignore[index]
    assert record.tasks[0].decode_tokens > 0, "the gateway is told the usage all the same"


async def test_the_engines_refusal_is_what_the_sdk_sees(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="unknown", messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.BadRequestError):
        await sdk.completions.create(model="tiny", prompt="Hello", max_tokens=10**6)


async def test_agents_are_served_in_the_order_of_their_tags(engine: LiveEngine) -> None:
    """One agent takes all slots; of two that come after it the cheaper is done first, though it came last."""
    engine.lengths({"order-first": 900, "order-large": 600, "order-small": 20})
    ended: list[str] = []

    async with running_gateway(
        engine=engine.url, link=engine.link_address, max_in_flight=3, max_engine_waiting=0
    ) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)

        async def one(agent: str) -> None:
            xargs = {"forced_length_key": f"order-{agent}"}
            text = "x" * (40 if agent == "small" else 2000)
            answer = await gateway.chat(f"{agent}", messages=[{"role": "user", "content": text}], vllm_xargs=xargs)
            assert answer.status_code == 200, answer.text
            ended.append(agent)

        async with asyncio.TaskGroup() as tasks:
            for waiting, agent in enumerate(("first", "large", "small")):
                for _ in range(3):
                    tasks.create_task(one(agent))
                await gateway.until(lambda waiting=waiting: gateway.app.flow.queue.waiting == 3 * waiting)  # type: ignore[misc]
                await gateway.until(lambda: gateway.app.flow.queue.in_flight == 3)
        assert ended == ["first"] * 3 + ["small"] * 3 + ["large"] * 3
        assert gateway.is_empty()


async def test_forty_agents_whose_clients_are_killed_leave_nothing_behind(
    engine: LiveEngine, real: GatewayUnderTest
) -> None:
    engine.lengths({"killed": 1500})

    async def one(agent: int) -> None:
        await real.chat(
            f"killed-{agent}",
            messages=[{"role": "user", "content": "words " * 20}],
            stream=agent % 2 == 0,
            vllm_xargs={"forced_length_key": "killed"},
        )

    clients = [asyncio.create_task(one(agent)) for agent in range(40)]
    queue = real.app.flow.queue
    await real.until(lambda: queue.waiting + queue.in_flight == 40, *clients)
    await real.until(lambda: real.app.flow.engine.held_tokens > 0, *clients)
    async with asyncio.timeout(10):  # vLLM's own gauge follows a step later
        while not await engine_gauge(engine, "vllm:num_requests_running"):
            await asyncio.sleep(0.01)
    for client in clients:
        client.cancel()
    await real.until(real.is_empty)
    await real.until(lambda: real.app.flow.engine.held_tokens == 0 and real.app.flow.engine.running == 0)
    async with asyncio.timeout(10):
        while await engine_gauge(engine, "vllm:num_requests_running") or await engine_gauge(
            engine, "vllm:kv_cache_usage_perc"
        ):
            await asyncio.sleep(0.05)
    assert (await real.chat("after", max_tokens=4)).status_code == 200


def engine_core_pid(server_pid: int) -> int:
    """vLLM's core runs in a child process of its server."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid, _, rest = stat.read_text().partition(" (")
        if (
            rest.rpartition(")")[2].split()[1] == str(server_pid)
            and b"EngineCore" in (stat.parent / "cmdline").read_bytes()
        ):
            return int(pid)
    raise AssertionError("the engine's core was not found")


@pytest.mark.parametrize("victim", ["server", "core"])
async def test_a_killed_engine_gives_clean_answers_and_is_served_again(
    engine: LiveEngine, real: GatewayUnderTest, victim: str
) -> None:
    """Tasks that have had no byte go again, those in mid-stream end with an error event; nothing hangs, nothing is lost."""
    engine.lengths({"dies": 1000})
    xargs = {"forced_length_key": "dies"}
    started = asyncio.Event()

    async def streaming() -> bytes:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "vllm_xargs": xargs}
        received = b""
        async with real.client.stream(
            "POST", "/v1/chat/completions", json=body, headers={"X-Agent-ID": "stream"}
        ) as answer:
            async for chunk in answer.aiter_bytes():
                received += chunk
                started.set()
        return received

    async def whole(agent: int) -> httpx.Response:
        return await real.chat(f"whole-{agent}", messages=[{"role": "user", "content": "hi " * 30}], vllm_xargs=xargs)

    stream = asyncio.create_task(streaming())
    await started.wait()
    tasks = [asyncio.create_task(whole(agent)) for agent in range(12)]
    await real.until(lambda: real.app.flow.queue.waiting + real.app.flow.queue.in_flight == 13, *tasks)
    pid = engine.process.pid
    assert pid is not None
    restarts = engine.process.restarts
    os.kill(pid if victim == "server" else engine_core_pid(pid), signal.SIGKILL)
    broken = await stream
    assert b'"error"' in broken
    assert broken.endswith(b"data: [DONE]\n\n")
    assert (await real.chat("while-away", max_tokens=4)).status_code in (200, 502, 503)
    answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [200] * 12, [answer.text for answer in answers]
    assert engine.process.restarts == restarts + 1
    assert real.is_empty()
    assert (await real.chat("after", max_tokens=4)).status_code == 200
