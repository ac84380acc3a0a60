"""The journal: what happens is in a file at once, and in the store soon after.

When a task settles, `write` appends a step to the open segment and returns (`writer`). Twice a second the pump closes the
segment and gives it to the store as one batch; then its file goes (`pump`). At a start, the segments that dead gateways have
left are given first, then the store is recalled, and only then come the new steps.

So a killed process loses nothing that the disk took. While the disk takes nothing, it loses the steps since the last batch.
With neither disk nor store there is a limit to what is kept in memory, and finished agents are dropped first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gateway.flowcontrol.records import Step
from gateway.state import segments
from gateway.state.pump import Pump
from gateway.state.segments import LeftBehind
from gateway.state.store import KEPT_AGENTS, Store
from gateway.state.writer import Writer

logger = logging.getLogger(__name__)


class Counts(NamedTuple):
    """What went wrong since the counts were taken last."""

    errors: int = 0  # failed reads and writes of the store
    unwritten: int = 0  # steps that the disk did not take
    given_up: int = 0  # steps and finished agents that are lost


class Journal:
    """Steps on their way to the store, by way of a writer and a pump, which own all state but the names."""

    def __init__(
        self,
        store: Store,
        root: Path | None = None,
        *,
        kept_agents: int = KEPT_AGENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """root: directory of all journals; None for no files. clock: seconds, monotonic."""
        self.id = secrets.token_hex(8)
        # Ids of the journals of other gateways that live on this machine and share the root.
        self.live_journals: set[str] = set()
        self._root = root
        self._unreadable = 0  # journals
        self._writer = Writer(self.id, root)
        self._pump = Pump(self.id, store, self._writer, kept_agents=kept_agents, clock=clock)

    @property
    def store(self) -> Store:
        return self._pump.store

    @store.setter
    def store(self, store: Store) -> None:
        self._pump.store = store

    @property
    def up(self) -> bool:
        """The store answered when it was last asked."""
        return self._pump.up

    @property
    def unreadable(self) -> int:
        """Damaged steps that were skipped, and journals that cannot be read."""
        return self._unreadable + self._pump.damaged

    @property
    def waiting_bytes(self) -> int:
        """Size of what the store does not have yet."""
        return self._pump.waiting_bytes + self._writer.open_bytes

    def take_counts(self) -> Counts:
        """What went wrong since this was called last."""
        writer, pump = self._writer, self._pump
        counts = Counts(pump.errors, writer.unwritten, pump.lost + writer.unpackable)
        pump.errors = pump.lost = writer.unwritten = writer.unpackable = 0
        return counts

    def write(self, record: Step) -> None:
        """Return at once, and raise nothing. The step then outlives this process, if the disk took it."""
        self._writer.write(record)

    async def start(
        self, recall: Callable[[], Awaitable[object]] | None = None, rewrite: Callable[[], Iterable[Step]] = tuple
    ) -> None:
        """Give the store what dead gateways left, then recall what it has kept; later, if it is away.

        recall: reads the store, and raises `StateError`. rewrite: returns the steps of all live agents, for a store that has
        lost its data.
        """
        left = LeftBehind([], set(), 0)
        if self._root is not None:
            try:
                left = await asyncio.to_thread(segments.take_over, self._root)
            except OSError as error:
                logger.warning("cannot look for journals that other gateways have left: %s", error)
        self.live_journals |= left.live
        self._unreadable += left.unreadable
        await self._pump.start(left.dead, recall, rewrite)

    async def run(self) -> None:
        """Give the store what is written, twice a second. Never ends by itself."""
        await self._pump.run()

    async def flush(self) -> None:
        """Wait until the store has every step that was written before the call, unless it is away.

        Steps that are written meanwhile do not prolong it.
        """
        await self._pump.flush()

    async def close(self) -> None:
        """Flush, for a few seconds at most, and close the files. What is left is for the next start."""
        await self._pump.close()
        if waiting_bytes := self.waiting_bytes:
            logger.warning("%d bytes remain in the journal for the next start", waiting_bytes)
        await self._writer.close()
