"""What is kept over restarts: the last finished agents, those that live, and who has used how much.

SQLite by default, Redis when gateways share it, memory for none. What happens is written to a journal of the gateway's own
(`journal`), and given from there to the store in batches: a store that is gone for a while costs nothing, and never holds up
a request.

    types       what is kept, and a step of it
    blobs       finished agents, packed
    frames      steps as bytes
    batch       many steps as one, each agent and each sum once
    directory   the journal's files
    journal     from the files into the store
    store       what a store is asked; `memory`, `sqlite` and `redis` answer
"""

from __future__ import annotations

from gateway.state.batch import Batch
from gateway.state.blobs import pack, unpack, without_texts
from gateway.state.journal import Journal
from gateway.state.store import KEPT_AGENTS, Store
from gateway.state.types import AgentState, BatchRefused, Record, StateError, TenantUsage, UsageRow, finished, hour_of

__all__ = [
    "KEPT_AGENTS",
    "AgentState",
    "Batch",
    "BatchRefused",
    "Journal",
    "Record",
    "StateError",
    "Store",
    "TenantUsage",
    "UsageRow",
    "finished",
    "hour_of",
    "open_store",
    "pack",
    "unpack",
    "without_texts",
]


def open_store(url: str, kept_agents: int = KEPT_AGENTS) -> Store:
    """The store at a URL of the settings: `sqlite:///path`, `redis://…`, or `memory:`."""
    from gateway.state.memory import MemoryStore
    from gateway.state.redis import RedisStore
    from gateway.state.sqlite import SqliteStore

    if url == "memory:":
        return MemoryStore(kept_agents)
    if url.startswith("sqlite:///"):
        return SqliteStore(url.removeprefix("sqlite:///"), kept_agents)
    return RedisStore(url, kept_agents)
