"""`kill -9` of the gateway, right after an answer: what a client has seen the end of is there after the next start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo.processes import free_port
from gateway.flowcontrol.records import TenantUsage
from gateway.state import open_store
from predictor.cost import task_cost
from tests.redis_server import RedisServer
from tests.wire.scripted_engine import ScriptedEngine, wait_for_word
from tests.wire.test_commands import Command, justitia

# Of an answer of the scripted engine.
COST = task_cost(10, 4)
CLASS = {"X-Agent-Class": "kind"}
FINAL = {**CLASS, "X-Agent-Final": "true"}


@pytest.fixture(params=["sqlite", "redis"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state.db"
        return
    server = RedisServer(tmp_path / "redis", persistent=True)
    server.start()
    yield server.url
    server.kill()


class Process:
    """The command `justitia gateway`."""

    def __init__(self, command: Command, client: httpx.AsyncClient, port: int) -> None:
        self.command, self.client, self.port = command, client, port

    @property
    def pid(self) -> int:
        return self.command.process.pid

    async def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await self.command.process.wait()

    async def chat(self, agent: str | None, headers: dict[str, str] = CLASS, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
        named = {**headers, "X-Agent-ID": agent} if agent else headers
        answer = await self.client.post("/v1/chat/completions", json=body, headers=named)
        assert answer.status_code == 200
        return answer

    async def chat_and_kill(self, agent: str, *, stream: bool) -> None:
        """The signal is sent by whoever has read the answer's last byte, at once."""
        body = json.dumps({"model": "tiny", "messages": [], "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Agent-ID: {agent}\r\nX-Agent-Class: kind\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"[DONE]\n\n" if stream else b'"completion_tokens": 4}}')
        os.kill(self.pid, signal.SIGKILL)
        writer.close()
        await self.command.process.wait()

    async def agents(self) -> dict[str, dict[str, Any]]:
        """Without what begins anew: V, and where on it tags are."""
        listed = (await self.client.get("/v1/agents")).json()["data"]
        for agent in listed:
            agent["left"] = agent.pop("finish_tag") - agent.pop("backlog_tag")
        return {agent["id"]: agent for agent in listed}


@asynccontextmanager
async def gateway(engine: ScriptedEngine, state: str, journal: Path, *more: str) -> AsyncIterator[Process]:
    port = free_port()
    arguments = ["--engine", engine.url, "--port", str(port), "--state", state, "--journal", str(journal), "--no-train"]
    async with justitia("gateway", *arguments, *more) as command:
        await command.until_said("the engine is up")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            async with asyncio.timeout(20):
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
            yield Process(command, client, port)


def left_in(journal: Path) -> list[Path]:
    return list(journal.glob("*/*/*"))


async def billed(state: str) -> TenantUsage:
    store = open_store(state)
    rows = await store.usage(0, 2**60)
    await store.close()
    assert {row.tenant for row in rows} <= {"default"}
    sums = [(row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.kv_cost) for row in rows]
    return TenantUsage(*map(sum, zip(*sums, strict=True)))  # type: ignore[arg-type]


async def samples(state: str) -> list[tuple[str | None, list[float]]]:
    store = open_store(state)
    found = [(agent.agent_class, [task.cost for task in agent.tasks]) async for agent in store.read()]
    await store.close()
    return found


async def test_agents_samples_and_usage_survive_a_kill(scripted: ScriptedEngine, state: str, tmp_path: Path) -> None:
    async with gateway(scripted, state, tmp_path / "journal") as before:
        for agent in ("a", "b", "a", "c", "a"):
            await before.chat(agent, {**CLASS, "X-Agent-Tasks": "5"})
        await before.chat("done")
        await before.chat("done", FINAL)
        await before.chat(None)
        await before.chat("b", stream=True)
        agents = await before.agents()
        assert agents.keys() == {"a", "b", "c"}
        await before.chat_and_kill("last", stream=True)
    async with gateway(scripted, state, tmp_path / "journal") as after:
        found = await after.agents()
        last = found.pop("last")
        assert found == agents
        assert (last["tasks"]["ended"], last["observed_cost"], last["state"]) == (1, COST, "idle")
        assert sorted(await samples(state)) == [("kind", [COST]), ("kind", [COST, COST])]
        assert await billed(state) == TenantUsage(10, 100, 0, 40, 10 * COST)
        # It goes on, and is learned from when it ends, with all that it has had.
        answer = await after.chat("a", FINAL)
        assert float(answer.headers["x-justitia-predicted-cost"]) >= 4 * COST
        assert await after.command.end(signal.SIGTERM) == 0
    assert ("kind", [COST] * 4) in await samples(state)
    assert len(await samples(state)) == 3
    assert left_in(tmp_path / "journal") == []


async def test_killed_again_and_again_right_after_an_answer(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """Nothing is lost, nothing counts twice."""
    state, times = f"sqlite:///{tmp_path}/state.db", 6
    for number in range(times):
        async with gateway(scripted, state, tmp_path / "journal") as process:
            if number:
                (agent,) = (await process.agents()).values()
                assert agent["tasks"]["ended"] == agent["tasks"]["arrived"] == number
                assert agent["observed_cost"] == number * COST
            await process.chat_and_kill("a", stream=number % 2 == 0)
    async with gateway(scripted, state, tmp_path / "journal") as process:
        await process.chat("a", FINAL)
        assert await process.command.end(signal.SIGTERM) == 0
    assert await billed(state) == TenantUsage(times + 1, 10 * (times + 1), 0, 4 * (times + 1), (times + 1) * COST)
    assert await samples(state) == [("kind", [COST] * (times + 1))]


async def test_killed_under_load(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """Of what was in flight nothing is billed; all of what was answered is."""
    state, answered = f"sqlite:///{tmp_path}/state.db", 0

    async def client(process: Process, name: str) -> None:
        nonlocal answered
        while True:
            await process.chat(name)
            answered += 1

    async with gateway(scripted, state, tmp_path / "journal") as process:
        clients = [asyncio.create_task(client(process, f"agent-{number}")) for number in range(8)]
        async with asyncio.timeout(60):
            while answered < 300:
                await asyncio.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.gather(*clients, return_exceptions=True)
    async with gateway(scripted, state, tmp_path / "journal") as process:
        agents = await process.agents()
        ended = sum(agent["tasks"]["ended"] for agent in agents.values())
        # One for each client may have ended without that it was told.
        assert answered <= ended <= answered + 8
        assert (await billed(state)).requests == ended
        assert (await billed(state)).kv_cost == ended * COST


async def test_what_was_unfinished_is_given_up(scripted: ScriptedEngine, tmp_path: Path) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    async with gateway(scripted, state, tmp_path / "journal") as process:
        await process.chat("a")
        before = (await process.agents())["a"]
        scripted.default = wait_for_word
        waits = asyncio.create_task(process.chat("a"))
        await scripted.until(lambda engine: len(engine.bodies) == 2)
        await process.kill()
        with pytest.raises(httpx.TransportError):
            await waits
    async with gateway(scripted, state, tmp_path / "journal") as process:
        assert (await process.agents())["a"] == before
    assert (await billed(state)).requests == 1


async def test_two_gateways_with_one_state_and_one_directory(scripted: ScriptedEngine, tmp_path: Path) -> None:
    """On one machine. What one that was killed has left goes to the next that starts, and not to the one that lives."""
    state, journal = f"sqlite:///{tmp_path}/state.db", tmp_path / "journal"
    async with gateway(scripted, state, journal) as one:
        await one.chat("of-one")
        async with gateway(scripted, state, journal) as two:
            assert await two.agents() == {}
            await two.chat_and_kill("of-two", stream=False)
        async with gateway(scripted, state, journal) as three:
            assert (await three.agents()).keys() == {"of-two"}
            await three.chat("of-two", FINAL)
            await one.chat("of-one", FINAL)
            await three.command.end(signal.SIGTERM)
        await one.command.end(signal.SIGTERM)
    assert await billed(state) == TenantUsage(4, 40, 0, 16, 4 * COST)
    assert await samples(state) == [("kind", [COST, COST])] * 2


async def test_without_a_directory_for_its_journal_it_says_so_and_serves(
    scripted: ScriptedEngine, tmp_path: Path
) -> None:
    state = f"sqlite:///{tmp_path}/state.db"
    async with gateway(scripted, state, Path("/proc/journal")) as process:
        await process.chat("a")
        told = (await process.client.get("/metrics")).text
        assert "justitia_state_unwritten_total 1.0" in told
        assert "journal write failed" in process.command.said
        assert (await process.client.get("/health")).json()["state"] == "ok"
        await process.command.end(signal.SIGTERM)
    assert (await billed(state)).requests == 1
