"""The store side of the journal: in rounds, closed segments are given to the store as batches, in order.

The pump owns everything that the store does not have yet and the writer has closed: the segments that dead gateways left, and
its own backlog. It also owns what is known of the store. Rounds never overlap, so none of it needs a lock.

A round gives the store the backlog and the segment that is open when its turn comes, and then ends, however many steps are
written meanwhile: those are the next round's one batch. While the store is away the backlog keeps its order and the open
segment grows; a backlog that has become long is compacted. The batch that was given last is tried again unchanged, since the
store may have applied it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from gateway.flowcontrol.records import Step
from gateway.state import segments
from gateway.state.batch import Batch
from gateway.state.directory import Directory
from gateway.state.segments import MARK, Segment
from gateway.state.store import Store
from gateway.state.types import BatchRefused, StateError
from gateway.state.writer import Writer

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
# A store that has not been asked for so long is asked whether it is there.
CHECK_S = 5.0
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 5.0
# Seconds that the store is given at the end.
CLOSE_S = 6.0
# While the store is away, the backlog is compacted when it has this size, or what of it is in memory has, and again when it
# has doubled.
COMPACT_BYTES, COMPACT_MEMORY_BYTES = 2**24, 2**23
# What a compacted backlog has at most, on the disk and without one.
DISK_BYTES, MEMORY_BYTES = 2**26, 2**23
# Steps that are rewritten in a row before other tasks get a turn.
STEPS_IN_A_ROW = 50


class Pump:
    """Gives the journal's segments to the store."""

    def __init__(
        self, journal: str, store: Store, writer: Writer, *, kept_agents: int, clock: Callable[[], float]
    ) -> None:
        self.store = store
        # The store answered when it was last asked.
        self.up = True
        # Damaged steps that were skipped.
        self.damaged = 0
        # Since the counts were taken last: failed calls of the store, and steps and agents that are lost.
        self.errors = self.lost = 0
        self._journal, self._writer, self._kept_agents, self._clock = journal, writer, kept_agents, clock
        self._recall: Callable[[], Awaitable[object]] | None = None
        self._rewrite: Callable[[], Iterable[Step]] = tuple
        self._left_behind: deque[tuple[Directory, deque[Segment]]] = deque()
        self._backlog: deque[Segment] = deque()
        self._applied = 0  # number of our last batch that the store has
        self._store_is_behind = False  # it has lost batches, and the live agents are not rewritten yet
        self._compacted = 0  # size of the backlog when it was last compacted
        self._failures, self._not_before_s, self._asked_s = 0, 0.0, 0.0
        self._round: asyncio.Task[None] | None = None  # the last one that has begun
        self._next_round: asyncio.Task[None] | None = None  # it waits for the other
        self._ignores_backoff = False  # the next round does

    @property
    def waiting_bytes(self) -> int:
        """Size of the closed segments that the store does not have yet."""
        left = sum(segment.size for _, waiting in self._left_behind for segment in waiting)
        return left + sum(segment.size for segment in self._backlog)

    async def start(
        self,
        left_behind: Iterable[tuple[Directory, deque[Segment]]],
        recall: Callable[[], Awaitable[object]] | None,
        rewrite: Callable[[], Iterable[Step]],
    ) -> None:
        """See `Journal.start`."""
        self._left_behind.extend(left_behind)
        self._recall, self._rewrite = recall, rewrite
        await self.flush()

    async def run(self) -> None:
        """Run a round each `INTERVAL_S`, or earlier if the writer asks for it. Never ends by itself."""
        due = self._writer.due
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await due.wait()
            due.clear()
            await self.next_round()

    async def flush(self) -> None:
        """Wait until the store has every step that was written before the call, unless it is away."""
        self._ignores_backoff = True
        await self.next_round()

    async def next_round(self) -> None:
        """Wait for the end of a round that begins after the call. All callers that wait for it share it.

        A caller that is cancelled does not cancel the round.
        """
        if self._next_round is None:
            self._next_round = asyncio.create_task(self._run_round(self._round))
        await asyncio.shield(self._next_round)

    async def close(self) -> None:
        """Flush, and release the directories. A store that is slow is not waited for."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        except TimeoutError:
            logger.warning("state store did not take the journal within %g s", CLOSE_S)
            rounds = [task for task in (self._round, self._next_round) if task is not None]
            for task in rounds:
                task.cancel()
            await asyncio.gather(*rounds, return_exceptions=True)
        for home, _ in self._left_behind:
            await asyncio.to_thread(home.close)

    async def _run_round(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        self._round, self._next_round = self._next_round, None
        ignores_backoff, self._ignores_backoff = self._ignores_backoff, False
        await self._writer.prepare()
        if ignores_backoff or self._clock() >= self._not_before_s:
            try:
                await self._give_all()
            except StateError as error:
                self._note_failure(error)
            else:
                self._note_success()
        if self._writer.is_full:
            self._take_open_segment()
        if not self.up:
            for segment in self._backlog:
                if segment.on_disk:
                    segment.data = None
            if self._is_too_long():
                await self._compact()

    async def _give_all(self) -> None:
        """Give the store what waits, and nothing twice. Raises `StateError`."""
        while self._left_behind:
            home, waiting = self._left_behind[0]
            while waiting:
                await self._give_first(waiting)
            self._left_behind.popleft()
            await asyncio.to_thread(home.close)
        if self._recall is not None:
            await self.store.apply(Batch(self._journal, MARK))
            self._applied = max(self._applied, MARK)
            await self._recall()
            self._recall = None
        await self._give_backlog()
        if self._store_is_behind:
            self._store_is_behind = False
            await self._write_anew()
            await self._give_backlog()
        if self._clock() - self._asked_s >= CHECK_S:
            await self.store.added()
            self._asked_s = self._clock()

    async def _give_backlog(self) -> None:
        """The backlog, and then the open segment, once: a loop until nothing is left would not end under load."""
        while self._backlog:
            await self._give_first(self._backlog)
        self._take_open_segment()
        if self._backlog:
            await self._give_first(self._backlog)

    async def _give_first(self, waiting: deque[Segment]) -> None:
        """Give the store the first segment, which then goes. Raises `StateError`: then the store has it or not."""
        segment = waiting[0]
        batch = await self._batch(segment)
        finish = segment.remove
        if batch is not None:
            segment.given = True
            try:
                known = await self.store.apply(batch)
            except BatchRefused as error:
                self.lost += 1
                logger.error("the state store refuses a batch; its file is kept as *.refused: %s", error)
                finish = segment.set_aside
            else:
                if segment.journal == self._journal:
                    self._store_is_behind |= known < self._applied
                    self._applied = max(self._applied, segment.last)
        waiting.popleft()
        await asyncio.to_thread(finish)
        self._asked_s = self._clock()

    async def _batch(self, segment: Segment) -> Batch | None:
        """None if the segment's file is gone. Raises `StateError`."""
        try:
            batch, damaged = await asyncio.to_thread(segment.batch)
        except FileNotFoundError as error:
            self.lost += 1
            logger.warning("a journal file was removed, and its steps are lost: %s", error)
            return None
        except OSError as error:
            raise StateError(f"the journal cannot be read: {error}") from error
        self._count_damaged(damaged)
        return batch

    async def _write_anew(self) -> None:
        logger.warning("the state store has lost data: writing the live agents again")
        for number, record in enumerate(self._rewrite()):
            self._writer.write(record)
            if number % STEPS_IN_A_ROW == STEPS_IN_A_ROW - 1:
                await asyncio.sleep(0)

    def _take_open_segment(self) -> None:
        segment = self._writer.close_segment()
        if segment is not None:
            self._backlog.append(segment)

    def _note_failure(self, error: StateError) -> None:
        self.errors += 1
        if self.up:
            logger.warning("state store failed; the gateway serves without it: %s", error)
        self.up = False
        self._not_before_s = self._clock() + min(RETRY_FIRST_S * 2**self._failures, RETRY_MAX_S)
        self._failures = min(self._failures + 1, 10)

    def _note_success(self) -> None:
        if not self.up:
            logger.info("state store reachable again; backlog applied")
        self.up = True
        self._failures = self._compacted = 0

    def _count_damaged(self, damaged: int) -> None:
        if damaged:
            self.damaged += damaged
            logger.warning("skipped %d damaged journal steps", damaged)

    def _is_too_long(self) -> bool:
        waiting = [segment for segment in self._backlog if not segment.given]
        size = sum(segment.size for segment in waiting)
        in_memory = sum(segment.size for segment in waiting if segment.data is not None)
        return size >= max(COMPACT_BYTES, 2 * self._compacted) or in_memory >= max(
            COMPACT_MEMORY_BYTES, 2 * self._compacted
        )

    async def _compact(self) -> None:
        """Make one segment of all that the store was never given."""
        waiting = [segment for segment in self._backlog if not segment.given]
        before = sum(segment.size for segment in waiting)
        home = self._writer.directory
        limit_bytes = MEMORY_BYTES if home is None else DISK_BYTES
        try:
            merged, dropped, damaged = await asyncio.to_thread(
                segments.merge, waiting, home, kept_agents=self._kept_agents, limit_bytes=limit_bytes
            )
        except OSError as error:
            self._writer.report_failure(error)
            self._compacted = before
            return
        self._count_damaged(damaged)
        self.lost += dropped
        if dropped:
            logger.warning("state store away for too long: %d finished agents are dropped", dropped)
        logger.info("journal backlog compacted from %d to %d bytes", before, merged.size)
        self._compacted = merged.size
        for _ in waiting:
            self._backlog.pop()
        self._backlog.append(merged)
        covered = [path for segment in waiting for path in segment.paths if path not in merged.paths]
        await asyncio.to_thread(segments.remove, covered)
