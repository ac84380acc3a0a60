"""What a store can do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from gateway.flowcontrol.records import AgentRecord, UsageRow
from gateway.state.batch import Batch
from gateway.state.blobs import pack
from predictor.types import FinishedAgent

KEPT_AGENTS = 10_000
# Agents that are read at a time, where all are read.
CHUNK = 100


class Store(Protocol):
    """Every method raises `StateError`, and nothing else. Other processes may use the same store at the same time."""

    # What was skipped because it could not be unpacked, or because a part was missing.
    unreadable: int

    async def apply(self, batch: Batch) -> int:
        """Write a batch, whole or not at all; one that the store has had is ignored, whichever gateway gives it. Batches of one
        journal come in order. Returns the number of this journal's last batch before the call, 0 if there was none.

        Of finished agents the newest are kept. An agent that has gone on at another gateway is not ended. Raises
        `BatchRefused` for what can never be written."""
        ...

    async def append(self, agent: FinishedAgent) -> None:
        """Keep a finished agent that is not in any journal."""
        await self.apply(Batch(samples=[await asyncio.to_thread(pack, agent)]))

    async def agents(self) -> list[AgentRecord]:
        """The live agents with their tasks, without texts. An agent with a task that cannot be read is not `whole`."""
        ...

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        """Use in the hours from `since` (inclusive) to `until` (exclusive), by hour and tenant; of one tenant, or of all."""
        ...

    async def added(self) -> int:
        """How many finished agents all gateways have ever kept. Never decreases."""
        ...

    async def newest(self, limit: int) -> list[FinishedAgent]:
        """The newest finished agents, the oldest of them first, without texts, which could fill the memory."""
        ...

    def read(self) -> AsyncIterator[FinishedAgent]:
        """All finished agents that are kept when this begins, the oldest first, read `CHUNK` at a time. Those that go meanwhile
        may be missing."""
        ...

    async def close(self) -> None: ...
