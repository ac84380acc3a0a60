"""How good predictions were: of the agents that finished last, what was predicted at their first release and what came."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from predictor.accuracy import WINDOW, Numbers, errors, order
from predictor.types import NO_SOURCE

# The source of a prediction that no model corrected.
LADDER = "ladder"


class Judged(NamedTuple):
    """Costs in KV token·iterations."""

    source: str
    predicted: float
    p90: float
    observed: float


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
        judged = [judged for judged in self._judged if source in (None, judged.source)]
        return len(judged), float(np.median(errors(*_columns(judged)))) if judged else math.nan

    def share_below_p90(self) -> float:
        """0.9, where the ninth decile is one. NaN of none."""
        if not self._judged:
            return math.nan
        return sum(judged.observed <= judged.p90 for judged in self._judged) / len(self._judged)

    def order(self) -> float:
        """Kendall's τ-b between predicted and observed (`predictor.accuracy.order`). NaN if there is nothing to order."""
        observed, predicted = _columns(self._judged)
        found = order(observed, predicted)
        return math.nan if found is None or np.ptp(predicted) == 0 else found


def kind(source: str) -> str:
    """A source without the model's name: for labels, which must be few."""
    return source if source in (LADDER, NO_SOURCE) else "model"


def _columns(judged: Collection[Judged]) -> tuple[Numbers, Numbers]:
    """Observed and predicted costs."""
    return np.array([one.observed for one in judged]), np.array([one.predicted for one in judged])
