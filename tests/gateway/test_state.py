"""One contract for all stores, against a real file and a real Redis."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import gateway.state.redis
import gateway.state.sqlite
from gateway.bench.processes import free_port
from gateway.state import StateError, Store, open_store
from predictor.types import FinishedAgent, FinishedTask


@pytest.fixture(scope="session")
def redis_url(session_dir: Path) -> Iterator[str]:
    import subprocess

    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(session_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if "Ready to accept connections" in line:
                break
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()
        server.communicate()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    url = {"memory": "memory:", "sqlite": f"sqlite:///{tmp_path}/deep/state.db"}.get(request.param)
    opened = open_store(url or request.getfixturevalue("redis_url"))
    yield opened
    await opened.close()


def agent(number: int) -> FinishedAgent:
    return FinishedAgent("class", "tenant", [FinishedTask(40, 10, 2, number, prompts=1, sequences=2)])


async def test_what_was_kept_comes_back_in_order(store: Store) -> None:
    before = await store.load()
    for number in range(3):
        await store.append(agent(number))
    assert (await store.load())[len(before) :] == [agent(0), agent(1), agent(2)]


async def test_concurrent_writes_are_all_kept(store: Store) -> None:
    before = len(await store.load())
    await asyncio.gather(*(store.append(agent(number)) for number in range(50)))
    assert len(await store.load()) == before + 50


@pytest.mark.parametrize("module", [gateway.state.sqlite, gateway.state.redis])
async def test_only_the_newest_are_kept(
    module: object, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_AGENTS", 5)
    store = open_store(redis_url if module is gateway.state.redis else f"sqlite:///{tmp_path}/state.db")
    for number in range(9):
        await store.append(agent(number))
    assert await store.load() == [agent(number) for number in range(4, 9)]
    await store.close()


async def test_sqlite_keeps_over_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        store = open_store(f"sqlite:///{tmp_path}/state.db")
        await store.append(agent(1))
        await store.close()
    store = open_store(f"sqlite:///{tmp_path}/state.db")
    assert await store.load() == [agent(1), agent(1)]
    await store.close()


async def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is not a database, and longer than a header of one hundred bytes " * 3)
    for url in (f"sqlite:///{tmp_path}/state.db", "redis://127.0.0.1:1/0", "sqlite:////proc/state.db"):
        store = open_store(url)
        with pytest.raises(StateError):
            await store.load()
        with pytest.raises(StateError):
            await store.append(agent(1))
        await store.close()
