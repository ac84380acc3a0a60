"""State that several gateways share, or that outlives the machine: one list in Redis."""

from __future__ import annotations

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from gateway.state import KEPT_AGENTS, StateError
from predictor.types import FinishedAgent

KEY = "justitia:finished_agents"
TIMEOUT_S = 5.0


class RedisStore:
    """url: `redis://host:port/db`, `rediss://…` or `unix:///path`."""

    def __init__(self, url: str) -> None:
        self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)

    async def append(self, agent: FinishedAgent) -> None:
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.rpush(KEY, msgspec.json.encode(agent))
                pipeline.ltrim(KEY, -KEPT_AGENTS, -1)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            raise StateError(f"redis: {error}") from error

    async def load(self) -> list[FinishedAgent]:
        try:
            rows = await self._redis.lrange(KEY, 0, -1)
            return [msgspec.json.decode(row, type=FinishedAgent) for row in rows]
        except (RedisError, OSError, msgspec.DecodeError) as error:
            raise StateError(f"redis: {error}") from error

    async def close(self) -> None:
        await self._redis.aclose()
