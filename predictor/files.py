"""Writing a file so that its readers find the old content or the new, and never a part of either."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

# Seconds after which a temporary file counts as abandoned: no writer takes that long, so its writer was killed.
ABANDONED_S = 3600.0
# Ends the name of a temporary file, which begins with a dot.
TEMPORARY = ".tmp"


def write_atomically(path: Path, chunks: Iterable[bytes], *, durable: bool = False) -> None:
    """Write a file beside `path`, readable by its owner alone, and rename it to `path`.

    Concurrent writers do not disturb each other: one of them wins. `durable` is for files that a power cut must not cost: the
    content is forced to the disk before the rename, without which `path` could turn out empty, and the directory after it,
    without which the old content could come back.

    Raises `OSError`, and what `chunks` raises; `path` has its old content then, unless the directory could not be synced.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(chunks)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        _sync_directory(path.parent)
    _remove_abandoned(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` have left."""
    before_s = time.time() - ABANDONED_S
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if temporary.stat().st_mtime < before_s:
                temporary.unlink()
