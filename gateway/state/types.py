"""What is kept, and the steps in which it comes to be."""

from __future__ import annotations

import msgspec

HOUR_S = 3600


class TenantUsage(msgspec.Struct, frozen=True):
    """Tokens as the engine's usage has them; kv_cost: what was charged, in KV token·iterations."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0


class UsageRow(msgspec.Struct, frozen=True):
    """What a tenant has used in an hour. hour: seconds since 1970, the start of an hour in UTC."""

    tenant: str
    hour: int
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0

    def plus(self, other: UsageRow) -> UsageRow:
        """Of the same tenant and hour."""
        return UsageRow(
            self.tenant,
            self.hour,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.kv_cost + other.kv_cost,
        )


def hour_of(seconds: float) -> int:
    return int(seconds // HOUR_S) * HOUR_S
