"""Errors and order of predictions, against what can be counted by hand and against SciPy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.accuracy import errors, order

few = st.integers(1, 6)
many = st.floats(1e-3, 1e15)
pairs = st.lists(st.tuples(few, few) | st.tuples(many, many), min_size=2, max_size=40)


def columns(agents: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([cost for cost, _ in agents], float), np.array([predicted for _, predicted in agents], float)


def test_errors_are_relative_to_the_truth() -> None:
    assert errors(np.array([10.0, 20.0]), np.array([15.0, 5.0])).tolist() == [0.5, 0.75]


def test_no_order_and_orders_of_none() -> None:
    assert order(np.array([]), np.array([])) is None
    assert order(np.array([5.0]), np.array([5.0])) is None
    assert order(np.array([5.0, 5.0]), np.array([1.0, 2.0])) is None
    assert order(np.array([5.0, 6.0]), np.array([1.0, 1.0])) == 0


def test_the_right_order_is_one_and_the_wrong_one_minus_one() -> None:
    costs = np.arange(1.0, 1001.0)
    assert order(costs, costs**2) == pytest.approx(1)
    assert order(costs, -costs) == pytest.approx(-1)


@given(pairs)
def test_the_order_is_kendalls(agents: list[tuple[float, float]]) -> None:
    def compare(a: float, b: float) -> int:
        return (a > b) - (a < b)

    signs = [(compare(a[0], b[0]), compare(a[1], b[1])) for a, b in combinations(agents, 2)]
    untied, ordered = sum(x != 0 for x, _ in signs), sum(y != 0 for _, y in signs)
    found = order(*columns(agents))
    if not untied:
        assert found is None
    else:
        assert found == pytest.approx(sum(x * y for x, y in signs) / math.sqrt(untied * max(1, ordered)))


@pytest.mark.parametrize("distinct", [3, 50, 10**9])
def test_the_order_is_scipys(distinct: int) -> None:
    stats = pytest.importorskip("scipy.stats", exc_type=ImportError)
    drawn = np.random.default_rng(distinct)
    for size in (2, 3, 17, 64, 1000, 5001):
        costs = drawn.integers(0, distinct, size).astype(float)
        predicted = costs + drawn.integers(0, distinct, size)
        if costs.min() < costs.max() and predicted.min() < predicted.max():
            assert order(costs, predicted) == pytest.approx(stats.kendalltau(costs, predicted).statistic, abs=1e-12)
