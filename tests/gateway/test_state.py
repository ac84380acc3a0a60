"""One contract for all stores, against a real file and a real Redis."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import redis.asyncio

import gateway.state.blobs
import gateway.state.memory
import gateway.state.redis
import gateway.state.sqlite
from gateway.bench.processes import free_port
from gateway.state import StateError, Store, open_store, pack, unpack, without_texts
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
    task = FinishedTask(
        40, 10, 2, number, prompts=1, sequences=2, row=bytes(range(250)), prompt="Why?\ud7ff", max_tokens=9
    )
    return FinishedAgent("class", "tenant", [task], "1-schema", 1e9 + number, 2.0, 5)


def bare(number: int) -> FinishedAgent:
    return without_texts(agent(number))


async def everything(store: Store) -> list[FinishedAgent]:
    return [kept async for kept in store.read()]


async def test_what_was_kept_comes_back_in_order(store: Store) -> None:
    before = await everything(store)
    for number in range(3):
        await store.append(agent(number))
    assert (await everything(store))[len(before) :] == [agent(0), agent(1), agent(2)]
    assert await store.newest(2) == [bare(1), bare(2)], "without texts"


async def test_concurrent_writes_are_all_kept(store: Store) -> None:
    kept, added = len(await everything(store)), await store.added()
    await asyncio.gather(*(store.append(agent(number)) for number in range(250)))
    assert len(await everything(store)) == kept + 250
    assert len(await store.newest(10_000)) == kept + 250
    assert await store.added() == added + 250


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def small(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """It keeps five."""
    url = {"memory": "memory:", "sqlite": f"sqlite:///{tmp_path}/state.db"}.get(request.param)
    opened = open_store(url or request.getfixturevalue("redis_url"), 5)
    yield opened
    await opened.close()


async def test_only_the_newest_are_kept_and_the_count_goes_on(small: Store) -> None:
    added = await small.added()
    for number in range(9):
        await small.append(agent(number))
    assert await everything(small) == [agent(number) for number in range(4, 9)]
    assert await small.newest(100) == [bare(number) for number in range(4, 9)]
    assert await small.added() == added + 9


async def test_agents_that_leave_while_all_are_read_do_no_harm(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gateway.state.memory, gateway.state.redis, gateway.state.sqlite):
        monkeypatch.setattr(module, "CHUNK", 2)
    for number in range(5):
        await small.append(agent(number))
    seen = []
    async for kept in small.read():
        seen.append(kept.arrived_at - 1e9)
        if len(seen) == 1:
            for number in range(5, 9):
                await small.append(agent(number))
    assert seen[:2] == [0, 1]
    assert seen == sorted(seen)


async def test_two_gateways_share_a_store(redis_url: str, tmp_path: Path) -> None:
    for url in (redis_url, f"sqlite:///{tmp_path}/state.db"):
        first, second = open_store(url), open_store(url)
        added = await first.added()
        await first.append(agent(1))
        await second.append(agent(2))
        assert await second.newest(2) == await first.newest(2) == [bare(1), bare(2)]
        assert await first.added() == await second.added() == added + 2
        await first.close()
        await second.close()


async def test_sqlite_keeps_over_a_restart(tmp_path: Path) -> None:
    for number in range(2):
        store = open_store(f"sqlite:///{tmp_path}/state.db")
        assert await store.added() == number
        await store.append(agent(1))
        await store.close()
    store = open_store(f"sqlite:///{tmp_path}/state.db")
    assert await everything(store) == [agent(1), agent(1)]
    await store.close()


async def test_what_sqlite_keeps_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = open_store(f"sqlite:///{tmp_path}/deep/state.db")
        await store.append(agent(1))
    finally:
        os.umask(before)
    directory = tmp_path / "deep"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (directory, *directory.iterdir())}
    assert modes == {"deep": 0o700, "state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    await store.close()


async def test_sqlite_does_not_wait_for_the_disk_at_each_agent(tmp_path: Path) -> None:
    connection = gateway.state.sqlite._opened(tmp_path / "state.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (1,), "NORMAL"
    connection.close()


BAD = [b"", b"not compressed", zlib.compress(b"not packed"), pack(agent(1))[:-9], zlib.compress(bytes(1000))]


async def test_what_cannot_be_read_is_passed_over_and_counted(
    tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for url in (f"sqlite:///{tmp_path}/state.db", redis_url.removesuffix("0") + "1"):  # nobody else's
        store = open_store(url, 100)
        await store.append(agent(0))
        await _smuggle(url, [*BAD, 5] if url.startswith("sqlite") else BAD)
        await store.append(agent(2))
        assert await store.newest(100) == [bare(0), bare(2)]
        unreadable = store.unreadable
        assert unreadable >= len(BAD)
        assert await everything(store) == [agent(0), agent(2)]
        assert store.unreadable > unreadable
        assert "cannot be read and are passed over" in caplog.text
        await store.close()


async def _smuggle(url: str, blobs: Sequence[object]) -> None:
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.executemany("INSERT INTO agents (agent) VALUES (?)", [(blob,) for blob in blobs])
        connection.close()
        return
    async with redis.asyncio.Redis.from_url(url) as server:
        for blob in blobs:
            await server.xadd(gateway.state.redis.AGENTS, {b"agent": blob})  # type: ignore[dict-item]
        await server.xadd(gateway.state.redis.AGENTS, {b"something": b"else"})


def test_an_agent_of_an_older_version_is_still_read() -> None:
    """What came later has defaults."""
    older = {"agent_class": "kind", "tenant": "t", "tasks": [[40, 10, 0, 7]], "came_later": 1}
    (read,), unreadable = unpack([zlib.compress(msgspec.msgpack.encode(older))])
    assert read == FinishedAgent("kind", "t", [FinishedTask(40, 10, 0, 7)])
    assert not unreadable


async def test_what_cannot_be_packed_is_an_error_of_the_store(redis_url: str, tmp_path: Path) -> None:
    """A client may send a limit of more than 64 bits."""
    huge = FinishedAgent("kind", "t", [FinishedTask(40, 10, 0, 7, max_tokens=2**70)])
    for url in ("memory:", f"sqlite:///{tmp_path}/state.db", redis_url):
        store = open_store(url)
        before = await store.added()
        with pytest.raises(StateError, match="cannot be packed"):
            await store.append(huge)
        assert await store.added() == before
        await store.close()


def test_a_blob_cannot_be_too_deep() -> None:
    assert unpack([zlib.compress(b"\x81\xa3new" + b"\x91" * 100_000)]) == ([], 1)


def test_a_blob_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.state.blobs, "LARGEST_BYTES", 1000)
    assert unpack([zlib.compress(msgspec.msgpack.encode({"agent_class": "x" * 10_000}))]) == ([], 1)


async def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is not a database, and longer than a header of one hundred bytes " * 3)
    for url in (f"sqlite:///{tmp_path}/state.db", "redis://127.0.0.1:1/0", "sqlite:////proc/state.db"):
        store = open_store(url)
        for asked in (store.newest(1), store.append(agent(1)), store.added(), everything(store)):
            with pytest.raises(StateError):
                await asked
        await store.close()
