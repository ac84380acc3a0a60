"""Versions of a model in a directory, and which of them serves.

    000001.model  000002.model  …    as they were added, never changed
    promoted                         numbers, one a line, in the order in which they came to serve: the last one does

Every file appears whole or not at all (written beside, then renamed), and numbers are taken with O_EXCL: whatever dies in
between, or does the same at the same time, the directory stays one that can be read. Of two promotions at once, one wins.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_VERSIONS = 10
PROMOTED = "promoted"
# Far more than anybody rolls back.
MOST_PROMOTIONS = 1000
# Nobody is that long about writing a file: who began it has died.
ABANDONED_S = 3600.0

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
        """Its version. The oldest go, where they become too many (`prune`)."""
        with self._told():
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = self._written(model)
            try:
                version = self._taken()
                temporary.replace(self.path(version))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        self.prune()
        return version

    def versions(self) -> list[int]:
        """All versions, the oldest first."""
        with self._told():
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
        """Keeps the newest versions, and in any case the one that serves and the one that did before. Those that went.

        What others who died have left half done goes too."""
        versions, needed = self.versions(), self._promoted()[-2:]
        spare = [version for version in versions if version not in needed]
        room = MOST_VERSIONS - (len(versions) - len(spare))
        gone = spare[: max(0, len(spare) - room)]
        with self._told():
            for version in gone:
                self.path(version).unlink(missing_ok=True)
            if self.directory.exists():
                self._clear_abandoned()
        return gone

    def _clear_abandoned(self) -> None:
        before_s = time.time() - ABANDONED_S
        for entry in list(self.directory.iterdir()):
            temporary = entry.name.startswith(".") and entry.suffix == ".tmp"
            if temporary or _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # somebody else was faster
                    found = entry.stat()
                    if found.st_mtime < before_s and (temporary or not found.st_size):
                        entry.unlink()

    def _entries(self) -> Iterator[tuple[int, Path]]:
        for entry in self.directory.iterdir():
            found = _NAME.fullmatch(entry.name)
            if found:
                yield int(found[1]), entry

    def _taken(self) -> int:
        """The next number, as an empty file."""
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
        with self._told():
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
        with self._told():
            temporary = self._written(text.encode())
            try:
                temporary.replace(self.directory / PROMOTED)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _written(self, data: bytes) -> Path:
        """To a file of its own in the directory, and to the disk."""
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.directory)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryError(self.directory, f"{error.strerror or error}") from error
