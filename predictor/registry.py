"""Versions of a model in a directory, and which of them serves.

    000001.model  000002.model  …    as they were added, never changed
    promoted                         numbers, one a line, in the order in which they came to serve: the last one does

Every file appears whole or not at all (`files`), and numbers are taken with O_EXCL: a writer that is killed, or another one at
the same time, leaves a directory that can be read. Of two promotions at once, one wins.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from predictor.files import ABANDONED_S, TEMPORARY, write_atomically

MOST_VERSIONS = 10
PROMOTED = "promoted"
# Far more than any user rolls back.
MOST_PROMOTIONS = 1000

_NAME = re.compile(r"(\d{6})\.model")


class RegistryError(Exception):
    """A directory that cannot be used as asked: which, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Registry:
    """Every method raises `RegistryError`, and has changed nothing then."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, version: int) -> Path:
        return self.directory / f"{version:06}.model"

    def add(self, model: bytes) -> int:
        """Add a model; its version. Removes the oldest ones where there are too many (`prune`)."""
        with self._translated():
            self.directory.mkdir(parents=True, exist_ok=True)
            version = self._take_number()
            try:
                write_atomically(self.path(version), [model], durable=True)
            except OSError:
                self.path(version).unlink(missing_ok=True)
                raise
        self.prune()
        return version

    def versions(self) -> list[int]:
        """All versions, the oldest first."""
        with self._translated():
            if not self.directory.exists():
                return []
            # A number that has been taken, but has no contents yet, or never got them, is empty.
            return sorted(version for version, entry in self._entries() if entry.stat().st_size)

    def current(self) -> int | None:
        """The version that serves; None before the first promotion."""
        promoted = self._promoted()
        return promoted[-1] if promoted else None

    def promote(self, version: int) -> None:
        if version not in self.versions():
            raise RegistryError(self.path(version), "there is no such version")
        promoted = self._promoted()
        if not promoted or promoted[-1] != version:
            self._write_promoted([*promoted, version])

    def rollback(self) -> int:
        """Back to the version that served before the current one."""
        promoted = self._promoted()
        if len(promoted) < 2:
            raise RegistryError(self.directory, "no version has served before the current one")
        if promoted[-2] not in self.versions():
            raise RegistryError(self.path(promoted[-2]), "the version that served before is gone")
        self._write_promoted(promoted[:-1])
        return promoted[-2]

    def prune(self) -> list[int]:
        """Remove the oldest versions, but never the one that serves or the one that served before; those that were removed.

        Files that killed writers have left half done are removed too."""
        versions, needed = self.versions(), self._promoted()[-2:]
        spare = [version for version in versions if version not in needed]
        room = MOST_VERSIONS - (len(versions) - len(spare))
        gone = spare[: max(0, len(spare) - room)]
        with self._translated():
            for version in gone:
                self.path(version).unlink(missing_ok=True)
            if self.directory.exists():
                self._clear_abandoned()
        return gone

    def _clear_abandoned(self) -> None:
        before_s = time.time() - ABANDONED_S
        for entry in list(self.directory.iterdir()):
            temporary = entry.name.startswith(".") and entry.suffix == TEMPORARY
            if temporary or _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process was faster
                    found = entry.stat()
                    if found.st_mtime < before_s and (temporary or not found.st_size):
                        entry.unlink()

    def _entries(self) -> Iterator[tuple[int, Path]]:
        for entry in self.directory.iterdir():
            found = _NAME.fullmatch(entry.name)
            if found:
                yield int(found[1]), entry

    def _take_number(self) -> int:
        """Take the next number by an empty file."""
        version = max((version for version, _ in self._entries()), default=0)
        version = max([version, *self._promoted()])
        while True:
            version += 1
            try:
                os.close(os.open(self.path(version), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                continue
            return version

    def _promoted(self) -> list[int]:
        path = self.directory / PROMOTED
        with self._translated():
            try:
                lines = path.read_text("ascii", "replace").split()
            except FileNotFoundError:
                return []
        for line in lines:
            if not (line.isascii() and line.isdigit()):
                raise RegistryError(path, f"{line[:40]!r} is no version")
        return [int(line) for line in lines]

    def _write_promoted(self, versions: list[int]) -> None:
        text = "".join(f"{version:06}\n" for version in versions[-MOST_PROMOTIONS:])
        with self._translated():
            write_atomically(self.directory / PROMOTED, [text.encode()], durable=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises `RegistryError` for an `OSError`."""
        try:
            yield
        except OSError as error:
            raise RegistryError(self.directory, f"{error.strerror or error}") from error
