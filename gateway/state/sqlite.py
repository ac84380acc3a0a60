"""The default store: one SQLite file, used by one thread."""

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

from gateway.flowcontrol.records import AgentRecord, UsageRow
from gateway.state.batch import Batch, Tasks
from gateway.state.blobs import unpack
from gateway.state.live import ending, packed, unpack_agent, unpack_tasks, with_tasks
from gateway.state.store import CHUNK, KEPT_AGENTS, Store
from gateway.state.types import BatchRefused, StateError
from predictor.types import FinishedAgent

# agents: the finished ones. tasks: of live agents, by run and place.
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS agents (id INTEGER PRIMARY KEY AUTOINCREMENT, agent BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS live (run TEXT PRIMARY KEY, agent BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS tasks (
        run TEXT NOT NULL, place INTEGER NOT NULL, task BLOB NOT NULL, PRIMARY KEY (run, place));
    CREATE TABLE IF NOT EXISTS usage (
        hour INTEGER NOT NULL, tenant TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, kv_cost REAL NOT NULL,
        PRIMARY KEY (hour, tenant)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS journals (id TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
"""
_ADDED = "SELECT seq FROM sqlite_sequence WHERE name = 'agents'"
_NEWEST = "SELECT agent FROM agents ORDER BY id DESC LIMIT ?"
_LAST = "SELECT coalesce(max(id), 0) FROM agents"
_BETWEEN = "SELECT id, agent FROM agents WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
_USE = """
    INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (hour, tenant) DO UPDATE SET
        requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens, kv_cost = kv_cost + excluded.kv_cost
"""
_USED = """
    SELECT tenant, hour, requests, prompt_tokens, cached_tokens, completion_tokens, kv_cost FROM usage
    WHERE hour >= ? AND hour < ? AND (? IS NULL OR tenant = ?) ORDER BY hour, tenant
"""

_Result = TypeVar("_Result")


class SqliteStore(Store):
    """A SQLite file, which other processes may have open too."""

    def __init__(self, path: str, kept_agents: int = KEPT_AGENTS) -> None:
        """path: the file; it and its directory are made, readable by their owner alone."""
        self.unreadable = 0
        self._path = Path(path).expanduser()
        self._kept_agents = kept_agents
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="justitia-state")

    async def apply(self, batch: Batch) -> int:
        def write(connection: sqlite3.Connection) -> int:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                found = connection.execute("SELECT number FROM journals WHERE id = ?", (batch.journal,)).fetchone()
                known = int(found[0]) if found else 0
                if batch.journal and known >= batch.number:
                    return known
                self._write(connection, batch)
                return known

        return await self._run(write)

    async def agents(self) -> list[AgentRecord]:
        def read(connection: sqlite3.Connection) -> list[AgentRecord]:
            with connection:
                connection.execute("BEGIN")  # both tables at one moment
                blobs = connection.execute("SELECT agent FROM live").fetchall()
                agents = [agent for (blob,) in blobs if (agent := self._agent(blob)) is not None]
                return [with_tasks(agent, self._tasks(connection, agent.run)) for agent in agents]

        return await self._run(read)

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        def read(connection: sqlite3.Connection) -> list[UsageRow]:
            return [UsageRow(*row) for row in connection.execute(_USED, (since, until, tenant, tenant))]

        return await self._run(read)

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
        # What is added meanwhile is not read: else this would not end while agents are added faster than they are read.
        until = await self._run(lambda connection: int(connection.execute(_LAST).fetchone()[0]))
        after: int | None = 0
        while after is not None:
            after, agents = await self._run(partial(self._chunk, after=after, until=until))
            for agent in agents:
                yield agent

    async def close(self) -> None:
        def close() -> None:
            if self._connection is not None:
                self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> None:
        live = [(run, packed(agent)) for run, agent in batch.agents.items()]
        connection.executemany("INSERT OR REPLACE INTO live VALUES (?, ?)", live)
        tasks = [(run, place, packed(task)) for run, of in batch.tasks.items() for place, task in of.items()]
        connection.executemany("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", tasks)
        samples = list(batch.samples)
        for run, agent in batch.over.items():
            found = connection.execute("SELECT agent FROM live WHERE run = ?", (run,)).fetchone()
            end = ending(agent, self._agent(found[0]) if found else None, self._tasks(connection, run))
            if end.refused:
                continue
            connection.execute("DELETE FROM live WHERE run = ?", (run,))
            connection.execute("DELETE FROM tasks WHERE run = ?", (run,))
            self.unreadable += end.in_part
            if end.sample is not None:
                samples.append(end.sample)
        if samples:
            connection.executemany("INSERT INTO agents (agent) VALUES (?)", [(sample,) for sample in samples])
            connection.execute("DELETE FROM agents WHERE id <= (SELECT max(id) FROM agents) - ?", (self._kept_agents,))
        rows = batch.usage.values()
        used = [
            (u.hour, u.tenant, u.requests, u.prompt_tokens, u.cached_tokens, u.completion_tokens, u.kv_cost)
            for u in rows
        ]
        connection.executemany(_USE, used)
        if batch.journal:
            connection.execute("INSERT OR REPLACE INTO journals VALUES (?, ?)", (batch.journal, batch.number))

    def _agent(self, blob: bytes) -> AgentRecord | None:
        agent = unpack_agent(blob)
        self.unreadable += agent is None
        return agent

    def _tasks(self, connection: sqlite3.Connection, run: str) -> Tasks:
        tasks, unreadable = unpack_tasks(connection.execute("SELECT place, task FROM tasks WHERE run = ?", (run,)))
        self.unreadable += unreadable
        return tasks

    def _chunk(self, connection: sqlite3.Connection, after: int, until: int) -> tuple[int | None, list[FinishedAgent]]:
        """The next agents up to the number `until`, and the number of their last; None after the end."""
        rows = connection.execute(_BETWEEN, (after, until, CHUNK)).fetchall()
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
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeEncodeError) as error:
            raise BatchRefused(f"{self._path}: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"{self._path}: {error}") from error


def _opened(path: Path) -> sqlite3.Connection:
    # SQLite gives its other files the mode of this one. An existing file is not opened: closing it would end the locks of other
    # connections.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    connection = sqlite3.connect(path, timeout=5)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last agents, never the file
        connection.executescript(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection
