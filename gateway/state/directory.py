"""The journal's files: one directory for each gateway that writes, within the one that the settings name.

    ROOT/lock                       held while somebody looks who is alive, and makes a directory of its own
    ROOT/<journal>/lock             held for as long as that gateway lives
    ROOT/<journal>/7-7.batch        the steps of batch 7; `3-6.batch`: of four batches, written anew as one

So gateways with the same root do not meet, and what a dead one has left goes to whoever starts next. All of it is for its
owner alone. Nothing is forced to the disk: what is written outlives the process, not the machine's power.
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

logger = logging.getLogger(__name__)

# Seconds to wait until nobody else looks who is alive.
ALONE_S = 2.0

_NAME = re.compile(r"([0-9]{1,18})-([0-9]{1,18})\.batch")


class File(NamedTuple):
    """first, last: numbers of the batches in it."""

    path: Path
    first: int
    last: int
    size: int


class Directory:
    """Of one journal, ours alone until it is closed."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def id(self) -> str:
        return self.path.name

    def files(self) -> list[File]:
        """In order. What a file of several batches holds is taken from there. Raises `OSError`."""
        found = [
            File(path, int(match[1]), int(match[2]), path.stat().st_size)
            for path in self.path.iterdir()
            if (match := _NAME.fullmatch(path.name)) is not None
        ]
        found.sort(key=lambda file: (file.first, -file.last))
        files: list[File] = []
        for file in found:
            if files and file.last <= files[-1].last:
                file.path.unlink()  # its writer was killed before it could do that
            else:
                files.append(file)
        return files

    def create(self, number: int) -> tuple[Path, int]:
        """A new file, and the descriptor to append to. Raises `OSError`."""
        path, flags = self._file(number, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
        try:
            return path, os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody has removed the directory
            before, self._lock = self._lock, _made(self.path)
            os.close(before)
            return path, os.open(path, flags, 0o600)

    def write(self, first: int, last: int, data: bytes) -> Path:
        """A file that is there whole, or not at all. Raises `OSError`."""
        path = self._file(first, last)
        new = path.with_suffix(".new")
        try:
            with os.fdopen(os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                file.write(data)
            return new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise

    def close(self) -> None:
        """It goes, unless there is something left in it."""
        with contextlib.suppress(OSError):
            if not any(_NAME.fullmatch(path.name) or path.suffix == ".refused" for path in self.path.iterdir()):
                for path in self.path.iterdir():
                    path.unlink()
                self.path.rmdir()
        os.close(self._lock)

    def _file(self, first: int, last: int) -> Path:
        return self.path / f"{first}-{last}.batch"


def new(root: Path, journal: str) -> Directory:
    """For this process. Raises `OSError`."""
    with _alone(root):
        return Directory(root / journal, _made(root / journal))


def left_by_others(root: Path) -> tuple[list[Directory], set[str]]:
    """The journals whose writers are dead, now ours; and the ids of those whose writers live. Raises `OSError`."""
    dead, alive = [], set()
    if root.is_dir():
        with _alone(root):
            for path in sorted(path for path in root.iterdir() if path.is_dir()):
                try:
                    lock = _lock(path / "lock")
                except OSError as error:
                    logger.warning("a journal cannot be locked, and is left as it is: %s", error)
                    continue
                if lock is None:
                    alive.add(path.name)
                else:
                    dead.append(Directory(path, lock))
    return dead, alive


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else is at this meanwhile. It takes milliseconds; for somebody who was stopped in it, nobody waits longer."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    until = time.monotonic() + ALONE_S
    while (lock := _lock(root / "lock")) is None:
        if time.monotonic() > until:
            raise OSError(errno.EBUSY, "another gateway holds this for long", str(root / "lock"))
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(lock)


def _made(path: Path) -> int:
    """A directory's lock."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(path / "lock")
    if lock is None:
        raise OSError(errno.EBUSY, "another gateway has this", str(path))
    return lock


def _lock(path: Path) -> int | None:
    """None, if somebody else has it."""
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
