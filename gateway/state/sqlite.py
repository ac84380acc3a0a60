"""The embedded default: one file, one table, written by one thread."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from gateway.state import KEPT_AGENTS, StateError
from predictor.types import FinishedAgent

_SCHEMA = "CREATE TABLE IF NOT EXISTS finished_agents (id INTEGER PRIMARY KEY AUTOINCREMENT, agent BLOB NOT NULL)"

_Result = TypeVar("_Result")


class SqliteStore:
    """path: the file; its directory is made. Other processes may have it open too."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="justitia-state")

    async def append(self, agent: FinishedAgent) -> None:
        encoded = msgspec.json.encode(agent)

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                row = connection.execute("INSERT INTO finished_agents (agent) VALUES (?)", (encoded,)).lastrowid
                connection.execute("DELETE FROM finished_agents WHERE id <= ?", ((row or 0) - KEPT_AGENTS,))

        await self._run(write)

    async def load(self) -> list[FinishedAgent]:
        def read(connection: sqlite3.Connection) -> list[FinishedAgent]:
            rows = connection.execute("SELECT agent FROM finished_agents ORDER BY id").fetchall()
            return [msgspec.json.decode(row[0], type=FinishedAgent) for row in rows]

        return await self._run(read)

    async def close(self) -> None:
        def close() -> None:
            if self._connection is not None:
                self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        def in_thread() -> _Result:
            if self._connection is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(self._path, timeout=5)
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute(_SCHEMA)
            return work(self._connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, in_thread)
        except (sqlite3.Error, OSError, msgspec.DecodeError) as error:
            raise StateError(f"{self._path}: {error}") from error
