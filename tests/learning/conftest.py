from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.state import open_store
from predictor.types import FinishedAgent


class State:
    """A file of finished agents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    async def keep(self, agents: Sequence[FinishedAgent]) -> None:
        store = open_store(self.url)
        for agent in agents:
            await store.append(agent)
        await store.close()


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")
