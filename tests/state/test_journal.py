"""From a settled task into the store, whatever becomes of the store, the disk, and the gateway."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import gateway.state.directory
import gateway.state.pump
import gateway.state.writer
from gateway.flowcontrol.records import Step
from gateway.state import Batch, BatchRefused, Journal, StateError
from gateway.state.batch import fold
from gateway.state.directory import left_by_others
from gateway.state.frames import framed, read
from gateway.state.journal import Counts
from gateway.state.memory import MemoryStore
from tests.state.steps import HOUR, Life, row


class Flaky(MemoryStore):
    """away: it cannot be reached. deaf: it does what it is told, and its answer is lost."""

    away = deaf = False
    given: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.given = []

    async def apply(self, batch: Batch) -> int:
        self._there()
        self.given.append(batch.number)
        known = await super().apply(batch)
        if self.deaf:
            raise StateError("its answer was lost")
        return known

    async def added(self) -> int:
        self._there()
        return await super().added()

    def _there(self) -> None:
        if self.away:
            raise StateError("away")

    async def requests(self) -> int:
        return sum(used.requests for used in await self.usage(0, 2 * HOUR))


@pytest.fixture
def store() -> Flaky:
    return Flaky()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal"


@asynccontextmanager
async def started(store: MemoryStore, root: Path | None, **options: int) -> AsyncIterator[Journal]:
    journal = Journal(store, root, **options)
    await journal.start()
    try:
        yield journal
    finally:
        await journal.close()


def kill(journal: Journal) -> None:
    """As a process ends: its locks go, and its files stay."""
    writer = journal._writer
    if writer._fd is not None:
        os.close(writer._fd)
        writer._fd = None
    for home in (writer._directory, *(home for home, _ in journal._pump._left_behind)):
        if home is not None:
            os.close(home._lock)


def paths(root: Path, pattern: str = "*/*.batch") -> list[Path]:
    return sorted(root.glob(pattern))


def files(root: Path) -> list[str]:
    return [path.name for path in paths(root)]


async def test_what_is_written_reaches_the_store_and_its_file_goes(store: Flaky, root: Path) -> None:
    life = Life("a")
    async with started(store, root) as journal:
        journal.write(life.answer())
        assert await store.agents() == [], "nobody waits for the store"
        assert journal.waiting_bytes > 0
        await journal.flush()
        assert await store.agents() == [life.living]
        assert journal.waiting_bytes == 0
        assert len(files(root)) == 1, "the open one"
    assert paths(root, "**/*") == [root / "lock"], "nothing is left of a good end"


async def test_the_pump_gives_it_to_the_store_by_itself(store: Flaky, root: Path) -> None:
    async with started(store, root) as journal:
        pump = asyncio.create_task(journal.run())
        journal.write(Step(usage=row()))
        async with asyncio.timeout(10):
            while not await store.requests():
                await asyncio.sleep(0.01)
        pump.cancel()


async def test_files_are_for_their_owner_alone(store: Flaky, root: Path) -> None:
    before = os.umask(0o022)
    try:
        async with started(store, root) as journal:
            journal.write(Step(usage=row()))
            made = [root, *paths(root, "**/*")]
            assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o700}
            assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o600}
    finally:
        os.umask(before)


async def test_without_a_directory_it_is_in_memory(store: Flaky, tmp_path: Path) -> None:
    async with started(store, None) as journal:
        journal.write(Step(usage=row()))
        await journal.flush()
        assert await store.requests() == 1
        assert journal.take_counts() == Counts()
    assert paths(tmp_path, "*") == []


# The gateway is killed


async def test_what_was_written_before_a_kill_is_applied_at_the_next_start(store: Flaky, root: Path) -> None:
    life = Life("a")
    killed = Journal(store, root)
    await killed.start()
    killed.write(life.answer())
    await killed.flush()
    killed.write(life.answer())
    kill(killed)
    async with started(store, root):
        assert await store.agents() == [life.living]
        assert await store.requests() == 2
        assert not (root / killed.id).exists()


async def test_a_batch_that_was_applied_just_before_a_kill_counts_once(store: Flaky, root: Path) -> None:
    killed = Journal(store, root)
    await killed.start()
    killed.write(Step(usage=row()))
    store.deaf = True
    await killed.flush()
    assert (await store.requests(), killed.up) == (1, False)
    killed.write(Step(usage=row()))
    kill(killed)
    store.deaf = False
    async with started(store, root):
        assert await store.requests() == 2


async def test_half_a_step_at_a_files_end_is_passed_over(store: Flaky, root: Path) -> None:
    killed = Journal(store, root)
    await killed.start()
    killed.write(Step(usage=row()))
    with (root / killed.id / files(root)[0]).open("ab") as file:
        file.write(framed([Step(usage=row())])[25:-1])
    kill(killed)
    async with started(store, root) as journal:
        assert await store.requests() == 1
        assert journal.unreadable == 0, "nobody was told that it was written"


async def test_a_damaged_step_is_passed_over_and_counted(store: Flaky, root: Path) -> None:
    killed = Journal(store, root)
    await killed.start()
    for _ in range(3):
        killed.write(Step(usage=row()))
    path = root / killed.id / files(root)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    kill(killed)
    async with started(store, root) as journal:
        assert await store.requests() == 2
        assert journal.unreadable == 1


async def test_a_journal_of_another_version_is_left_as_it_is(
    store: Flaky, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = root / "0123456789abcdef"
    other.mkdir(parents=True)
    (other / "1-1.batch").write_bytes(framed([Step(usage=row())]))
    (other / "2-2.batch").write_bytes(b"justitia journal 99\nwhatever")
    async with started(store, root) as journal:
        assert await store.requests() == 0, "in order, or not at all"
        assert journal.unreadable == 1
        assert "is left in place" in caplog.text
        journal.write(Step(usage=row()))
    assert await store.requests() == 1
    assert files(root) == ["1-1.batch", "2-2.batch"]


async def test_a_store_that_is_away_at_the_start_has_everything_in_order_later(store: Flaky, root: Path) -> None:
    """What is recalled comes after what others have left, and before what is new."""
    life, heard = Life("a"), []
    killed = Journal(store, root)
    await killed.start()
    killed.write(life.answer())
    kill(killed)
    store.away = True
    journal = Journal(store, root)

    async def recall() -> None:
        store._there()
        heard.append((await store.agents(), await store.requests()))

    await journal.start(recall)
    assert (journal.up, heard) == (False, [])
    journal.write(Life("b").answer())
    await journal.flush()
    store.away = False
    await journal.flush()
    await journal.flush()
    assert heard == [([life.living], 1)]
    assert (journal.up, await store.requests()) == (True, 2)
    await journal.close()


# Several gateways


async def test_gateways_with_one_directory_do_not_meet(store: Flaky, root: Path) -> None:
    async with started(store, root) as first, started(store, root) as second:
        assert second.live_journals == {first.id}
        first.write(Step(usage=row()))
        second.write(Step(usage=row()))
        async with started(store, root) as third:
            assert third.live_journals == {first.id, second.id}
            assert await store.requests() == 0, "what living ones have is theirs to give"
    assert await store.requests() == 2
    assert files(root) == []


async def test_what_is_left_goes_to_one_of_those_that_start(store: Flaky, root: Path) -> None:
    killed = [Journal(store, root) for _ in range(3)]
    for journal in killed:
        await journal.start()
        journal.write(Step(usage=row()))
    for journal in killed:
        kill(journal)
    journals = [Journal(store, root) for _ in range(4)]
    await asyncio.gather(*(journal.start() for journal in journals))
    assert await store.requests() == 3
    await asyncio.gather(*(journal.close() for journal in journals))
    assert files(root) == []


async def test_one_that_was_stopped_while_it_looked_holds_up_nobody(
    store: Flaky, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.state.directory, "ROOT_LOCK_S", 0.05)
    with gateway.state.directory._root_locked(root):
        journal = Journal(store, root)
        await journal.start()
        journal.write(Step(usage=row()))
        await journal.flush()
        assert await store.requests() == 1
    await journal.flush()
    assert len(files(root)) == 1, "it has a file by now"
    await journal.close()


# Steps keep coming


class Gated(Flaky):
    """Each batch waits until the gate is open, as it is at first."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def apply(self, batch: Batch) -> int:
        self.begun.set()
        await self.gate.wait()
        return await super().apply(batch)


class Loaded(Flaky):
    """Each batch that it applies takes as long as it takes the gateway to settle one more task: up to LOAD of them."""

    LOAD = 200
    journal: Journal
    settled = 0

    async def apply(self, batch: Batch) -> int:
        known = await super().apply(batch)
        if self.settled < self.LOAD:
            self.settled += 1
            self.journal.write(Step(usage=row()))
        return known


@pytest.fixture
async def loaded(root: Path) -> AsyncIterator[Loaded]:
    store = Loaded()
    async with started(store, root) as store.journal:
        store.given.clear()
        yield store


async def test_a_flush_ends_though_steps_keep_coming(loaded: Loaded) -> None:
    loaded.journal.write(Step(usage=row()))
    await loaded.journal.flush()
    assert await loaded.requests() == 1, "what was written before the call"
    assert len(loaded.given) == 1
    assert loaded.journal.waiting_bytes > 0, "what was written meanwhile waits for the next round"


async def test_what_is_written_while_the_store_is_busy_is_one_batch(root: Path) -> None:
    """And flushes that wait for it share a round."""
    store = Gated()
    async with started(store, root) as journal:
        store.gate.clear()
        journal.write(Step(usage=row()))
        first = asyncio.create_task(journal.flush())
        await store.begun.wait()
        later = []
        for _ in range(50):
            journal.write(Step(usage=row()))
            later.append(asyncio.create_task(journal.flush()))
            await asyncio.sleep(0)
        store.gate.set()
        await first
        await asyncio.gather(*later)
        assert await store.requests() == 51
        assert len(store.given) == 2


async def test_a_store_that_does_not_answer_does_not_hold_up_the_end(
    store: Flaky, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.state.pump, "CLOSE_S", 0.01)
    silent = Gated()
    journal = Journal(silent, root)
    await journal.start()
    silent.gate.clear()
    journal.write(Step(usage=row()))
    await journal.close()
    async with started(store, root):
        assert await store.requests() == 1


async def test_a_flush_that_is_cancelled_leaves_the_round_to_the_others(root: Path) -> None:
    store = Flaky()
    async with started(store, root) as journal:
        journal.write(Step(usage=row()))
        cancelled, other = asyncio.create_task(journal.flush()), asyncio.create_task(journal.flush())
        await asyncio.sleep(0)
        cancelled.cancel()
        await other
        assert await store.requests() == 1
        assert cancelled.cancelled()


# The store is away


async def test_what_was_given_is_given_again_as_it_was_and_counts_once(store: Flaky, root: Path) -> None:
    async with started(store, root) as journal:
        journal.write(Step(usage=row()))
        store.deaf = True
        await journal.flush()
        for _ in range(3):
            journal.write(Step(usage=row()))
            await journal.flush()
        given = store.given[-4:]
        assert len(set(given)) == 1, "the others wait behind it"
        assert journal.take_counts().errors == 4
        store.deaf = False
        await journal.flush()
        assert await store.requests() == 4
        assert journal.up


async def test_it_is_not_asked_all_the_time(store: Flaky, root: Path) -> None:
    now = 1000.0
    journal = Journal(store, root, clock=lambda: now)
    await journal.start()
    journal.write(Step(usage=row()))
    store.away = True
    asked = []
    for _ in range(200):
        await journal._pump.next_round()
        if errors := journal.take_counts().errors:
            asked.extend([now] * errors)
        now += 0.1
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 5, 5], abs=0.11)
    await journal.close()


async def test_a_store_that_goes_while_nothing_happens_is_missed(store: Flaky, root: Path) -> None:
    now = 1000.0
    journal = Journal(store, root, clock=lambda: now)
    await journal.start()
    assert journal.up
    store.away = True
    now += 6
    await journal.flush()
    assert not journal.up
    store.away = False
    await journal.flush()
    assert journal.up
    await journal.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens a thousand times sooner."""
    monkeypatch.setattr(gateway.state.writer, "SEGMENT_BYTES", 4000)
    for name, value in {
        "COMPACT_BYTES": 16_000,
        "COMPACT_MEMORY_BYTES": 8000,
        "DISK_BYTES": 60_000,
        "MEMORY_BYTES": 8000,
    }.items():
        monkeypatch.setattr(gateway.state.pump, name, value)


def on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def in_memory(journal: Journal) -> int:
    return sum(len(part.data or b"") for part in (*journal._pump._backlog, journal._writer._open))


@pytest.mark.usefixtures("small")
async def test_while_it_is_away_for_long_neither_disk_nor_memory_fills_up(store: Flaky, root: Path) -> None:
    async with started(store, root, kept_agents=50) as journal:
        store.away = True
        most_on_disk = most_in_memory = 0
        life = Life("lives")
        for number in range(3000):
            journal.write(Life(f"a{number}").answer(over=True))
            if number % 100 == 0:
                journal.write(life.answer())
            if number % 5 == 0:
                await journal.flush()
                most_on_disk, most_in_memory = max(most_on_disk, on_disk(root)), max(most_in_memory, in_memory(journal))
        print(f"at most {most_on_disk} on the disk, {most_in_memory} in memory")
        assert most_on_disk < 40_000
        assert most_in_memory < 8000
        assert journal.take_counts().given_up == 0, "more than a store keeps are no loss"
        store.away = False
        await journal.flush()
        assert await store.requests() == 3030
        assert await store.agents() == [life.living]
        assert len(await store.newest(1000)) >= 50
        assert files(root) == files(root)[:1]


@pytest.mark.usefixtures("small")
async def test_one_killed_after_it_has_written_anew_loses_nothing_and_counts_nothing_twice(
    store: Flaky, root: Path
) -> None:
    killed = Journal(store, root, kept_agents=1000)
    await killed.start()
    store.deaf = True
    killed.write(Step(usage=row()))
    await killed.flush()
    store.away, store.deaf = True, False
    for number in range(300):
        killed.write(Life(f"a{number}").answer(over=True))
        await killed.flush()
    assert any(first != last for first, last in (name.removesuffix(".batch").split("-") for name in files(root)))
    # And before it could remove what it had written anew: a file that is covered by another.
    merged = next(path for path in paths(root) if len(set(path.stem.split("-"))) == 2)
    covered = merged.with_name(f"{merged.stem.split('-')[1]}-{merged.stem.split('-')[1]}.batch")
    covered.write_bytes(framed([Step(usage=row())]))
    kill(killed)
    store.away = False
    async with started(store, root):
        assert await store.requests() == 301
        assert await store.added() == 300


@pytest.mark.usefixtures("small")
async def test_with_neither_disk_nor_store_there_is_a_limit_and_what_was_used_stays(
    store: Flaky, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    async with started(store, tmp_path / "file" / "journal") as journal:
        store.away = True
        most = 0
        for number in range(2000):
            journal.write(Life(f"a{number}").answer(over=True))
            if number % 5 == 0:
                await journal.flush()
                most = max(most, in_memory(journal))
        assert most < 40_000
        counts = journal.take_counts()
        assert counts.unwritten == 2000
        assert counts.given_up > 1000, "finished agents"
        assert caplog.text.count("journal write failed") == 1
        store.away = False
        await journal.flush()
        assert await store.requests() == 2000
        assert await store.added() == 2000 - counts.given_up - journal.take_counts().given_up


async def test_a_batch_that_no_store_can_hold_is_put_aside(store: Flaky, root: Path) -> None:
    class Strict(Flaky):
        async def apply(self, batch: Batch) -> int:
            if any(used.requests == 13 for used in batch.usage.values()):
                raise BatchRefused("13")
            return await super().apply(batch)

    strict = Strict()
    async with started(strict, root) as journal:
        journal.write(Step(usage=row(requests=13)))
        await journal.flush()
        journal.write(Step(usage=row()))
        await journal.flush()
        assert journal.up
        assert await strict.requests() == 1
        assert journal.take_counts().given_up == 1
    (aside,) = paths(root, "*/*.refused")
    assert read(aside.read_bytes()) == ([Step(usage=row(requests=13))], 0)
    async with started(strict, root):
        assert await strict.requests() == 1
    assert aside.exists()


async def test_a_store_that_has_lost_what_it_had_is_told_of_the_agents_that_live(root: Path) -> None:
    """Redis without persistence: what it had of usage and finished agents is gone with it."""
    life, other = Life("a"), Life("b")

    def rewrite() -> Iterator[Step]:
        for each in (life, other):
            yield Step(agent=each.state)
            for place, task in enumerate(each.tasks):
                yield Step(run=each.run, task=task, place=place)

    store = Flaky()
    journal = Journal(store, root)
    await journal.start(rewrite=rewrite)
    for each in (life, life, other):
        journal.write(each.answer())
        await journal.flush()
    empty = Flaky()
    journal.store = empty
    journal.write(life.answer())
    await journal.flush()
    assert {agent.run: agent for agent in await empty.agents()} == {"a": life.living, "b": other.living}
    assert await empty.requests() == 1
    journal.write(life.end())
    await journal.flush()
    assert await empty.newest(9) == [life.sample]
    await journal.close()


async def test_a_store_that_was_emptied_before_anything_was_written_is_noticed(root: Path) -> None:
    asked = []
    journal = Journal(Flaky(), root)

    async def recall() -> None:
        pass

    await journal.start(recall, lambda: asked.append(1) or ())  # type: ignore[func-returns-value]
    journal.store = Flaky()
    journal.write(Step(usage=row()))
    await journal.flush()
    assert asked == [1]
    await journal.close()


# The disk


async def test_a_full_disk_is_said_once_and_what_happens_goes_to_the_store(
    store: Flaky, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(store, root) as journal:
        journal.write(Step(usage=row()))

        def full(fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            for _ in range(3):
                journal.write(Step(usage=row()))
                await journal.flush()
                journal.write(Step(usage=row()))
        assert journal.take_counts().unwritten == 6
        assert caplog.text.count("No space left on device") == 1
        assert journal.up, "the store is well"
        await journal.flush()
        assert await store.requests() == 7
        with caplog.at_level(logging.INFO):
            journal.write(Step(usage=row()))
        assert "journal writable again" in caplog.text
        assert journal.take_counts().unwritten == 0


async def test_a_full_disk_hurries_one_round_and_not_one_for_each_step(
    store: Flaky, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(store, root) as journal:

        def full(fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        due = journal._writer.due
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            journal.write(Step(usage=row()))
            assert due.is_set()
            due.clear()
            await journal.flush()
            journal.write(Step(usage=row()))
            assert not due.is_set()
        assert journal.take_counts().unwritten == 2


async def test_a_step_that_the_disk_took_in_part_is_not_left_there(store: Flaky, root: Path) -> None:
    """A real limit on the size of files."""
    async with started(store, root) as journal:
        journal.write(Step(usage=row()))
        (path,) = paths(root)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            journal.write(Step(usage=row()))
            journal.write(Step(usage=row()))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert read(path.read_bytes()) == ([Step(usage=row())], 0)
        assert journal.take_counts().unwritten == 2
        await journal.flush()
        assert await store.requests() == 3


async def test_a_directory_that_was_removed_is_made_again(store: Flaky, root: Path) -> None:
    async with started(store, root) as journal:
        journal.write(Step(usage=row()))
        for path in paths(root, "*/*"):
            path.unlink()
        (root / journal.id).rmdir()
        journal.write(Step(usage=row()))
        await journal.flush()
        assert await store.requests() == 2
        journal.write(Step(usage=row()))
        assert len(files(root)) == 1
        assert left_by_others(root)[1] == {journal.id}, "and is ours again"
        kill(journal)
        journal._writer._directory = None
    async with started(store, root):
        assert await store.requests() == 3


async def test_a_file_that_somebody_removed_while_the_store_was_away_is_given_up(store: Flaky, root: Path) -> None:
    async with started(store, root) as journal:
        store.away = True
        journal.write(Step(usage=row()))
        await journal.flush()
        for path in paths(root):
            path.unlink()
        store.away = False
        journal.write(Step(usage=row()))
        await journal.flush()
        assert journal.up
        assert await store.requests() == 1
        assert journal.take_counts().given_up == 1


# What is written


async def test_a_clients_words_that_cannot_be_packed_do_no_harm(store: Flaky, root: Path) -> None:
    """Like a limit of more than 64 bits."""
    life = Life("a")
    async with started(store, root) as journal:
        journal.write(life.answer(max_tokens=2**70))
        await journal.flush()
        (agent,) = await store.agents()
        assert [task.max_tokens for task in agent.tasks] == [None]
        assert await store.requests() == 1
        journal.write(Step(usage=row(requests=2**70)))
        assert journal.take_counts().given_up == 1


def test_the_first_batch_of_a_journal_is_not_one_of_its_files() -> None:
    assert fold([], "j", 1).number < Journal(MemoryStore())._writer._open.first
