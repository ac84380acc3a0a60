"""The model that serves: what the registry says is current, loaded beside the requests.

Whoever promotes a version or rolls one back, a training or a user, changes the registry alone; it is looked at every few
seconds. A model that cannot be loaded is refused, and what served before goes on: the model before it, or the ladder.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gateway.telemetry.metrics import Metrics
from predictor.learned import Learned
from predictor.model import Told, load
from predictor.registry import Registry, RegistryError
from predictor.types import Predictor

logger = logging.getLogger(__name__)

POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class Serves:
    """The model that serves. created_at: seconds since 1970, 0 if not recorded. error: median of |predicted - observed| /
    observed of agents that were held out; NaN if not recorded."""

    name: str
    version: int
    created_at: float
    error: float


class Learning:
    """models: None, or of a predictor that takes no model: nothing is ever loaded."""

    def __init__(self, predictor: Predictor, models: Path | None, metrics: Metrics, *, poll_s: float = POLL_S) -> None:
        self.serves: Serves | None = None
        self.learned = predictor if isinstance(predictor, Learned) and models is not None else None
        self._registry = Registry(models or Path())
        self._metrics, self._poll_s = metrics, poll_s
        self._seen: int | None = None  # the version that serves, or was refused for good
        self._told: str | None = None
        self._looking = asyncio.Lock()

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._poll_s)

    async def look(self) -> None:
        """Let what is current serve, if it does not yet."""
        if self.learned is None:
            return
        async with self._looking:  # the watch may look while a training ends
            try:
                version = await asyncio.to_thread(self._registry.current)
            except RegistryError as error:
                self._refuse(f"which model is to serve cannot be read: {error}")
                return
            if version == self._seen:
                self._told = None
            else:
                await self._change(version, self.learned)

    @property
    def failures(self) -> int:
        """Predictions that models failed to make, since the start."""
        return 0 if self.learned is None else self.learned.failures

    async def _change(self, version: int | None, learned: Learned) -> None:
        if version is None:
            self._seen, self._told = None, None
            learned.model, self.serves = None, None
            logger.info("no model is current: the ladder serves")
            return
        try:
            model = await asyncio.to_thread(load, self._registry.path(version))
        except Exception as error:  # whatever a library makes of a bad file
            self._refuse(f"the model {version:06} is refused: {str(error) or type(error).__name__}")
            if not _may_pass(error):
                self._seen = version
            return
        self._seen, self._told = version, None
        learned.model = model
        self.serves = Serves(model.name, version, created_at(model.told), error_of(model.told))
        logger.info("the model %s serves, made from %d agents", model.name, model.told.agents)

    def _refuse(self, reason: str) -> None:
        """Counted and said once for each reason."""
        if reason != self._told:
            self._metrics.learning.model_refused()
            logger.warning("%s; %s serves on", reason, "the ladder" if self.serves is None else self.serves.name)
        self._told = reason


def _may_pass(error: Exception) -> bool:
    """Whether it is not the model's fault: of files that are open, of the disk, of memory."""
    return isinstance(error, (OSError, MemoryError)) or isinstance(error.__cause__, OSError)


def created_at(told: Told) -> float:
    """In seconds since 1970; 0 if nobody says."""
    try:
        return datetime.fromisoformat(told.created).timestamp()
    except ValueError:
        return 0.0


def error_of(told: Told) -> float:
    return told.metrics.get("median_error", math.nan)
