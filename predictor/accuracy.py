"""How far predictions are from the truth, and how well they order: the measures that serving and training share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]
# Ended agents by which a gateway that serves judges its predictions.
WINDOW = 300


def errors(costs: Numbers, predicted: Numbers) -> Numbers:
    """|predicted - true| / true. costs: the true ones, above 0. Both of one shape and in one unit."""
    return np.abs(predicted - costs) / costs


def order(costs: Numbers, predicted: Numbers) -> float | None:
    """Kendall's τ-b of two arrays of shape (agents,), of finite numbers: 1 where all pairs stand in the right order, 0 where
    as by chance, -1 where all are wrong. None where the costs have no order. One prediction for all: 0, as it orders none.

    τ-b = (C - D) / √((n₀ - n₁)(n₀ - n₂)): of n₀ pairs, C are in the right order, D in the wrong one, and n₁ and n₂ are tied
    in the one and in the other (Kendall, 1945). D is counted while sorting (Knight, 1966)."""
    ordered = np.lexsort((predicted, costs))
    costs, predicted = costs[ordered], predicted[ordered]
    _, ranks, often = np.unique(predicted, return_inverse=True, return_counts=True)
    pairs = len(costs) * (len(costs) - 1) // 2
    tied_costs = _tied(np.diff(costs) == 0)
    tied_both = _tied((np.diff(costs) == 0) & (np.diff(predicted) == 0))
    tied_predicted = int(np.sum(often * (often - 1) // 2))
    if tied_costs == pairs:
        return None
    if tied_predicted == pairs:
        return 0.0
    agreed = pairs - tied_costs - tied_predicted + tied_both - 2 * _inversions(ranks)
    # The root of the product, not the product of the roots: 1 stays 1.
    return agreed / math.sqrt((pairs - tied_costs) * (pairs - tied_predicted))


def _tied(as_before: NDArray[np.bool_]) -> int:
    """Pairs within runs of equals. as_before: whether each but the first equals the one before it."""
    ends = np.flatnonzero(np.concatenate((~as_before, [True])))
    runs = np.diff(ends, prepend=-1)
    return int(np.sum(runs * (runs - 1) // 2))


def _inversions(ranks: NDArray[np.intp]) -> int:
    """Pairs of which the larger stands first. ranks: integers in [0, len(ranks))."""
    count, size, width = 0, len(ranks), 1
    places = np.arange(size)
    while width < size:  # pairs of blocks are merged, each of which is sorted
        block = places // (2 * width)
        keys = block * size + ranks
        is_left = places // width % 2 == 0
        left, right = keys[is_left], keys[~is_left]
        ends = np.searchsorted(left, (block[~is_left] + 1) * size)
        count += int(np.sum(ends - np.searchsorted(left, right, side="right")))
        ranks = np.sort(keys) - block * size
        width *= 2
    return count
