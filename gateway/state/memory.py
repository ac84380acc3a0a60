"""No store: what was learned ends with the process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from itertools import islice

from gateway.state import BATCH, KEPT_AGENTS, pack, unpack
from predictor.types import FinishedAgent


class MemoryStore:
    def __init__(self, kept_agents: int = KEPT_AGENTS) -> None:
        self.unreadable = 0
        self._blobs: deque[bytes] = deque(maxlen=kept_agents)
        self._added = 0

    async def append(self, agent: FinishedAgent) -> None:
        self._blobs.append(await asyncio.to_thread(pack, agent))
        self._added += 1

    async def added(self) -> int:
        return self._added

    async def newest(self, limit: int) -> list[FinishedAgent]:
        return await self._unpack(list(islice(reversed(self._blobs), limit))[::-1], texts=False)

    async def read(self) -> AsyncIterator[FinishedAgent]:
        blobs = list(self._blobs)
        for begin in range(0, len(blobs), BATCH):
            for agent in await self._unpack(blobs[begin : begin + BATCH]):
                yield agent

    async def close(self) -> None:
        return None

    async def _unpack(self, blobs: list[bytes], *, texts: bool = True) -> list[FinishedAgent]:
        agents, unreadable = await asyncio.to_thread(unpack, blobs, texts=texts)
        self.unreadable += unreadable
        return agents
