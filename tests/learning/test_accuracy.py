from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.learning.accuracy import Accuracy, kind

costs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=30)


def judged(*pairs: tuple[float, float], source: str = "ladder") -> Accuracy:
    accuracy = Accuracy()
    for predicted, observed in pairs:
        accuracy.judge(source, predicted, 2 * predicted, observed)
    return accuracy


def test_nothing_is_known_of_nobody() -> None:
    empty = Accuracy()
    assert all(math.isnan(value) for value in (empty.order(), empty.share_below_p90(), empty.error()[1]))
    assert math.isnan(judged((3, 1), (3, 2)).order()), "who predicts the same of all has ordered none"


def test_the_right_order_is_one_and_the_wrong_one_minus_one() -> None:
    assert judged((1, 10), (2, 20), (3, 30)).order() == pytest.approx(1)
    assert judged((3, 10), (2, 20), (1, 30)).order() == pytest.approx(-1)


@given(costs)
def test_the_order_is_kendalls(pairs: list[tuple[int, int]]) -> None:
    def compare(a: float, b: float) -> int:
        return (a > b) - (a < b)

    signs = [(compare(a[0], b[0]), compare(a[1], b[1])) for a, b in combinations(pairs, 2)]
    ties = math.sqrt(sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs))
    expected = sum(x * y for x, y in signs) / ties if ties else math.nan
    assert judged(*pairs).order() == pytest.approx(expected, nan_ok=True)


def test_errors_are_told_by_source() -> None:
    accuracy = judged((10, 10), (10, 20), (10, 40))
    assert accuracy.error() == (3, 0.5)
    assert accuracy.error("000001") == (0, pytest.approx(math.nan, nan_ok=True))
    accuracy.judge("000001", 10, 10, 5)
    assert accuracy.error("000001") == (1, 1.0)


def test_the_share_below_the_ninth_decile_and_only_the_last_count() -> None:
    accuracy = Accuracy(window=4)
    for observed in (500, 5, 10, 11, 5):
        accuracy.judge("ladder", 5, 10, observed)
    assert accuracy.share_below_p90() == 0.75


@pytest.mark.parametrize(("predicted", "observed"), [(0, 5), (5, 0), (math.nan, 5), (5, math.inf), (math.inf, 5)])
def test_what_cannot_be_compared_is_left_out(predicted: float, observed: float) -> None:
    accuracy = Accuracy()
    assert accuracy.judge("ladder", predicted, predicted, observed) is None
    assert accuracy.error()[0] == 0


def test_kinds_are_few() -> None:
    assert [kind(source) for source in ("ladder", "none", "000001", "000002")] == ["ladder", "none", "model", "model"]
