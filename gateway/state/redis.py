"""State that several gateways share, or that outlives the machine: Redis 6.2 or newer, one server and not a cluster.

    justitia:agents, …:added      finished agents: a stream of blobs, and how many there have ever been
    justitia:live                 runs of the live agents; justitia:live:<run> is a hash: `agent`, and a field for each task
    justitia:usage                hours with any use; justitia:usage:<hour> is a hash: <tenant>:<what>
    justitia:journal:<id>         number of the last batch of a journal

A batch is one transaction, which fails if another client has changed meanwhile what it was made from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeAlias

import redis.asyncio
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import DataError, RedisError, WatchError

from gateway.flowcontrol.records import AgentRecord, UsageRow
from gateway.state.batch import Batch
from gateway.state.blobs import unpack
from gateway.state.live import ending, packed, unpack_agent, unpack_tasks, with_tasks
from gateway.state.store import CHUNK, KEPT_AGENTS, Store
from gateway.state.types import BatchRefused, StateError
from predictor.types import FinishedAgent

AGENTS, ADDED = "justitia:agents", "justitia:agents:added"
LIVE, USAGE, JOURNAL = "justitia:live", "justitia:usage", "justitia:journal"
TIMEOUT_S = 5.0
CONNECTIONS = 8
# How often a batch is tried when other clients change what it is made from.
TRIES = 5
# Seconds for which a journal's number is kept after its last batch: by then no gateway gives that one again.
JOURNAL_S = 400 * 86400

_FIELD, _AGENT = b"agent", b"agent"
_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
_KV_COST = "kv_cost"

_Entries: TypeAlias = list[tuple[bytes, dict[bytes, bytes]]]
_Fields: TypeAlias = dict[bytes, bytes]


class RedisStore(Store):
    """A Redis server, which several gateways may share."""

    def __init__(self, url: str, kept_agents: int = KEPT_AGENTS) -> None:
        """url: `redis://host:port/db`, `rediss://…` or `unix:///path`."""
        self.unreadable = 0
        self._kept_agents = kept_agents
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # Once, for a connection that was cut while it was idle. The caller decides when to try again otherwise.
            retry=Retry(NoBackoff(), 1),
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)

    async def apply(self, batch: Batch) -> int:
        for _ in range(TRIES):
            async with self._redis.pipeline(transaction=True) as pipeline:
                try:
                    return int(await _result(self._apply(pipeline, batch)))
                except _Conflict:
                    continue
        raise StateError(f"redis: other clients changed the same agents {TRIES} times in a row")

    async def agents(self) -> list[AgentRecord]:
        runs = sorted(await _result(self._redis.smembers(LIVE)))
        agents: list[AgentRecord] = []
        for begin in range(0, len(runs), CHUNK):
            pipeline = self._redis.pipeline(transaction=False)
            for run in runs[begin : begin + CHUNK]:
                pipeline.hgetall(_live(run.decode()))
            agents += [
                with_tasks(agent, self._tasks(fields))
                for fields in await _result(pipeline.execute())
                if fields and (agent := self._agent(fields)) is not None
            ]
        return agents

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        hours = [int(hour) for hour in await _result(self._redis.zrangebyscore(USAGE, since, f"({until}"))]
        rows = []
        for begin in range(0, len(hours), CHUNK):
            chunk = hours[begin : begin + CHUNK]
            pipeline = self._redis.pipeline(transaction=False)
            for hour in chunk:
                pipeline.hgetall(f"{USAGE}:{hour}")
            for hour, fields in zip(chunk, await _result(pipeline.execute()), strict=True):
                rows += [row for row in _rows(hour, fields) if tenant in (None, row.tenant)]
        return rows

    async def added(self) -> int:
        return int(await _result(self._redis.get(ADDED)) or 0)

    async def newest(self, limit: int) -> list[FinishedAgent]:
        entries: _Entries = await _result(self._redis.xrevrange(AGENTS, count=limit))
        return await self._unpack(entries[::-1], texts=False)

    async def read(self) -> AsyncIterator[FinishedAgent]:
        # What is added meanwhile is not read: else this would not end while agents are added faster than they are read.
        last: _Entries = await _result(self._redis.xrevrange(AGENTS, count=1))
        after, until = "-", last[0][0].decode() if last else "-"
        while True:
            entries: _Entries = await _result(self._redis.xrange(AGENTS, min=after, max=until, count=CHUNK))
            if not entries:
                return
            after = "(" + entries[-1][0].decode()
            for agent in await self._unpack(entries):
                yield agent

    async def close(self) -> None:
        await self._redis.aclose()

    async def _apply(self, pipeline: Pipeline, batch: Batch) -> int:
        """Apply a batch in one transaction. Raises `_Conflict` when it has to be tried again."""
        try:
            journal = f"{JOURNAL}:{batch.journal}"
            await pipeline.watch(journal, *map(_live, batch.over))
            known = int(await pipeline.get(journal) or 0)
            if batch.journal and known >= batch.number:
                return known
            samples, gone, in_part = await self._ended(pipeline, batch)
            pipeline.multi()  # type: ignore[no-untyped-call]
            self._write(pipeline, batch, samples, gone)
            await pipeline.execute()
            self.unreadable += in_part
            return known
        except WatchError as error:
            raise _Conflict from error

    async def _ended(self, pipeline: Pipeline, batch: Batch) -> tuple[list[bytes], list[str], int]:
        """Finished agents, the runs of which nothing is to be left, and how many of those were incomplete."""
        samples, gone, in_part = list(batch.samples), [], 0
        for run, agent in batch.over.items():
            fields: _Fields = await pipeline.hgetall(_live(run))  # type: ignore[assignment]  # it never decodes
            tasks = self._tasks(fields) | batch.tasks.get(run, {})
            end = ending(agent, self._agent(fields) if fields else None, tasks)
            if not end.refused:
                gone.append(run)
                in_part += end.in_part
                if end.sample is not None:
                    samples.append(end.sample)
        return samples, gone, in_part

    def _write(self, pipeline: Pipeline, batch: Batch, samples: list[bytes], gone: list[str]) -> None:
        for run, tasks in batch.tasks.items():
            if run not in gone:
                pipeline.hset(_live(run), mapping={str(place): packed(task) for place, task in tasks.items()})
        for run, agent in batch.agents.items():
            pipeline.hset(_live(run), mapping={_AGENT: packed(agent)})
            pipeline.sadd(LIVE, run)
        for run in gone:
            pipeline.delete(_live(run))
            pipeline.srem(LIVE, run)
        for sample in samples:
            pipeline.xadd(AGENTS, {_FIELD: sample}, maxlen=self._kept_agents, approximate=False)
        if samples:
            pipeline.incrby(ADDED, len(samples))
        for (tenant, hour), row in batch.usage.items():
            pipeline.zadd(USAGE, {str(hour): hour})
            for name in _SUMS:
                pipeline.hincrby(f"{USAGE}:{hour}", f"{tenant}:{name}", getattr(row, name))
            pipeline.hincrbyfloat(f"{USAGE}:{hour}", f"{tenant}:{_KV_COST}", row.kv_cost)
        if batch.journal:
            pipeline.set(f"{JOURNAL}:{batch.journal}", batch.number, ex=JOURNAL_S)

    def _agent(self, fields: _Fields) -> AgentRecord | None:
        agent = unpack_agent(fields.get(_AGENT, b""))
        self.unreadable += agent is None
        return agent

    def _tasks(self, fields: _Fields) -> dict[int, Any]:
        tasks, unreadable = unpack_tasks((int(name), blob) for name, blob in fields.items() if name.isdigit())
        self.unreadable += unreadable
        return tasks

    async def _unpack(self, entries: _Entries, *, texts: bool = True) -> list[FinishedAgent]:
        blobs = [fields.get(_FIELD, b"") for _, fields in entries]
        agents, unreadable = await asyncio.to_thread(unpack, blobs, texts=texts)
        self.unreadable += unreadable
        return agents


class _Conflict(Exception):
    """Another client has changed what a transaction was made from."""


def _live(run: str) -> str:
    return f"{LIVE}:{run}"


def _rows(hour: int, fields: _Fields) -> list[UsageRow]:
    used: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        tenant, _, name = key.decode(errors="replace").rpartition(":")
        if name in _SUMS or name == _KV_COST:
            used.setdefault(tenant, {})[name] = float(value) if name == _KV_COST else int(value)
    return [UsageRow(tenant, hour, **used[tenant]) for tenant in sorted(used)]


async def _result(command: Awaitable[Any]) -> Any:
    """The result of a command. Raises `StateError`."""
    try:
        return await command
    except DataError as error:
        raise BatchRefused(f"redis: {error}") from error
    except (RedisError, OSError, ValueError) as error:
        raise StateError(f"redis: {error}") from error
