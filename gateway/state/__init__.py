"""Where what was learned is kept over restarts: the last finished agents.

SQLite by default, Redis when gateways share it, memory for none. A store that fails is said so and counted; it never holds
up a request.
"""

from __future__ import annotations

from typing import Protocol

from predictor.types import FinishedAgent

KEPT_AGENTS = 10_000


class StateError(Exception):
    """The store could not be read or written."""


class Store(Protocol):
    """All of it raises `StateError`, and nothing else."""

    async def append(self, agent: FinishedAgent) -> None:
        """Keep an agent; beyond `KEPT_AGENTS` the oldest goes."""
        ...

    async def load(self) -> list[FinishedAgent]:
        """All that are kept, the oldest first."""
        ...

    async def close(self) -> None: ...


def open_store(url: str) -> Store:
    """The store at a URL of the settings: `sqlite:///path`, `redis://…`, or `memory:`."""
    from gateway.state.memory import MemoryStore
    from gateway.state.redis import RedisStore
    from gateway.state.sqlite import SqliteStore

    if url == "memory:":
        return MemoryStore()
    if url.startswith("sqlite:///"):
        return SqliteStore(url.removeprefix("sqlite:///"))
    return RedisStore(url)
