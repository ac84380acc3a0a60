"""A gateway on a real socket that is asked anything, and what must be true of it afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from gateway.app import Gateway
from gateway.tenancy.keys import add_key
from tests.fuzz.strict_engine import StrictEngine
from tests.loop_thread import LoopThread
from tests.wire.conftest import running_gateway

SETTLE_S = 20


class _Complaints(logging.Handler):
    """What is logged with a traceback, or as an error."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.texts.append(self.format(record))


class Fuzzed:
    """A gateway before a strict engine, both in a thread of their own. key: that it wants, if it wants one."""

    def __init__(self, loop: LoopThread, url: str, app: Gateway, engine: StrictEngine, key: str | None) -> None:
        self.url = url
        self.engine = engine
        self.key = key
        self.complaints = _Complaints()
        self._loop, self._app = loop, app

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def check(self) -> None:
        """Nothing waits, nothing is in flight, no record is left of what is over, nothing was logged as an error, the
        engine was sent no nonsense, and a good request is served."""
        self._loop.call(self._empty())
        assert self.complaints.texts == []
        assert self.engine.wrong == []
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        headers = {"X-Agent-ID": "good", "X-Agent-Final": "true", "X-API-Key": self.key or ""}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        self._loop.call(self._empty())

    async def _empty(self) -> None:
        async with asyncio.timeout(SETTLE_S):
            while not self._is_empty():
                await asyncio.sleep(0.005)
        for agent in self._app.flow.agents:
            assert agent.arrived > 0
            assert not agent.record.final, agent.id
            assert agent.awaited == 0

    def _is_empty(self) -> bool:
        queue = self._app.flow.queue
        return not (queue.waiting or queue.in_flight or self._app.background._tasks)


def _running(keys: Path | None = None) -> Iterator[Fuzzed]:
    thread = LoopThread()
    stack = AsyncExitStack()
    key = None if keys is None else add_key(keys, "red", "", datetime.now(UTC))[1]

    async def begin() -> Fuzzed:
        engine = await stack.enter_async_context(StrictEngine().serving())
        settings = {} if keys is None else {"keys": keys}
        gateway = await stack.enter_async_context(running_gateway(engine=engine.url, max_body_mib=16, **settings))
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        return Fuzzed(thread, gateway.url, gateway.app, engine, key)

    fuzzed = thread.call(begin())
    yield fuzzed
    thread.call(stack.aclose())
    thread.close()


@pytest.fixture(scope="package")
def running() -> Iterator[Fuzzed]:
    yield from _running()


@pytest.fixture(scope="package")
def running_with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    yield from _running(tmp_path_factory.mktemp("keys") / "keys.json")


def _checked(running: Fuzzed) -> Iterator[Fuzzed]:
    root = logging.getLogger()
    root.addHandler(running.complaints)
    running.complaints.texts.clear()
    running.engine.wrong.clear()
    yield running
    try:
        running.check()
    finally:
        root.removeHandler(running.complaints)


@pytest.fixture
def fuzzed(running: Fuzzed) -> Iterator[Fuzzed]:
    """Checked after the test."""
    yield from _checked(running)


@pytest.fixture
def locked(running_with_keys: Fuzzed) -> Iterator[Fuzzed]:
    """One that wants a key, checked after the test."""
    yield from _checked(running_with_keys)
