"""What the store keeps beside finished agents."""

from __future__ import annotations

import msgspec


class UsageRow(msgspec.Struct):
    """What a tenant used in an hour. hour: its start in UTC, seconds since 1970. kv_cost: KV token·iterations."""

    tenant: str
    hour: int
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts'
    completion_tokens: int = 0
    kv_cost: float = 0.0
