"""What a store is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from gateway.state.batch import Batch
from gateway.state.blobs import pack
from gateway.state.types import AgentState, UsageRow
from predictor.types import FinishedAgent

KEPT_AGENTS = 10_000
# Agents that are read at once, where all are read.
CHUNK = 100


class Store(Protocol):
    """All of it raises `StateError`, and nothing else. Other processes may use the same store meanwhile.

    unreadable: what was passed over because it could not be unpacked, or was there only in part.
    """

    unreadable: int

    async def apply(self, batch: Batch) -> int:
        """Write a batch: all of it or nothing, and not again if the store has had it, whoever gives it. The number of the
        batch of this journal that the store had last until now, 0 if it had none. Batches of one journal come in order.

        Finished agents are kept; beyond as many as are kept the oldest goes. An agent that has gone on elsewhere since it
        was given up is not ended. Raises `BatchRefused` for what can never be written."""
        ...

    async def append(self, agent: FinishedAgent) -> None:
        """Keep a finished agent that is not in any journal."""
        await self.apply(Batch(samples=[await asyncio.to_thread(pack, agent)]))

    async def agents(self) -> list[AgentState]:
        """Those that live, with their tasks but without texts. One of which a task cannot be read is not `whole`."""
        ...

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        """Of the hours from `since` until before `until`, by hour and tenant; of one tenant, or of all."""
        ...

    async def added(self) -> int:
        """How many finished agents have ever been kept, by anybody. Never less than before."""
        ...

    async def newest(self, limit: int) -> list[FinishedAgent]:
        """The last so many finished agents, the oldest first, without their texts: so many of those would fill the memory."""
        ...

    def read(self) -> AsyncIterator[FinishedAgent]:
        """All finished agents that are kept, the oldest first, taken from the store some at a time."""
        ...

    async def close(self) -> None: ...
