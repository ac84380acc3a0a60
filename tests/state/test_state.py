"""One contract for all stores, against a real file and a real Redis."""

from __future__ import annotations

import asyncio
import os
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
from gateway.flowcontrol.records import AgentRecord, Step
from gateway.state import Batch, BatchRefused, StateError, Store, open_store, pack, unpack, without_texts
from gateway.state.batch import fold
from predictor.types import FinishedAgent, FinishedTask
from tests.redis_server import RedisServer
from tests.state.steps import HOUR, Life, row


@pytest.fixture(scope="session")
def redis_url(session_dir: Path) -> Iterator[str]:
    server = RedisServer(session_dir / "redis", persistent=False)
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.wire)])
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


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.wire)])
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


async def test_reading_all_ends_though_agents_keep_coming(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gateway.state.memory, gateway.state.redis, gateway.state.sqlite):
        monkeypatch.setattr(module, "CHUNK", 2)
    for number in range(3):
        await store.append(agent(number))
    kept, seen = len(await everything(store)), 0
    async for _ in store.read():
        seen += 1
        if seen < 10 * kept:  # else this would not end with a store that reads on
            await store.append(agent(seen))
            await store.append(agent(seen))
    assert seen == kept


class Fresh:
    """Names that no other test has had: they share a Redis."""

    numbers = iter(range(10**9))

    @classmethod
    def run(cls) -> str:
        return f"run-{next(cls.numbers)}"

    @classmethod
    def tenant(cls) -> str:
        return f"tenant-{next(cls.numbers)}"

    @classmethod
    def journal(cls) -> str:
        return f"journal-{next(cls.numbers)}"


async def live(store: Store, *lives: Life) -> list[AgentRecord]:
    runs = {life.run for life in lives}
    return sorted((agent for agent in await store.agents() if agent.run in runs), key=lambda agent: agent.run)


async def test_live_agents_come_back_with_their_tasks(store: Store) -> None:
    journal = Fresh.journal()
    a, b = Life(Fresh.run()), Life(Fresh.run())
    await store.apply(fold([a.answer(), a.answer(), b.fail()], journal, 1))
    assert await live(store, a, b) == [a.living, b.living]
    await store.apply(fold([a.correct(0, 77.0), a.answer(), b.answer(prompt="private", system="too")], journal, 2))
    one, two = await live(store, a, b)
    assert one == a.living
    assert two.tasks == (without_texts(b.sample).tasks[0],), "without texts"


async def test_who_ends_is_a_finished_agent(store: Store) -> None:
    journal, added = Fresh.journal(), await store.added()
    a, b, c = Life(Fresh.run()), Life(Fresh.run()), Life(Fresh.run())
    await store.apply(fold([a.answer(prompt="text"), b.answer(), c.answer()], journal, 1))
    await store.apply(fold([a.answer(), a.end(), b.fail(), b.end(), c.correct(0, 8.0), c.end()], journal, 2))
    assert await live(store, a, b, c) == []
    ended = (await everything(store))[-2:]
    assert sorted(ended, key=repr) == sorted([a.sample, c.sample], key=repr), "with texts"
    assert await store.added() == added + 2, "one that failed is not learned from"


async def test_a_batch_counts_once_however_often_it_is_given(store: Store) -> None:
    journal, tenant, added = Fresh.journal(), Fresh.tenant(), await store.added()
    a, gone = Life(Fresh.run(), tenant), Life(Fresh.run(), tenant)
    first = fold([a.answer(), gone.answer(over=True)], journal, 4)
    assert await store.apply(first) == 0
    assert await store.apply(first) == 4
    second = fold([a.answer()], journal, 9)
    assert [await store.apply(batch) for batch in (second, first, second)] == [4, 9, 9]
    assert await store.added() == added + 1
    assert await live(store, a) == [a.living]
    assert await store.usage(0, 2 * HOUR, tenant) == [row(tenant, requests=3, prompt_tokens=30, kv_cost=7.5)]


@pytest.mark.wire
async def test_another_gateway_may_give_a_batch_again(redis_url: str, tmp_path: Path) -> None:
    """It has found it in the journal of one that was killed."""
    for url in (redis_url, f"sqlite:///{tmp_path}/state.db"):
        first, second = open_store(url), open_store(url)
        journal, tenant, added = Fresh.journal(), Fresh.tenant(), await first.added()
        batch = fold([Life(Fresh.run(), tenant).answer(over=True)], journal, 1)
        assert sorted(await asyncio.gather(first.apply(batch), second.apply(batch))) == [0, 1]
        other = fold([Life(Fresh.run(), tenant).answer(over=True)], Fresh.journal(), 1)
        assert await second.apply(other) == 0, "another journal's"
        assert await first.added() == added + 2
        assert (await second.usage(0, 2 * HOUR, tenant))[0].requests == 2
        await first.close()
        await second.close()


@pytest.mark.wire
async def test_many_gateways_write_at_once(redis_url: str, tmp_path: Path) -> None:
    for url in (redis_url, f"sqlite:///{tmp_path}/state.db"):
        stores = [open_store(url) for _ in range(4)]
        tenant, added = Fresh.tenant(), await stores[0].added()

        async def serve(store: Store, tenant: str = tenant) -> None:
            journal, life = Fresh.journal(), Life(Fresh.run(), tenant)
            for number in range(1, 21):
                await store.apply(fold([life.answer(over=number == 20)], journal, number))

        await asyncio.gather(*(serve(store) for store in stores))
        assert await stores[0].usage(0, 2 * HOUR, tenant) == [
            row(tenant, requests=80, prompt_tokens=800, kv_cost=200.0)
        ]
        assert await stores[0].added() == added + 4
        for store in stores:
            await store.close()


async def test_an_agent_that_has_gone_on_elsewhere_is_not_ended(store: Store) -> None:
    here, there = Life(Fresh.run()), Fresh.journal()
    await store.apply(fold([here.answer()], Fresh.journal(), 1))
    given_up = here.end()
    await store.apply(fold([here.answer()], there, 1))
    added = await store.added()
    await store.apply(fold([given_up], Fresh.journal(), 1))
    assert await live(store, here) == [here.living]
    await store.apply(fold([here.end()], there, 2))
    await store.apply(fold([here.end()], Fresh.journal(), 1))
    assert await store.added() == added + 1, "it is learned from once"
    assert await live(store, here) == []


async def test_an_agent_of_which_tasks_are_missing_is_not_learned_from(store: Store) -> None:
    """As when a Redis has come back empty."""
    life, added, unreadable = Life(Fresh.run()), await store.added(), store.unreadable
    life.answer()
    await store.apply(fold([life.answer()], Fresh.journal(), 1))
    (found,) = await live(store, life)
    assert not found.whole
    await store.apply(fold([life.end()], Fresh.journal(), 1))
    assert await live(store, life) == []
    assert await store.added() == added
    assert store.unreadable == unreadable + 1


async def test_usage_is_summed_by_tenant_and_hour(store: Store) -> None:
    red, blue = Fresh.tenant(), "Blue._-" + Fresh.tenant()
    early, late = 500 * 3600, 501 * 3600
    rows = [row(red, early), row(red, late), row(blue, late, cached_tokens=4, completion_tokens=5), row(red, late)]
    for number, used in enumerate(rows):
        await store.apply(Batch(Fresh.journal(), number + 1, usage={(used.tenant, used.hour): used}))
    twice = row(red, late, requests=2, prompt_tokens=20, kv_cost=5.0)
    found = [used for used in await store.usage(early, late + 1) if used.tenant in (red, blue)]
    assert found == sorted([row(red, early), twice, rows[2]], key=lambda used: (used.hour, used.tenant))
    assert await store.usage(early, late, red) == [row(red, early)]
    assert await store.usage(early + 1, late + 3600, red) == [twice]
    assert await store.usage(0, 2**50, Fresh.tenant()) == []


@pytest.mark.wire
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


@pytest.mark.wire
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
        assert "unreadable agents" in caplog.text
        await store.close()


@pytest.mark.wire
async def test_damaged_live_agents_are_passed_over_and_counted(tmp_path: Path, redis_url: str) -> None:
    for url in (f"sqlite:///{tmp_path}/live.db", redis_url.removesuffix("0") + "2"):
        store = open_store(url)
        sound, damaged, in_part = Life("sound"), Life("damaged"), Life("in-part")
        steps = [life.answer() for life in (sound, damaged, in_part) for _ in range(2)]
        await store.apply(fold(steps, "j", 1))
        if url.startswith("sqlite"):
            with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
                connection.execute("UPDATE live SET agent = ? WHERE run = 'damaged'", (b"\xc1",))
                connection.execute("UPDATE tasks SET task = ? WHERE run = 'in-part' AND place = 0", ("text",))
            connection.close()
        else:
            async with redis.asyncio.Redis.from_url(url) as server:
                await server.hset("justitia:live:damaged", "agent", b"\xc1")  # type: ignore[misc]
                await server.hset("justitia:live:in-part", "0", b"")  # type: ignore[misc]
        found = {agent.run: agent for agent in await store.agents()}
        assert found.keys() == {"sound", "in-part"}
        assert found["sound"] == sound.living
        assert (list(found["in-part"].tasks), found["in-part"].whole) == (in_part.tasks[1:], False)
        assert store.unreadable >= 2
        added = await store.added()
        await store.apply(fold([damaged.end(), in_part.end()], "j", 2))
        assert [agent.run for agent in await store.agents()] == ["sound"], "they can be ended nevertheless"
        assert await store.added() == added + 1, "of the damaged one all tasks were there"
        await store.close()


async def test_a_file_of_an_older_version_is_kept_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE agents (id INTEGER PRIMARY KEY AUTOINCREMENT, agent BLOB NOT NULL)")
        connection.executemany("INSERT INTO agents (agent) VALUES (?)", [(pack(agent(number)),) for number in range(3)])
        connection.execute("DELETE FROM agents WHERE id = 1")
    connection.close()
    store = open_store(f"sqlite:///{path}")
    assert (await everything(store), await store.added()) == ([agent(1), agent(2)], 3)
    assert (await store.agents(), await store.usage(0, 2**60)) == ([], [])
    life = Life("a")
    await store.apply(fold([life.answer()], "j", 1))
    await store.append(agent(3))
    await store.close()
    store = open_store(f"sqlite:///{path}")
    assert await store.agents() == [life.living]
    assert (await everything(store), await store.added()) == ([agent(1), agent(2), agent(3)], 4)
    await store.close()
    with sqlite3.connect(path) as connection:  # and by the older version
        connection.execute("INSERT INTO agents (agent) VALUES (?)", (pack(agent(4)),))
        connection.execute("DELETE FROM agents WHERE id <= 2")
    connection.close()


async def test_what_no_store_can_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/state.db")
    too_many = fold([Life("a").answer(over=True), Step(usage=row(requests=2**63))], "j", 1)
    with pytest.raises(BatchRefused):
        await store.apply(too_many)
    assert (await store.added(), await store.usage(0, 2**60)) == (0, [])
    assert await store.apply(fold([], "j", 1)) == 0
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


@pytest.mark.wire
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


@pytest.mark.wire
async def test_a_store_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is not a database, and longer than a header of one hundred bytes " * 3)
    for url in (f"sqlite:///{tmp_path}/state.db", "redis://127.0.0.1:1/0", "sqlite:////proc/state.db"):
        store = open_store(url)
        for asked in (
            store.newest(1),
            store.append(agent(1)),
            store.added(),
            everything(store),
            store.apply(Batch("j", 1)),
            store.agents(),
            store.usage(0, 1),
        ):
            with pytest.raises(StateError):
                await asked
        await store.close()
