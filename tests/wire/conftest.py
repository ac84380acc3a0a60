"""A gateway on a real socket, before a scripted engine or the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from gateway import supervise
from gateway.app import Gateway
from gateway.config.settings import GatewaySettings
from gateway.relay import engine_monitor
from gateway.server import RunningGateway, start_gateway
from tests.wire.scripted_engine import ScriptedEngine

# Of a gateway in the test's process, so that no test waits long for it to look: at its engine, its agents and its keys.
LOOKS_EVERY_S = {"HEALTH_S": 0.1, "METRICS_S": 0.05, "SWEEP_S": 0.1, "KEYS_S": 0.1}


class GatewayUnderTest:
    def __init__(self, running: RunningGateway, client: httpx.AsyncClient) -> None:
        self.running = running
        self.url = running.url
        self.client = client

    @property
    def app(self) -> Gateway:
        return self.running.app

    async def chat(
        self, agent: str | None = "a", *, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """A task; `fields` go over the body's."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
        sent = {**({"X-Agent-ID": agent} if agent else {}), **(headers or {})}
        return await self.client.post("/v1/chat/completions", json=body, headers=sent)

    async def until(self, condition: Callable[[], bool], *tasks: asyncio.Task[Any]) -> None:
        """Poll for what the gateway does by itself. `tasks` must not end meanwhile."""
        async with asyncio.timeout(60):
            while not condition():
                for task in tasks:
                    assert not task.done(), task.exception() or task.result().text
                await asyncio.sleep(0.01)

    def is_empty(self) -> bool:
        queue = self.app.flow.queue
        return queue.waiting == 0 and queue.in_flight == 0


@asynccontextmanager
async def running_gateway(**settings: Any) -> AsyncIterator[GatewayUnderTest]:
    """Ready to serve when it is given, unless there is no engine."""
    given = {"port": 0, "state": "memory:", "drain_s": 1, **settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, interval_s in LOOKS_EVERY_S.items():
            patch.setattr(engine_monitor if hasattr(engine_monitor, name) else supervise, name, interval_s)
        running = await start_gateway(GatewaySettings(**given))
        async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
            try:
                yield GatewayUnderTest(running, client)
            finally:
                await running.stop()


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedEngine]:
    async with ScriptedEngine().serving() as engine:
        yield engine


StartGateway = Callable[..., Awaitable[GatewayUnderTest]]


@pytest.fixture
async def start(scripted: ScriptedEngine) -> AsyncIterator[StartGateway]:
    """Starts a gateway before the scripted engine, with the settings given."""
    async with AsyncExitStack() as stack:

        async def start_one(**settings: Any) -> GatewayUnderTest:
            gateway = await stack.enter_async_context(running_gateway(engine=scripted.url, **settings))
            await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
            return gateway

        yield start_one


@pytest.fixture
async def gateway(start: StartGateway) -> GatewayUnderTest:
    return await start()
