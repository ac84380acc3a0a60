"""How good predictions were: of the agents that finished last, what was predicted at their first release and what came."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

import numpy as np

WINDOW = 300
# Sources of an `AgentPrediction` that are no model: the ladder, and nobody, when the predictor failed.
LADDER, NOBODY = "ladder", "none"


class Judged(NamedTuple):
    """Costs in KV token·iterations."""

    source: str
    predicted: float
    p90: float
    observed: float

    @property
    def error(self) -> float:
        """Relative to the truth, as `predictor.evaluate` has it."""
        return abs(self.predicted - self.observed) / self.observed


class Accuracy:
    """Of the last `window` agents."""

    def __init__(self, window: int = WINDOW) -> None:
        self._judged: deque[Judged] = deque(maxlen=window)

    def judge(self, source: str, predicted: float, p90: float, observed: float) -> Judged | None:
        """None where there is nothing to compare."""
        if not (0 < predicted < math.inf and 0 < observed < math.inf):
            return None
        judged = Judged(source, predicted, p90, observed)
        self._judged.append(judged)
        return judged

    def error(self, source: str | None = None) -> tuple[int, float]:
        """How many agents of this source, or of all; and the median of |predicted - observed| / observed, NaN of none."""
        errors = [judged.error for judged in self._judged if source in (None, judged.source)]
        return len(errors), median(errors) if errors else math.nan

    def share_below_p90(self) -> float:
        """0.9, where the ninth decile is one. NaN of none."""
        if not self._judged:
            return math.nan
        return sum(judged.observed <= judged.p90 for judged in self._judged) / len(self._judged)

    def order(self) -> float:
        """Kendall's τ-b between predicted and observed: 1 where all pairs of agents were ordered right, 0 where as by chance,
        -1 where all were wrong. NaN if there is nothing to order."""
        predicted = _signs([judged.predicted for judged in self._judged])
        observed = _signs([judged.observed for judged in self._judged])
        pairs = math.sqrt(np.count_nonzero(predicted)) * math.sqrt(np.count_nonzero(observed))
        return float(np.sum(predicted * observed)) / pairs if pairs else math.nan


def kind(source: str) -> str:
    """A source without the model's name: for labels, which must be few."""
    return source if source in (LADDER, NOBODY) else "model"


def _signs(values: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Of the difference of each two."""
    column = np.array(values, np.float64)
    return np.sign(column[:, None] - column[None, :])
