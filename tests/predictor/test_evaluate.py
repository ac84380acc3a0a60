"""Measures of predictions, against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.evaluate import NO_CLASS, quality


def test_errors_order_and_coverage_by_hand() -> None:
    costs = np.array([100.0, 200.0, 400.0, 1000.0])
    said = np.array([110.0, 100.0, 400.0, 500.0])
    p90 = np.array([120.0, 190.0, 400.0, 2000.0])
    found = quality(costs, said, p90, ["a", "a", "b", None])
    assert found.agents == 4
    assert found.median_error == pytest.approx((0.1 + 0.5) / 2)
    assert found.mean_error == pytest.approx((0.1 + 0.5 + 0 + 0.5) / 4)
    assert found.tau == pytest.approx((5 - 1) / 6), "one pair of six stands in the wrong order"
    assert found.coverage == 0.75
    assert found.tau_within == found.classes["a"].tau == -1, "classes of one agent have no order"
    assert (found.classes["b"].tau, found.classes["b"].coverage) == (None, 1)
    assert found.classes[NO_CLASS].agents == 1


def test_without_p90_there_is_no_coverage() -> None:
    found = quality(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert found.coverage is None and found.classes[NO_CLASS].coverage is None


@pytest.mark.parametrize(
    ("costs", "said", "reason"),
    [
        ([], [], "0 costs"),
        ([1.0, 2.0], [1.0], "2 costs, 1 predictions"),
        ([1.0], [float("nan")], "finite"),
        ([0.0], [1.0], "above 0"),
    ],
)
def test_what_cannot_be_judged(costs: list[float], said: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        quality(np.array(costs), np.array(said))


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(0, 1e12), st.sampled_from("abc")), min_size=1, max_size=30))
def test_overall_is_what_the_classes_make(agents: list[tuple[float, float, str]]) -> None:
    costs, said = (np.array(part) for part in list(zip(*agents, strict=True))[:2])
    found = quality(costs, said, said, [name for _, _, name in agents])
    assert sum(one.agents for one in found.classes.values()) == found.agents == len(agents)
    weighted = sum(one.agents * one.mean_error for one in found.classes.values()) / found.agents
    assert found.mean_error == pytest.approx(weighted)
    assert found.tau is None or -1 <= found.tau <= 1
