"""No store: what was learned ends with the process."""

from __future__ import annotations

from collections import deque

from gateway.state import KEPT_AGENTS
from predictor.types import FinishedAgent


class MemoryStore:
    def __init__(self) -> None:
        self._agents: deque[FinishedAgent] = deque(maxlen=KEPT_AGENTS)

    async def append(self, agent: FinishedAgent) -> None:
        self._agents.append(agent)

    async def load(self) -> list[FinishedAgent]:
        return list(self._agents)

    async def close(self) -> None:
        return None
