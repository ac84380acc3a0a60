"""What is bounded is shared between tenants: one tenant that uses all it can leaves room for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from gateway.api.passthrough import MAX_CONCURRENT
from gateway.tenancy.keys import add_key
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_engine import ScriptedEngine, wait_for_word

KIB = 1024


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """A key each of the tenants red and blue."""
    now = datetime.now(UTC)
    return {tenant: add_key(tmp_path / "keys.json", tenant, "", now)[1] for tenant in ("red", "blue")}


@pytest.fixture
async def gateway(keys: dict[str, str], tmp_path: Path, start: StartGateway) -> GatewayUnderTest:
    return await start(keys=tmp_path / "keys.json", max_held_mib=1)


@pytest.fixture
async def red(gateway: GatewayUnderTest, keys: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    headers = {"x-api-key": keys["red"]}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, timeout=60) as client:
        yield client


async def test_requests_that_hang_at_the_engine_leave_room_for_another_tenant(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, red: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    scripted.default = wait_for_word
    hanging = [asyncio.create_task(red.post("/tokenize", json={"prompt": "a"})) for _ in range(MAX_CONCURRENT)]

    def all_are_somewhere() -> bool:
        return len(scripted.bodies) + sum(task.done() for task in hanging) == len(hanging)

    await gateway.until(all_are_somewhere)
    at_engine = len(scripted.bodies)
    headers = {"x-api-key": keys["blue"]}
    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200
    asked = asyncio.create_task(gateway.client.post("/tokenize", json={"prompt": "b"}, headers=headers))
    await gateway.until(lambda: len(scripted.bodies) == at_engine + 1 or asked.done())
    scripted.go.set()
    assert (await asked).status_code == 200
    answers = [await task for task in hanging]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "queue_full"
    assert "tenant red" in refused.json()["error"]["message"]
    assert (await red.post("/tokenize", json={"prompt": "a"})).status_code == 200, "all is given back"


async def test_bodies_that_never_end_leave_room_for_another_tenant(
    gateway: GatewayUnderTest, keys: dict[str, str]
) -> None:
    port = int(gateway.url.rpartition(":")[2])
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nTransfer-Encoding: chunked\r\n"
        f"x-api-key: {keys['red']}\r\n\r\n"
    )
    size = 300 * KIB
    body = {"model": "tiny", "messages": [{"role": "user", "content": "b" * (200 * KIB)}]}
    with ExitStack() as stack:
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            before = gateway.app.bodies.held
            writer.write(head.encode() + b"%x\r\n" % (2 * size) + b" " * size)
            refused = asyncio.create_task(reader.read(1))
            await gateway.until(lambda: refused.done() or gateway.app.bodies.held == before + size)  # noqa: B023
            refused.cancel()
        assert gateway.app.bodies.held >= size
        answer = await gateway.client.post("/v1/chat/completions", json=body, headers={"x-api-key": keys["blue"]})
        assert answer.status_code == 200, answer.text
    await gateway.until(lambda: gateway.app.bodies.held == 0)


async def test_a_queue_that_one_tenant_fills_has_room_for_another(
    start: StartGateway, scripted: ScriptedEngine, keys: dict[str, str], tmp_path: Path
) -> None:
    scripted.default = wait_for_word
    gateway = await start(keys=tmp_path / "keys.json", max_waiting=8, max_in_flight=1, max_engine_waiting=0)
    queue = gateway.app.flow.queue
    red, blue = ({"x-api-key": keys[tenant]} for tenant in ("red", "blue"))
    first = asyncio.create_task(gateway.chat("first", headers=red))
    await gateway.until(lambda: queue.in_flight == 1, first)
    flood = [asyncio.create_task(gateway.chat(f"a{number}", headers=red)) for number in range(12)]
    await gateway.until(lambda: queue.waiting + sum(task.done() for task in flood) == len(flood))
    assert queue.waiting == 6, "half, and its share of the other half"
    others = [asyncio.create_task(gateway.chat(f"b{number}", headers=blue)) for number in range(2)]
    await gateway.until(lambda: queue.waiting == 8, *others)
    refused = await gateway.chat("b2", headers=blue)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    scripted.go.set()
    assert {answer.status_code for answer in await asyncio.gather(first, *others)} == {200}
    assert sorted(answer.status_code for answer in await asyncio.gather(*flood)) == [200] * 6 + [429] * 6
