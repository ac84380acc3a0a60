"""Trees in arrays say what XGBoost says of them."""

from __future__ import annotations

import json
import math

import msgspec
import numpy as np
import pytest
import xgboost
from hypothesis import given
from hypothesis import strategies as st

from predictor.trees import Forest, Trees, grown

FEATURES, OUTPUTS = 6, 2


def boosted(depth: int, rounds: int = 20) -> tuple[xgboost.Booster, Trees]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(400, FEATURES)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[:, 0] = np.round(x[:, 0], 1)  # values that are thresholds, too
    known = np.nan_to_num(x)
    y = np.stack((known[:, 0] * known[:, 1] + np.isnan(x[:, 2]), known[:, 3] - known[:, 0]), axis=1)
    booster = xgboost.train(
        {"max_depth": depth, "base_score": 0.0, "nthread": 1, "seed": 1}, xgboost.QuantileDMatrix(x, y), rounds
    )
    model = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    return booster, grown(list(zip(model["tree_info"], model["trees"], strict=True)), OUTPUTS, depth, FEATURES)


@pytest.fixture(scope="module", params=[1, 4, 6])
def both(request: pytest.FixtureRequest) -> tuple[xgboost.Booster, Forest]:
    booster, trees = boosted(request.param)
    return booster, Forest(trees, FEATURES)


values = st.floats(-3, 3, width=32) | st.just(math.nan) | st.sampled_from([-0.1, 0.0, 0.1, 1e30, -1e30])


@given(st.lists(st.lists(values, min_size=FEATURES, max_size=FEATURES), min_size=1, max_size=8))
def test_they_say_what_xgboost_says(both: tuple[xgboost.Booster, Forest], drawn: list[list[float]]) -> None:
    booster, forest = both
    rows = np.array(drawn, np.float32)
    expected = booster.inplace_predict(rows)
    many = forest.many(rows)
    np.testing.assert_allclose(many, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([forest.one(row) for row in rows], many, rtol=1e-12)


def test_more_rows_than_a_chunk() -> None:
    booster, trees = boosted(3)
    rows = np.random.default_rng(1).normal(size=(1234, FEATURES)).astype(np.float32)
    np.testing.assert_allclose(Forest(trees, FEATURES).many(rows), booster.inplace_predict(rows), rtol=1e-4, atol=1e-5)
    assert Forest(trees, FEATURES).many(rows[:0]).shape == (0, OUTPUTS)


def nan(numbers: bytes) -> bytes:
    return np.float32(math.nan).tobytes() + numbers[4:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda trees: {"columns": np.int32(2 * FEATURES).tobytes() + trees.columns[4:]}, "a feature that rows"),
        (lambda trees: {"columns": np.int32(-1).tobytes() + trees.columns[4:]}, "a feature that rows"),
        (lambda trees: {"thresholds": nan(trees.thresholds)}, "no number"),
        (lambda trees: {"leaves": nan(trees.leaves)}, "no number"),
        (lambda trees: {"leaves": trees.leaves[:-1]}, "do not match"),
        (lambda trees: {"outputs": 3}, "do not match"),
    ],
)
def test_what_cannot_be_asked_is_told(change, reason: str) -> None:  # type: ignore[no-untyped-def]
    _, trees = boosted(2, rounds=5)
    with pytest.raises(ValueError, match=reason):
        Forest(msgspec.structs.replace(trees, **change(trees)), FEATURES)
