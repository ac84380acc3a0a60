"""State that several gateways share, or that outlives the machine: a stream in Redis (6.2 or newer)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from gateway.state import BATCH, KEPT_AGENTS, StateError, pack, unpack
from predictor.types import FinishedAgent

AGENTS = "justitia:agents"
ADDED = "justitia:agents:added"
TIMEOUT_S = 5.0
CONNECTIONS = 8

_FIELD = b"agent"
_Entries = list[tuple[bytes, dict[bytes, bytes]]]


class RedisStore:
    """url: `redis://host:port/db`, `rediss://…` or `unix:///path`."""

    def __init__(self, url: str, kept_agents: int = KEPT_AGENTS) -> None:
        self.unreadable = 0
        self._kept_agents = kept_agents
        # When many agents end at once, their writes take turns.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)

    async def append(self, agent: FinishedAgent) -> None:
        blob = await asyncio.to_thread(pack, agent)
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.xadd(AGENTS, {_FIELD: blob}, maxlen=self._kept_agents, approximate=False)
        pipeline.incr(ADDED)
        await _asked(pipeline.execute())

    async def added(self) -> int:
        return int(await _asked(self._redis.get(ADDED)) or 0)

    async def newest(self, limit: int) -> list[FinishedAgent]:
        entries: _Entries = await _asked(self._redis.xrevrange(AGENTS, count=limit))
        return await self._unpack(entries[::-1], texts=False)

    async def read(self) -> AsyncIterator[FinishedAgent]:
        after = "-"
        while True:
            entries: _Entries = await _asked(self._redis.xrange(AGENTS, min=after, count=BATCH))
            if not entries:
                return
            after = "(" + entries[-1][0].decode()
            for agent in await self._unpack(entries):
                yield agent

    async def close(self) -> None:
        await self._redis.aclose()

    async def _unpack(self, entries: _Entries, *, texts: bool = True) -> list[FinishedAgent]:
        blobs = [fields.get(_FIELD, b"") for _, fields in entries]
        agents, unreadable = await asyncio.to_thread(unpack, blobs, texts=texts)
        self.unreadable += unreadable
        return agents


async def _asked(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except (RedisError, OSError, ValueError) as error:
        raise StateError(f"redis: {error}") from error
