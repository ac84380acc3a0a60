"""Redis is killed and comes back while the gateway serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from gateway.flowcontrol.records import TenantUsage
from gateway.state import open_store
from tests.redis_server import RedisServer
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.test_state_restart import COST, FINAL, billed, samples

# Between the tasks of a client: a machine that is busy has to catch up, too.
PAUSE_S = 0.05
CLIENTS = 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """What it has acknowledged, it has after a kill."""
    server = RedisServer(tmp_path / "redis", persistent=True)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis", persistent=False)
    server.start()
    yield server
    server.kill()


class Load:
    """Agents of three tasks each, one after the other, and one for each client that does not end."""

    def __init__(self, gateway: GatewayUnderTest) -> None:
        self.gateway = gateway
        self.answered = self.finished = 0
        self.longer: dict[str, int] = {}
        self._ending = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        try:
            yield self
            self._ending = True
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def more(self, tasks: int = 100) -> None:
        """Go on until so many tasks more have been answered."""
        until = self.answered + tasks
        async with asyncio.timeout(60):
            while self.answered < until:
                await asyncio.sleep(0.01)

    async def _client(self, number: int) -> None:
        for each in range(10_000):
            for place in range(3):
                final = FINAL if place == 2 else {}
                await self._chat(f"agent-{number}-{each}", {"X-Agent-Class": "kind", **final}, stream=bool(each % 2))
            self.finished += 1
            await self._chat(f"longer-{number}", {}, stream=False)
            self.longer[f"longer-{number}"] = each + 1
            if self._ending:
                return

    async def _chat(self, agent: str, headers: dict[str, str], *, stream: bool) -> None:
        answer = await self.gateway.chat(agent, headers=headers, stream=stream)
        assert answer.status_code == 200
        self.answered += 1
        await asyncio.sleep(PAUSE_S)


async def asked(gateway: GatewayUnderTest, path: str) -> httpx.Response:
    """Over a connection of its own: under load, httpx' pool may not come round to who asks for one now and then."""
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        return await client.get(path)


async def health(gateway: GatewayUnderTest) -> object:
    return (await asked(gateway, "/health")).json()["state"]


async def metric(gateway: GatewayUnderTest, name: str) -> float:
    for line in (await asked(gateway, "/metrics")).text.splitlines():
        if line.startswith(f"justitia_{name} "):
            return float(line.split()[1])
    raise AssertionError(name)


async def until_state(gateway: GatewayUnderTest, state: str) -> None:
    async with asyncio.timeout(30):
        while await health(gateway) != state:
            await asyncio.sleep(0.02)


async def test_redis_is_killed_under_load_and_comes_back(
    start: StartGateway, server: RedisServer, tmp_path: Path
) -> None:
    """Nothing that was acknowledged is lost, and nothing counts twice."""
    gateway = await start(state=server.url, journal=tmp_path / "journal", train=False)
    assert await health(gateway) == "ok"
    assert await metric(gateway, "state_up") == 1
    async with Load(gateway).running() as load:
        for _ in range(3):
            await load.more()
            server.kill()
            await until_state(gateway, "alone")
            assert await metric(gateway, "state_up") == 0
            before = await metric(gateway, "state_waiting_bytes")
            await load.more()
            assert await metric(gateway, "state_waiting_bytes") > before
            server.start()
            await until_state(gateway, "ok")
            assert await metric(gateway, "state_up") == 1
    await gateway.app.journal.flush()
    assert await metric(gateway, "state_waiting_bytes") == 0
    assert await metric(gateway, "state_errors_total") >= 3
    assert await metric(gateway, "state_given_up_total") == 0
    count = load.answered
    assert await billed(server.url) == TenantUsage(count, 10 * count, 0, 4 * count, count * COST)
    assert await samples(server.url) == [("kind", [COST] * 3)] * load.finished
    store = open_store(server.url)
    living = {agent.name: agent for agent in await store.agents()}
    assert {name: len(agent.tasks) for name, agent in living.items()} == load.longer
    assert all(agent.whole for agent in living.values())
    assert await store.added() == load.finished
    await store.close()


async def test_redis_comes_back_empty(start: StartGateway, forgetful: RedisServer, tmp_path: Path) -> None:
    """What it had been given of usage and finished agents is gone with it: nobody else has it. What waits in the journal is
    written, and the agents that live are too, with all of their tasks; so whoever ends later is a finished agent."""
    gateway = await start(state=forgetful.url, journal=tmp_path / "journal", train=False)
    async with Load(gateway).running() as load:
        await load.more()
        forgetful.kill()
        await until_state(gateway, "alone")
        await load.more()
        answered, finished = load.answered, load.finished
        forgetful.start()
        await until_state(gateway, "ok")
        await load.more()
    await gateway.chat("longer-0", headers={"X-Agent-Final": "true"})
    await gateway.app.journal.flush()
    found = await samples(forgetful.url)
    assert len(found) >= load.finished - finished
    assert {len(costs) for agent_class, costs in found if agent_class == "kind"} == {3}, "whole ones only"
    assert (None, [COST] * (load.longer.pop("longer-0") + 1)) in found
    assert (await billed(forgetful.url)).requests >= load.answered + 1 - answered
    store = open_store(forgetful.url)
    assert {agent.name: len(agent.tasks) for agent in await store.agents()} == load.longer
    await store.close()


async def test_a_gateway_starts_while_redis_is_away(start: StartGateway, server: RedisServer, tmp_path: Path) -> None:
    """It serves alone. Redis is back, and what it had kept is recalled: agents, and what is learned from."""
    settings = {"state": server.url, "journal": tmp_path / "journal", "train": False}
    before = await start(**settings)
    for agent in ("a", "b"):
        await before.chat(agent)
    await before.chat("done", headers=FINAL)
    await before.app.journal.flush()
    server.kill()
    await before.chat("a")
    await before.running.stop()
    gateway = await start(**settings)
    assert await health(gateway) == "alone"
    assert (await gateway.client.get("/v1/agents")).json()["data"] == []
    await gateway.chat("b")
    await gateway.chat("c", headers=FINAL)
    server.start()
    await until_state(gateway, "ok")
    assert {agent.record.name: len(agent.tasks) for agent in gateway.app.flow.agents} == {"a": 2, "b": 1}, (
        "b was cut in two"
    )
    assert gateway.app.flow.queue.agents.keys() == {"default/a", "default/b"}
    await gateway.chat("a", headers=FINAL)
    await gateway.running.stop()
    assert await billed(server.url) == TenantUsage(7, 70, 0, 28, 7 * COST)
    kinds = [costs for _, costs in await samples(server.url)]
    assert sorted(kinds) == [[COST], [COST], [COST], [COST] * 3]


async def test_a_gateway_stops_while_redis_is_away_and_what_waits_is_written_at_the_next_start(
    start: StartGateway, server: RedisServer, tmp_path: Path
) -> None:
    settings = {"state": server.url, "journal": tmp_path / "journal", "train": False}
    gateway = await start(**settings)
    await gateway.chat("a")
    server.kill()
    await gateway.chat("a")
    async with asyncio.timeout(10):
        await gateway.running.stop()
    server.start()
    assert (await billed(server.url)).requests <= 1
    again = await start(**settings)
    assert [len(record.tasks) for record in again.app.flow.agents.by_id.values()] == [2]
    assert (await billed(server.url)).requests == 2


async def test_a_redis_that_hangs_holds_up_nobody(
    start: StartGateway, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.state.redis.TIMEOUT_S", 0.5)
    gateway = await start(state=server.url, journal=tmp_path / "journal", train=False)
    async with Load(gateway).running() as load:
        await load.more(20)
        server.stop()
        await until_state(gateway, "alone")
        await load.more()
        server.go_on()
        await until_state(gateway, "ok")
    await gateway.app.journal.flush()
    assert (await billed(server.url)).requests == load.answered
