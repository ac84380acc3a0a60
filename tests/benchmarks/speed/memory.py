"""What a relay takes of memory, when it is new and with many streams open on it."""

from __future__ import annotations

import asyncio

from tests.benchmarks.speed.bench import Bench, Figures, open_streams
from tests.benchmarks.speed.relays import Relay

# Seldom enough that no event waits for another.
INTERVAL_MS = 1000


async def memory(bench: Bench, relay: Relay) -> Figures:
    """relay: one that has done nothing yet. MiB."""
    new = relay.memory_mib()
    async with open_streams(bench, relay, [f"paced:{INTERVAL_MS}"] * bench.settings.open_streams):
        await asyncio.sleep(INTERVAL_MS / 1000)
        return {"new": new, "open": relay.memory_mib()}
