"""From what happens into the store: a step is written to a file at once, and a file is given to the store twice a second.

Whoever settles a task calls `write`, which appends to the open file and to the same bytes in memory, and returns. The pump
(`run`) closes the file, begins another, and gives the closed one to the store as one batch; then it goes. While the store is
away the files stay, the open one is let grow, and what has become long is written anew as less (`batch.compact`). The batch
that was given last is tried again as it was, since the store may have it. At a start, what other processes have left goes
first; then what the store has kept is recalled; and only then comes what has happened meanwhile.

So what is lost with the process is nothing, as long as the disk takes it; and with the disk gone, what happened since the last
batch. With neither disk nor store there is a limit to what is held, and finished agents give way first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from gateway.state import directory, frames
from gateway.state.batch import Batch, compact, fold
from gateway.state.directory import Directory
from gateway.state.store import KEPT_AGENTS, Store
from gateway.state.types import BatchRefused, Record, StateError

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
# A store that has not been asked for so long is asked whether it is there.
ASK_S = 5.0
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 5.0
# Seconds that the store is given at the end.
CLOSE_S = 6.0
# While the store is away: the file that is open is closed at this size; what waits is written anew when it is so large, and
# has doubled since; and then it is this at most, on the disk and without one.
FILE_BYTES = 2**22
COMPACT_BYTES, COMPACT_MEMORY_BYTES = 2**24, 2**23
DISK_BYTES, MEMORY_BYTES = 2**26, 2**23
# Steps that are written in a row when many are.
ROW = 50

# The first batch of a journal holds nothing: a store that does not know it any more has lost what it had.
_MARK = 1


class Counts(NamedTuple):
    """errors: failed writes to the store, and reads. unwritten: steps that the disk did not take. given_up: steps and agents
    that are nowhere any more."""

    errors: int = 0
    unwritten: int = 0
    given_up: int = 0


@dataclass(slots=True, eq=False)
class _Part:
    """A closed file, or several that have become one. data: the same, where the files do not hold all of it, or not yet asked
    for. given: to the store, which may have it."""

    journal: str
    first: int
    last: int
    paths: list[Path] = field(default_factory=list)
    data: bytes | bytearray | None = None
    size: int = 0
    on_disk: bool = False
    given: bool = False


class Journal:
    """root: directory of the journals; None to keep nothing on the disk. `up`: the store has answered when it was last asked.
    unreadable: steps in files, and files, that were passed over.
    others: journals of gateways that live on this machine, and have the same root. clock: seconds, monotonic."""

    def __init__(
        self,
        store: Store,
        root: Path | None = None,
        *,
        kept_agents: int = KEPT_AGENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.store = store
        self.up = True
        self.unreadable = 0
        self.others: set[str] = set()
        self._root, self._kept_agents, self._clock = root, kept_agents, clock
        self._recall: Callable[[], Awaitable[object]] | None = None
        self._rewrite: Callable[[], Iterable[Record]] = tuple
        self._home: Directory | None = None
        self._left: deque[tuple[Directory, deque[_Part]]] = deque()
        self._pending: deque[_Part] = deque()
        self._number = _MARK
        self._fd: int | None = None
        self._open = self._begin()
        self._applied = 0
        self._compacted = 0
        self._runs = 0
        self._disk_failed = False
        self._failures, self._not_before_s, self._asked_s = 0, 0.0, 0.0
        self._errors = self._unwritten = self._given_up = 0
        self._turns = asyncio.Lock()
        self._wake = asyncio.Event()

    @property
    def waiting_bytes(self) -> int:
        """What the store has not taken yet."""
        left = sum(part.size for _, parts in self._left for part in parts)
        return left + sum(part.size for part in self._pending) + self._open.size

    def take_counts(self) -> Counts:
        """Since they were taken last."""
        counts = Counts(self._errors, self._unwritten, self._given_up)
        self._errors = self._unwritten = self._given_up = 0
        return counts

    def new_run(self) -> str:
        """A name for an agent that no other one has, or had."""
        self._runs += 1
        return f"{self.id}-{self._runs}"

    def write(self, record: Record) -> None:
        """Returns at once, and raises nothing. When it has returned, the step outlives this process, if the disk took it."""
        data = _framed(record)
        if data is None:
            self._given_up += 1
            return
        part = self._open
        assert isinstance(part.data, bytearray)
        if not part.size:
            data = frames.HEADER + data
        part.data += data
        self._append(part, data)
        part.size += len(data)
        if part.size >= FILE_BYTES:
            self._wake.set()

    async def start(
        self, recall: Callable[[], Awaitable[object]] | None = None, rewrite: Callable[[], Iterable[Record]] = tuple
    ) -> None:
        """What others have left goes to the store, and what it has kept is recalled; later, if it is away.

        recall: reads the store, and raises `StateError`. rewrite: the steps that make a store anew which has lost what it had.
        """
        self._recall, self._rewrite = recall, rewrite
        if self._root is not None:
            try:
                await asyncio.to_thread(self._take_over, self._root)
            except OSError as error:
                logger.warning("what other gateways have left in their journals cannot be looked for: %s", error)
        await self.flush()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()
            async with self._turns:
                await self._turn()

    async def flush(self) -> None:
        """When this returns, the store has all that was written before, unless it is away."""
        async with self._turns:
            self._not_before_s = 0.0
            await self._turn()

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        except TimeoutError:
            logger.warning("the state store is slow; it is not waited for")
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self.waiting_bytes:
            logger.warning("%d bytes of the journal are left for the next start", self.waiting_bytes)
        if not self._open.size:
            await asyncio.to_thread(_remove, self._open.paths)
        for home in (self._home, *(home for home, _ in self._left)):
            if home is not None:
                await asyncio.to_thread(home.close)

    # What is written

    def _append(self, part: _Part, data: bytes) -> None:
        if self._fd is None:
            self._unwritten += self._root is not None
            return
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError("the disk took only a part of it")
        except OSError as error:
            self._unwritten += 1
            self._say_failed(error)
            with contextlib.suppress(OSError):  # else what was begun is passed over when it is read
                os.ftruncate(self._fd, part.size)
            os.close(self._fd)
            self._fd, part.on_disk = None, False
            self._wake.set()  # the sooner the store has it, the better
        else:
            if self._disk_failed:
                logger.info("the journal can be written again")
                self._disk_failed = False

    def _say_failed(self, error: OSError) -> None:
        if not self._disk_failed:
            logger.warning("the journal cannot be written; what a kill would cost is in memory only: %s", error)
        self._disk_failed = True

    def _begin(self) -> _Part:
        """The next file, or none where there can be none."""
        self._number += 1
        part = _Part(self.id, self._number, self._number, data=bytearray())
        if self._home is not None:
            try:
                path, self._fd = self._home.create(self._number)
            except OSError as error:
                self._say_failed(error)
            else:
                part.paths.append(path)
                part.on_disk = True
        return part

    def _close_file(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._pending.append(self._open)
        self._open = self._begin()

    # What is given to the store

    async def _turn(self) -> None:
        if self._root is not None and self._home is None:
            await asyncio.to_thread(self._settle_in, self._root)
        if self._home is not None and self._fd is None and not self._open.size:
            self._open = self._begin()
        if self._clock() >= self._not_before_s:
            try:
                await self._give()
            except StateError as error:
                self._failed(error)
            else:
                self._worked()
        if self._open.size >= FILE_BYTES:
            self._close_file()
        if not self.up:
            for part in self._pending:
                if part.on_disk:
                    part.data = None
            if self._is_too_much():
                await asyncio.to_thread(self._compact)

    async def _give(self) -> None:
        """Raises `StateError`."""
        while self._left:
            home, parts = self._left[0]
            while parts:
                await self._apply(parts[0])
                parts.popleft()
            await asyncio.to_thread(home.close)
            self._left.popleft()
        if self._recall is not None:
            await self.store.apply(Batch(self.id, _MARK))
            self._applied = max(self._applied, _MARK)
            await self._recall()
            self._recall = None
        while True:
            if self._open.size:
                self._close_file()
            if not self._pending:
                break
            while self._pending:
                has_lost = await self._apply(self._pending[0])
                self._pending.popleft()
                if has_lost:
                    await self._write_anew()
        if self._clock() - self._asked_s >= ASK_S:
            await self.store.added()
            self._asked_s = self._clock()

    async def _apply(self, part: _Part) -> bool:
        """Whether the store had lost something. Raises `StateError`, and then it may have it or not."""
        has_lost = False
        batch = await asyncio.to_thread(self._loaded, part)
        if batch is not None:
            part.given = True
            try:
                known = await self.store.apply(batch)
            except BatchRefused as error:
                self._given_up += 1
                logger.error("the state store can never take this, and it is put aside (.refused): %s", error)
                await asyncio.to_thread(_put_aside, part.paths)
            else:
                if part.journal == self.id:
                    has_lost = known < self._applied
                    self._applied = max(self._applied, part.last)
        await asyncio.to_thread(_remove, part.paths)
        self._asked_s = self._clock()
        return has_lost

    async def _write_anew(self) -> None:
        logger.warning("the state store has lost what it had; the agents that live are written anew")
        for number, record in enumerate(self._rewrite()):
            self.write(record)
            if number % ROW == ROW - 1:
                await asyncio.sleep(0)

    def _failed(self, error: StateError) -> None:
        self._errors += 1
        if self.up:
            logger.warning("the state store failed, and the gateway goes on alone: %s", error)
        self.up = False
        self._not_before_s = self._clock() + min(RETRY_FIRST_S * 2**self._failures, RETRY_MAX_S)
        self._failures = min(self._failures + 1, 10)

    def _worked(self) -> None:
        if not self.up:
            logger.info("the state store is back, and has what happened meanwhile")
        self.up = True
        self._failures = self._compacted = 0

    # With files, in a thread

    def _take_over(self, root: Path) -> None:
        """What dead writers have left. Raises `OSError`."""
        dead, self.others = directory.left_by_others(root)
        for home in dead:
            try:
                files = home.files()
                for file in files:
                    with file.path.open("rb") as begin:
                        frames.read(begin.read(len(frames.HEADER)))
            except (OSError, frames.UnknownVersion) as error:
                self.unreadable += 1
                logger.warning("the journal in %s cannot be read, and is left as it is: %s", home.path, error)
                home.close()
                continue
            parts = [
                _Part(home.id, file.first, file.last, [file.path], None, file.size, on_disk=True, given=True)
                for file in files
            ]
            self._left.append((home, deque(parts)))

    def _settle_in(self, root: Path) -> None:
        try:
            self._home = directory.new(root, self.id)
        except OSError as error:
            self._say_failed(error)

    def _loaded(self, part: _Part) -> Batch | None:
        """None for what is not there any more."""
        try:
            return fold(self._records(part), part.journal, part.last)
        except FileNotFoundError as error:
            self._given_up += 1
            logger.warning("a file of the journal was removed: %s", error)
            return None
        except OSError as error:
            raise StateError(f"the journal cannot be read: {error}") from error

    def _records(self, part: _Part) -> Iterator[Record]:
        """Raises `OSError`."""
        data = bytes(part.data) if part.data is not None else part.paths[0].read_bytes()
        records, unreadable = frames.read(data)
        if unreadable:
            self.unreadable += unreadable
            logger.warning("%d steps in the journal are damaged, and are passed over", unreadable)
        return iter(records)

    def _is_too_much(self) -> bool:
        parts = [part for part in self._pending if not part.given]
        held = sum(part.size for part in parts if part.data is not None)
        return sum(part.size for part in parts) >= max(COMPACT_BYTES, 2 * self._compacted) or held >= max(
            COMPACT_MEMORY_BYTES, 2 * self._compacted
        )

    def _compact(self) -> None:
        """All that waits and was never given, as one."""
        parts = [part for part in self._pending if not part.given]
        before = sum(part.size for part in parts)
        in_memory = self._home is None or self._disk_failed
        try:
            data, given_up = self._less(parts, MEMORY_BYTES if in_memory else DISK_BYTES)
            merged = _Part(self.id, parts[0].first, parts[-1].last, [], data, len(data))
            paths = [path for part in parts for path in part.paths]
            if self._home is not None and not in_memory:
                merged.paths = [self._home.write(merged.first, merged.last, data)]
                merged.data, merged.on_disk = None, True
                _remove([path for path in paths if path not in merged.paths])
            else:
                merged.paths = paths  # better than nothing, if the process is killed
        except OSError as error:
            self._say_failed(error)
            self._compacted = before
            return
        self._given_up += given_up
        if given_up:
            logger.warning("the state store is away for long: %d finished agents are given up", given_up)
        logger.info("what waits for the state store was %d bytes, and is %d", before, merged.size)
        self._compacted = merged.size
        for _ in parts:
            self._pending.pop()
        self._pending.append(merged)

    def _less(self, parts: list[_Part], limit_bytes: int) -> tuple[bytes, int]:
        """Raises `OSError`."""
        records = (record for part in parts for record in self._records(part))
        return compact(records, kept_agents=self._kept_agents, limit_bytes=limit_bytes)


def _framed(record: Record) -> bytes | None:
    """None for what cannot be packed. A client's words are the only thing that can be like that."""
    try:
        return frames.frame(record)
    except Exception as error:
        logger.warning("a step cannot be packed as it is: %s", error)
    task = record.task
    try:
        if task is not None:
            task = msgspec.structs.replace(task, prompt=None, system=None, max_tokens=None)
        return frames.frame(msgspec.structs.replace(record, task=task))
    except Exception:
        logger.exception("a step cannot be packed at all")
        return None


def _remove(paths: list[Path]) -> None:
    """What stays is passed over by the store, when it is given again."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a file of the journal cannot be removed: %s", error)


def _put_aside(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.rename(path.with_suffix(".refused"))
