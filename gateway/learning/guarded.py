"""The predictor as flow control asks it: timed, and never in the way when it fails."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from predictor.types import AgentPrediction, AgentProgress, Arrival, FinishedAgent, Predictor, TaskContent

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class PredictionMetrics(Protocol):
    def predicted(self, seconds: float, *, failed: bool) -> None: ...


class GuardedPredictor:
    """Answers None where the predictor raises, and logs it."""

    def __init__(self, predictor: Predictor, metrics: PredictionMetrics) -> None:
        self._predictor, self._metrics = predictor, metrics

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival | None:
        begun_s = time.perf_counter()
        arrival = _guarded("on a task", lambda: self._predictor.arrive(content, progress))
        failed = arrival is None or not math.isfinite(arrival.agent.cost)
        self._metrics.predicted(time.perf_counter() - begun_s, failed=failed)
        return arrival

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction | None:
        return _guarded("on an agent", lambda: self._predictor.predict_agent(progress))

    def learn(self, agent: FinishedAgent) -> None:
        _guarded("to learn from an agent", lambda: self._predictor.learn(agent))


def _guarded(what: str, ask: Callable[[], Answer]) -> Answer | None:
    try:
        return ask()
    except Exception:
        logger.exception("the predictor failed %s", what)
        return None
