"""The terms of the bound, by hand."""

from __future__ import annotations

import pytest

from gateway.replay.bound import Bound


def test_nothing_happened() -> None:
    assert Bound().iterations() == 0
    assert Bound().terms() == {"L": 0, "R": 0, "D": 0, "E": 0, "M": 0}


def test_the_longest_stay_at_the_engine() -> None:
    bound = Bound()
    bound.released(3, 1, "a", cost=10, predicted=10)
    bound.released(5, 2, "a", cost=10, predicted=10)
    bound.ended(9, 1)
    bound.ended(10, 2)
    assert bound.terms()["L"] == 6
    assert bound.iterations() == 6, "nothing ever waited: there is no M to divide by"


def test_the_most_work_that_was_left_in_flight() -> None:
    """100, less 30, and 50 more make 120; what was released since is counted before it is worked on."""
    bound = Bound()
    bound.released(0, 1, "a", cost=100, predicted=100)
    bound.served(30, None)
    assert bound.terms()["R"] == 100
    bound.released(1, 2, "b", cost=50, predicted=50)
    bound.served(60, None)
    assert bound.terms()["R"] == 120
    bound.served(60, None)
    assert bound.terms()["R"] == 120


def test_how_far_the_engine_fell_behind_while_tasks_waited_all_along() -> None:
    """Behind by 4, 7, 2, 0, then 5; idleness pays all debts."""
    bound = Bound()
    for work in (6, 7, 15, 30):
        bound.served(work, 10)
    assert bound.terms()["D"] == 7
    bound.served(5, 10)
    bound.served(1, None)
    bound.served(5, 10)
    assert bound.terms()["D"] == 7
    assert bound.terms()["M"] == 10


def test_the_least_capacity_is_divided_by() -> None:
    bound = Bound()
    bound.released(0, 1, "a", cost=100, predicted=100)
    bound.served(20, 20)
    bound.served(40, 40)
    assert bound.terms()["M"] == 20
    assert bound.iterations() == 100 / 20


def test_how_much_more_was_in_flight_of_each_than_was_predicted() -> None:
    """a: 5 and 20 together, later 10 alone. b: 7, and what costs less than predicted does not count against it."""
    bound = Bound()
    bound.released(0, 1, "a", cost=15, predicted=10)
    bound.released(0, 2, "a", cost=30, predicted=10)
    bound.released(0, 3, "b", cost=17, predicted=10)
    bound.released(0, 4, "b", cost=10, predicted=100)
    bound.ended(1, 1)
    bound.ended(1, 2)
    bound.released(1, 5, "a", cost=20, predicted=10)
    assert bound.terms()["E"] == 25 + 7


def test_the_bound_is_the_sum_of_its_terms() -> None:
    bound = Bound()
    bound.released(0, 1, "a", cost=100, predicted=60)
    bound.served(30, 50)
    bound.served(40, 50)
    bound.ended(2, 1)
    terms = bound.terms()
    assert terms == {"L": 2, "R": 100, "D": 30, "E": 40, "M": 50}
    assert bound.iterations() == pytest.approx(2 + (100 + 30 + 40) / 50)
