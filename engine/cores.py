"""Which processor cores the engine's processes run on, where there are few."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def keep_apart(server: int) -> set[int] | None:
    """On a machine with two or three cores: vLLM's core and worker on the first, its server (a process id) on the others.

    Without a GPU, core and worker wait for each other in busy loops. Spread over both cores of a small machine they keep
    server, gateway and clients from running for seconds at a time; on one core they give way to each other, and the whole
    does twice as much. Returns the other cores, or None on a machine with more, where nothing is done.
    """
    cores = os.sched_getaffinity(0)
    if not 2 <= len(cores) <= 3:
        return None
    first = min(cores)
    for descendant in _descendants(server):
        confine(descendant, {first})
    confine(server, cores - {first})
    return cores - {first}


def confine(pid: int, cores: set[int]) -> None:
    """Confines all threads of a process to these cores; does nothing for a process that has ended."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                yield child
                yield from _descendants(child)
