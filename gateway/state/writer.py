"""The file side of the journal: each step is appended to the open segment at once, whatever becomes of the disk.

The writer owns the journal's directory, the open segment with its file, and what is known of the disk. All of that changes in
the event loop alone, and nothing here waits for the store. A closed segment belongs to the pump.

A step is written with one `write` and no `fsync`: it outlives the process, not the machine's power. While the disk takes
nothing, steps are in memory, and each new segment tries the disk again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

import msgspec

from gateway.flowcontrol.records import Step
from gateway.state import directory, frames
from gateway.state.directory import Directory
from gateway.state.segments import MARK, Segment

logger = logging.getLogger(__name__)

# Size at which a segment is closed though the store cannot take it.
SEGMENT_BYTES = 2**22


class Writer:
    """Appends steps to the journal's open segment."""

    def __init__(self, journal: str, root: Path | None) -> None:
        # The open segment should go to the store before the next round is due.
        self.due = asyncio.Event()
        # Since the counts were taken last: steps that the disk did not take, and steps that cannot be packed.
        self.unwritten = self.unpackable = 0
        self._journal, self._root = journal, root
        self._directory: Directory | None = None
        self._disk_failed = False
        self._number = MARK
        self._fd: int | None = None
        self._open = self._new_segment()

    @property
    def open_bytes(self) -> int:
        return self._open.size

    @property
    def is_full(self) -> bool:
        return self._open.size >= SEGMENT_BYTES

    @property
    def directory(self) -> Directory | None:
        """The journal's directory; None while nothing can be written to it."""
        return None if self._disk_failed else self._directory

    def write(self, record: Step) -> None:
        """Append a step. Never waits for the store, and raises nothing."""
        data = _framed(record)
        if data is None:
            self.unpackable += 1
            return
        segment = self._open
        assert isinstance(segment.data, bytearray)
        if not segment.size:
            data = frames.HEADER + data
        segment.data += data
        self._append(segment, data)
        segment.size += len(data)
        if segment.size >= SEGMENT_BYTES:
            self.due.set()

    async def prepare(self) -> None:
        """Make the directory and the file of the open segment, where they are missing."""
        if self._root is not None and self._directory is None:
            try:
                self._directory = await asyncio.to_thread(directory.new, self._root, self._journal)
            except OSError as error:
                self.report_failure(error)
        if self._directory is not None and self._fd is None and not self._open.size:
            self._open = self._new_segment()

    def close_segment(self) -> Segment | None:
        """Close the open segment and begin the next; None if it is empty."""
        if not self._open.size:
            return None
        closed = self._open
        self._close_file()
        self._open = self._new_segment()
        return closed

    def report_failure(self, error: OSError) -> None:
        """Note that the disk does not work. Logged once, until it works again."""
        if not self._disk_failed:
            logger.warning(
                "journal write failed: settled tasks are only in memory until the store takes them: %s", error
            )
        self._disk_failed = True

    async def close(self) -> None:
        """Close the file. An empty one goes, and so does the directory if nothing is left in it."""
        self._close_file()
        if not self._open.size:
            await asyncio.to_thread(self._open.remove)
        if self._directory is not None:
            await asyncio.to_thread(self._directory.close)

    def _append(self, segment: Segment, data: bytes) -> None:
        if self._fd is None:
            self.unwritten += self._root is not None
            return
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError("the disk took only a part of it")
        except OSError as error:
            self.unwritten += 1
            if not self._disk_failed:
                self.due.set()  # once: with each step the store would get a batch for each
            self.report_failure(error)
            with contextlib.suppress(OSError):  # else the reader skips the incomplete step
                os.ftruncate(self._fd, segment.size)
            self._close_file()
            segment.on_disk = False
        else:
            if self._disk_failed:
                logger.info("journal writable again")
                self._disk_failed = False

    def _new_segment(self) -> Segment:
        """The next segment, with a file where there can be one."""
        self._number += 1
        segment = Segment(self._journal, self._number, self._number, data=bytearray())
        if self._directory is not None:
            try:
                path, self._fd = self._directory.create(self._number)
            except OSError as error:
                self.report_failure(error)
            else:
                segment.paths.append(path)
                segment.on_disk = True
        return segment

    def _close_file(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _framed(record: Step) -> bytes | None:
    """A step as bytes; without what its client sent, if that cannot be packed; None if nothing can."""
    try:
        return frames.frame(record)
    except Exception as error:
        logger.warning("a step cannot be packed; its texts and limits are dropped: %s", error)
    task = record.task
    try:
        if task is not None:
            task = msgspec.structs.replace(task, prompt=None, system=None, max_tokens=None)
        return frames.frame(msgspec.structs.replace(record, task=task))
    except Exception:
        logger.exception("a step cannot be packed and is lost")
        return None
