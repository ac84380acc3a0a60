"""Segments: stretches of a journal, each in one file, in memory, or in both.

What is here touches the files and its own arguments and nothing else, and may block: the pump calls it in a thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gateway.flowcontrol.records import Step
from gateway.state import directory, frames
from gateway.state.batch import Batch, compact, fold
from gateway.state.directory import Directory

logger = logging.getLogger(__name__)

# Number of a journal's first batch, which is empty: a store that no longer knows of it has lost its data.
MARK = 1


@dataclass(slots=True, eq=False)
class Segment:
    """The steps of one batch."""

    # Id of the journal, and numbers of the first and the last batch whose steps are in here; several after compaction.
    journal: str
    first: int
    last: int
    # Files that go when the store has the steps.
    paths: list[Path] = field(default_factory=list)
    # All steps as bytes; None where they are to be read from the file.
    data: bytes | bytearray | None = None
    size: int = 0
    # The file holds all steps.
    on_disk: bool = False
    # The store has been given the batch, and may have applied it: it is given again unchanged.
    given: bool = False

    def records(self) -> tuple[list[Step], int]:
        """The steps, and how many of them are damaged. Raises `OSError`."""
        return frames.read(bytes(self.data) if self.data is not None else self.paths[0].read_bytes())

    def batch(self) -> tuple[Batch, int]:
        """The steps as one batch, and how many of them are damaged. Raises `OSError`."""
        records, damaged = self.records()
        return fold(records, self.journal, self.last), damaged

    def remove(self) -> None:
        remove(self.paths)

    def set_aside(self) -> None:
        """Keep the files, under a name that no gateway reads."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(directory.REFUSED))


class Merged(NamedTuple):
    """One segment made of several, the finished agents that were dropped to make it small enough, and damaged steps."""

    segment: Segment
    dropped: int
    damaged: int


class LeftBehind(NamedTuple):
    """What the root directory holds at a start."""

    # Journals of dead gateways, locked by this process now.
    dead: list[tuple[Directory, deque[Segment]]]
    # Ids of the journals of gateways that live on this machine.
    live: set[str]
    # Journals that cannot be read.
    unreadable: int


def take_over(root: Path) -> LeftBehind:
    """Lock the journals that dead gateways have left. Raises `OSError`."""
    homes, live = directory.left_by_others(root)
    dead, unreadable = [], 0
    for home in homes:
        try:
            dead.append((home, deque(_segments(home))))
        except (OSError, frames.UnknownVersion) as error:
            unreadable += 1
            logger.warning("journal %s cannot be read and is left in place: %s", home.path, error)
            home.close()
    return LeftBehind(dead, live, unreadable)


def merge(segments: list[Segment], home: Directory | None, *, kept_agents: int, limit_bytes: int) -> Merged:
    """Write the steps of several segments as the fewest that come to the same; in memory without a directory.

    The old files are still there afterwards. Raises `OSError`.
    """
    damaged = 0

    def records() -> Iterator[Step]:
        nonlocal damaged
        for segment in segments:
            found, lost = segment.records()
            damaged += lost
            yield from found

    data, dropped = compact(records(), kept_agents=kept_agents, limit_bytes=limit_bytes)
    merged = Segment(segments[0].journal, segments[0].first, segments[-1].last, size=len(data))
    if home is None:
        merged.data = data
        # If the process is killed, the old files are better than nothing.
        merged.paths = [path for segment in segments for path in segment.paths]
    else:
        merged.paths, merged.on_disk = [home.write(merged.first, merged.last, data)], True
    return Merged(merged, dropped, damaged)


def remove(paths: list[Path]) -> None:
    """Remove files whose steps the store has. If one stays and is given again, the store ignores it."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove a journal file: %s", error)


def _segments(home: Directory) -> Iterator[Segment]:
    """Raises `OSError` and `UnknownVersion`."""
    for file in home.files():
        with file.path.open("rb") as opened:
            frames.read(opened.read(len(frames.HEADER)))
        yield Segment(home.id, file.first, file.last, [file.path], None, file.size, on_disk=True, given=True)
