"""The model that serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Serves:
    """created_at: seconds since 1970. log_error: median of |log(observed/predicted)| on agents that were held out."""

    name: str
    version: int
    created_at: float
    log_error: float


class Learning:
    serves: Serves | None = None

    async def look(self) -> None:
        """Let what is current serve, if it does not yet."""
