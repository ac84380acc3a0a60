"""What is kept over restarts: the last finished agents, the live agents, and what each tenant has used.

SQLite by default, Redis when gateways share it, memory to keep nothing. Each step is written to the gateway's own journal, and
from there reaches the store in batches: a store that is away for a while costs nothing, and never holds up a request.

    types       what is kept, and the steps that change it
    blobs       finished agents, packed
    frames      steps as bytes
    batch       many steps as one, each agent and each sum once
    directory   the journals' directories, and their locks
    segments    stretches of a journal, in files or in memory
    writer      steps into the open segment
    pump        closed segments into the store
    journal     writer and pump together
    store       what a store can do; `memory`, `sqlite` and `redis` do it
    live        live agents as a store keeps them
"""

from __future__ import annotations

from gateway.flowcontrol.records import AgentRecord, Step, TenantUsage, UsageRow, finished, hour_of
from gateway.state.batch import Batch
from gateway.state.blobs import pack, unpack, without_texts
from gateway.state.journal import Journal
from gateway.state.store import KEPT_AGENTS, Store
from gateway.state.types import BatchRefused, StateError

__all__ = [
    "KEPT_AGENTS",
    "AgentRecord",
    "Batch",
    "BatchRefused",
    "Journal",
    "StateError",
    "Step",
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
