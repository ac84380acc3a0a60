"""Boosted trees, asked without the library that grew them.

For one row, XGBoost's own call takes a quarter of a millisecond, most of it before the first tree is looked at; and trees
that are damaged, it may answer by ending the process. These are complete binary trees in arrays, a level after the other, so
that all trees go down a level at once: some ten operations of numpy.

A row is looked at twice over, once with −∞ and once with +∞ for what is not known: a node's column tells, beside the
feature, to which side the unknown goes there.
"""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]

DEEPEST = 10
# So many answers at once, when there are many rows.
CHUNK = 500


class Trees(msgspec.Struct, frozen=True):
    """`outputs` sums of as many trees each, all of `depth` levels. With n trees, those of the first output first, level l has
    n·2^l nodes; the children of its node i are 2i (below the threshold) and 2i + 1 of the next. columns: int32, level after
    level, of features with −∞ for unknown, then of those with +∞; thresholds: float32, in that order; leaves: float32,
    n·2^depth. Little-endian."""

    outputs: int
    depth: int
    columns: bytes
    thresholds: bytes
    leaves: bytes


class Forest:
    """`Trees` that can be asked. Raises ValueError, in words, for such as cannot."""

    def __init__(self, trees: Trees, features: int) -> None:
        if not (trees.outputs > 0 and 0 <= trees.depth <= DEEPEST):
            raise ValueError(f"{trees.outputs} outputs of depth {trees.depth}")
        of_a_tree = 4 << trees.depth
        count, rest = divmod(len(trees.leaves), of_a_tree)
        nodes = 4 * count * ((1 << trees.depth) - 1)
        if rest or not count or count % trees.outputs or {len(trees.columns), len(trees.thresholds)} != {nodes}:
            raise ValueError("nodes and leaves do not match")
        columns = np.frombuffer(trees.columns, "<i4").astype(np.intp)
        thresholds = np.frombuffer(trees.thresholds, "<f4").astype(np.float32)
        self._leaves = np.frombuffer(trees.leaves, "<f4").astype(np.float64)
        if ((columns < 0) | (columns >= 2 * features)).any():
            raise ValueError("a feature that rows do not have")
        if np.isnan(thresholds).any() or not np.isfinite(self._leaves).all():
            raise ValueError("a threshold or a leaf is no number")
        self.trees = trees
        self.features = features
        self._roots = np.arange(count)
        ends = [count * ((1 << level) - 1) for level in range(trees.depth + 1)]
        self._levels = [(columns[begin:end], thresholds[begin:end]) for begin, end in pairwise(ends)]

    def one(self, row: Rows) -> list[float]:
        """row: shape (features,). As many as there are outputs."""
        known, places = _twice(row), self._roots
        for columns, thresholds in self._levels:
            right = known.take(columns.take(places)) >= thresholds.take(places)
            places = places + places + right
        sums: list[float] = self._leaves.take(places).reshape(self.trees.outputs, -1).sum(axis=1).tolist()
        return sums

    def many(self, rows: Rows) -> NDArray[np.float64]:
        """rows: shape (n, features). Shape (n, outputs)."""
        sums = np.empty((len(rows), self.trees.outputs))
        for begin in range(0, len(rows), CHUNK):
            known = _twice(rows[begin : begin + CHUNK])
            places = np.broadcast_to(self._roots, (len(known), len(self._roots)))
            for columns, thresholds in self._levels:
                right = np.take_along_axis(known, columns[places], axis=1) >= thresholds[places]
                places = places + places + right
            leaves = self._leaves[places].reshape(len(known), self.trees.outputs, -1)
            sums[begin : begin + CHUNK] = leaves.sum(axis=2)
        return sums


def grown(trees: list[tuple[int, dict[str, list[float]]]], outputs: int, depth: int, features: int) -> Trees:
    """trees: the output of each, and the tree as XGBoost's JSON has it: `left_children`, `right_children` (-1: none),
    `split_indices`, `split_conditions` (a leaf's value, at leaves) and `default_left`. Source: XGBoost's model schema."""
    ordered = [tree for output in range(outputs) for of, tree in trees if of == output]
    columns = [np.zeros((len(ordered), 1 << level), "<i4") for level in range(depth)]
    thresholds = [np.full((len(ordered), 1 << level), math.inf, "<f4") for level in range(depth)]
    leaves = np.zeros((len(ordered), 1 << depth), "<f4")
    for number, tree in enumerate(ordered):
        todo = [(0, 0, 0)]  # a node, its level, its place there
        while todo:
            node, level, place = todo.pop()
            left, right = int(tree["left_children"][node]), int(tree["right_children"][node])
            value = tree["split_conditions"][node]
            if left < 0:  # a leaf above the lowest level: whatever its unused descendants say, it is that
                span = 1 << (depth - level)
                leaves[number, place * span : (place + 1) * span] = value
                continue
            unknown_right = 0 if tree["default_left"][node] else features
            columns[level][number, place] = int(tree["split_indices"][node]) + unknown_right
            thresholds[level][number, place] = value
            todo += [(left, level + 1, 2 * place), (right, level + 1, 2 * place + 1)]
    return Trees(
        outputs,
        depth,
        b"".join(level.tobytes() for level in columns),
        b"".join(level.tobytes() for level in thresholds),
        leaves.tobytes(),
    )


def _twice(rows: Rows) -> Rows:
    """What is not a number as −∞, and then as +∞. Shape (…, 2 · features)."""
    unknown = np.isnan(rows)
    return np.concatenate((np.where(unknown, -np.inf, rows), np.where(unknown, np.inf, rows)), axis=-1)
