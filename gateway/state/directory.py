"""The journal's files: one directory for each gateway, within the root directory that the settings name.

    ROOT/lock                       held while a gateway looks for dead ones, and while it makes its own directory
    ROOT/<journal>/lock             held for as long as that gateway lives
    ROOT/<journal>/7-7.batch        the steps of batch 7; `3-6.batch`: of four batches, compacted into one
    ROOT/<journal>/8-8.refused      the steps of a batch that the store can never take

So gateways with the same root do not disturb each other, and the next one that starts takes over what a dead one has left. All
files are readable by their owner alone. Nothing is forced to the disk: what is written outlives the process, not the machine's
power.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from predictor.files import write_atomically

logger = logging.getLogger(__name__)

# Seconds to wait for the root's lock.
ROOT_LOCK_S = 2.0
# Suffix of a file that is kept, and not read again.
REFUSED = ".refused"

_NAME = re.compile(r"([0-9]{1,18})-([0-9]{1,18})\.batch")


class File(NamedTuple):
    """One file of a journal."""

    path: Path
    first: int  # numbers of the batches whose steps it has
    last: int
    size: int  # in bytes


class Directory:
    """The directory of one journal, locked for this process until it is closed."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def id(self) -> str:
        return self.path.name

    def files(self) -> list[File]:
        """The files in order, without those whose batches a compacted file has too. Raises `OSError`."""
        found = [
            File(path, int(match[1]), int(match[2]), path.stat().st_size)
            for path in self.path.iterdir()
            if (match := _NAME.fullmatch(path.name)) is not None
        ]
        found.sort(key=lambda file: (file.first, -file.last))
        files: list[File] = []
        for file in found:
            if files and file.last <= files[-1].last:
                file.path.unlink()  # its writer was killed before it removed the file
            else:
                files.append(file)
        return files

    def create(self, number: int) -> tuple[Path, int]:
        """Make a new file; its path, and a descriptor that appends to it. Raises `OSError`."""
        path, flags = self._file(number, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
        try:
            return path, os.open(path, flags, 0o600)
        except FileNotFoundError:  # the directory was removed
            before, self._lock = self._lock, _make(self.path)
            os.close(before)
            return path, os.open(path, flags, 0o600)

    def write(self, first: int, last: int, data: bytes) -> Path:
        """Write a whole file. Raises `OSError`; then the file is not there."""
        path = self._file(first, last)
        write_atomically(path, [data])
        return path

    def close(self) -> None:
        """Release the lock, and remove the directory unless there are steps in it."""
        with contextlib.suppress(OSError):
            if not any(_NAME.fullmatch(path.name) or path.suffix == REFUSED for path in self.path.iterdir()):
                for path in self.path.iterdir():
                    path.unlink()
                self.path.rmdir()
        os.close(self._lock)

    def _file(self, first: int, last: int) -> Path:
        return self.path / f"{first}-{last}.batch"


def new(root: Path, journal: str) -> Directory:
    """Make and lock a directory for this process. Raises `OSError`."""
    with _root_locked(root):
        return Directory(root / journal, _make(root / journal))


def left_by_others(root: Path) -> tuple[list[Directory], set[str]]:
    """The journals of dead gateways, locked for this process now; and the ids of those of live ones. Raises `OSError`."""
    dead, live = [], set()
    if root.is_dir():
        with _root_locked(root):
            for path in sorted(path for path in root.iterdir() if path.is_dir()):
                try:
                    lock = _lock(path / "lock")
                except OSError as error:
                    logger.warning("a journal cannot be locked and is left in place: %s", error)
                    continue
                if lock is None:
                    live.add(path.name)
                else:
                    dead.append(Directory(path, lock))
    return dead, live


@contextlib.contextmanager
def _root_locked(root: Path) -> Iterator[None]:
    """Hold the root's lock. Raises `OSError`, also if another gateway keeps it: one that works holds it for milliseconds, and
    one that was stopped meanwhile must not hold up this one."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    until = time.monotonic() + ROOT_LOCK_S
    while (lock := _lock(root / "lock")) is None:
        if time.monotonic() > until:
            raise OSError(errno.EBUSY, "another gateway keeps this locked", str(root / "lock"))
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(lock)


def _make(path: Path) -> int:
    """Make a directory and lock it; the descriptor of its lock. Raises `OSError`."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(path / "lock")
    if lock is None:
        raise OSError(errno.EBUSY, "another gateway has locked this", str(path))
    return lock


def _lock(path: Path) -> int | None:
    """The descriptor of a lock; None if another process has it. Raises `OSError`."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    return lock
