"""The embedded default: one file, one table, used by one thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from gateway.state import BATCH, KEPT_AGENTS, StateError, pack, unpack
from predictor.types import FinishedAgent

_SCHEMA = "CREATE TABLE IF NOT EXISTS agents (id INTEGER PRIMARY KEY AUTOINCREMENT, agent BLOB NOT NULL)"
_ADDED = "SELECT seq FROM sqlite_sequence WHERE name = 'agents'"
_NEWEST = "SELECT agent FROM agents ORDER BY id DESC LIMIT ?"
_AFTER = "SELECT id, agent FROM agents WHERE id > ? ORDER BY id LIMIT ?"

_Result = TypeVar("_Result")


class SqliteStore:
    """path: the file; its directory is made, and both are for their owner alone. Other processes may have it open too."""

    def __init__(self, path: str, kept_agents: int = KEPT_AGENTS) -> None:
        self.unreadable = 0
        self._path = Path(path).expanduser()
        self._kept_agents = kept_agents
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="justitia-state")

    async def append(self, agent: FinishedAgent) -> None:
        def write(connection: sqlite3.Connection) -> None:
            blob = pack(agent)
            with connection:
                number = connection.execute("INSERT INTO agents (agent) VALUES (?)", (blob,)).lastrowid
                connection.execute("DELETE FROM agents WHERE id <= ?", ((number or 0) - self._kept_agents,))

        await self._run(write)

    async def added(self) -> int:
        def ask(connection: sqlite3.Connection) -> int:
            found = connection.execute(_ADDED).fetchone()
            return int(found[0]) if found else 0

        return await self._run(ask)

    async def newest(self, limit: int) -> list[FinishedAgent]:
        def read(connection: sqlite3.Connection) -> list[FinishedAgent]:
            rows = connection.execute(_NEWEST, (limit,)).fetchall()
            return self._unpack([blob for (blob,) in reversed(rows)], texts=False)

        return await self._run(read)

    async def read(self) -> AsyncIterator[FinishedAgent]:
        last: int | None = 0
        while last is not None:
            last, agents = await self._run(partial(self._batch, after=last))
            for agent in agents:
                yield agent

    async def close(self) -> None:
        def close() -> None:
            if self._connection is not None:
                self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()

    def _batch(self, connection: sqlite3.Connection, after: int) -> tuple[int | None, list[FinishedAgent]]:
        """The next ones, and the number of their last; None after the end."""
        rows = connection.execute(_AFTER, (after, BATCH)).fetchall()
        return (rows[-1][0] if rows else None), self._unpack([blob for _, blob in rows])

    def _unpack(self, blobs: list[bytes], *, texts: bool = True) -> list[FinishedAgent]:
        agents, unreadable = unpack(blobs, texts=texts)
        self.unreadable += unreadable
        return agents

    async def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        def in_thread() -> _Result:
            if self._connection is None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._connection = _opened(self._path)
            return work(self._connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"{self._path}: {error}") from error


def _opened(path: Path) -> sqlite3.Connection:
    # What SQLite writes beside it is as the file is. One that is there is not touched: to close it would end others' locks.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    connection = sqlite3.connect(path, timeout=5)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last agents, never the file
        connection.execute(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection
