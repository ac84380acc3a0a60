"""The model that serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Serves:
    """created_at: seconds since 1970. error: median of |predicted - observed| / observed of agents
    that were held out; NaN if nobody says."""

    name: str
    version: int
    created_at: float
    error: float


class Learning:
    serves: Serves | None = None

    async def look(self) -> None:
        """Let what is current serve, if it does not yet."""
