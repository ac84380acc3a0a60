"""A store in memory: what it has ends with the process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from itertools import islice

from gateway.flowcontrol.records import AgentRecord, UsageRow
from gateway.state.batch import Batch, Tasks
from gateway.state.blobs import unpack
from gateway.state.live import ending, with_tasks
from gateway.state.store import CHUNK, KEPT_AGENTS, Store
from predictor.types import FinishedAgent


class MemoryStore(Store):
    """Keeps everything in this process."""

    def __init__(self, kept_agents: int = KEPT_AGENTS) -> None:
        self.unreadable = 0
        self._samples: deque[bytes] = deque(maxlen=kept_agents)
        self._added = 0
        self._agents: dict[str, AgentRecord] = {}
        self._tasks: dict[str, Tasks] = {}
        self._usage: dict[tuple[str, int], UsageRow] = {}
        self._numbers: dict[str, int] = {}

    async def apply(self, batch: Batch) -> int:
        known = self._numbers.get(batch.journal, 0)
        if batch.journal:
            if known >= batch.number:
                return known
            self._numbers[batch.journal] = batch.number
        self._agents |= batch.agents
        for run, tasks in batch.tasks.items():
            self._tasks.setdefault(run, {}).update(tasks)
        samples = list(batch.samples)
        for run, agent in batch.over.items():
            end = ending(agent, self._agents.get(run), self._tasks.get(run, {}))
            if end.refused:
                continue
            self._agents.pop(run, None)
            self._tasks.pop(run, None)
            self.unreadable += end.in_part
            if end.sample is not None:
                samples.append(end.sample)
        self._samples.extend(samples)
        self._added += len(samples)
        for key, row in batch.usage.items():
            before = self._usage.get(key)
            self._usage[key] = row if before is None else before.plus(row)
        return known

    async def agents(self) -> list[AgentRecord]:
        return [with_tasks(agent, self._tasks.get(run, {})) for run, agent in self._agents.items()]

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        rows = [row for row in self._usage.values() if since <= row.hour < until and tenant in (None, row.tenant)]
        return sorted(rows, key=lambda row: (row.hour, row.tenant))

    async def added(self) -> int:
        return self._added

    async def newest(self, limit: int) -> list[FinishedAgent]:
        return await self._unpack(list(islice(reversed(self._samples), limit))[::-1], texts=False)

    async def read(self) -> AsyncIterator[FinishedAgent]:
        blobs = list(self._samples)
        for begin in range(0, len(blobs), CHUNK):
            for agent in await self._unpack(blobs[begin : begin + CHUNK]):
                yield agent

    async def close(self) -> None:
        return None

    async def _unpack(self, blobs: list[bytes], *, texts: bool = True) -> list[FinishedAgent]:
        agents, unreadable = await asyncio.to_thread(unpack, blobs, texts=texts)
        self.unreadable += unreadable
        return agents
