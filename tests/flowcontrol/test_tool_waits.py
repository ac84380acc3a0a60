"""For how long the KV of an agent that waits for its tool is kept, and reserved."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.tool_waits import CLASSES, LONGEST, MARGIN, UNKNOWN, WAITS, ToolWaits


def seen(*waits: float, ended: int = 0) -> ToolWaits:
    one = ToolWaits()
    for wait in waits:
        one.came_back("t", "coding", wait)
    for _ in range(ended):
        one.ended("t", "coding")
    return one


def test_of_a_class_that_nobody_knows_everything_is_kept_for_a_while_and_nothing_reserved() -> None:
    assert ToolWaits().worth_keeping("t", "coding") == UNKNOWN
    assert ToolWaits().worth_reserving("t", "coding", 1e9) == 0


def test_kept_until_nine_in_ten_are_back() -> None:
    waits = seen(*(10.0 * i for i in range(1, 11)))
    assert waits.worth_keeping("t", "coding") == 101
    assert seen(1e9).worth_keeping("t", "coding") == LONGEST


def test_nothing_is_kept_where_most_do_not_come_back() -> None:
    assert seen(5.0, 5.0, ended=2).worth_keeping("t", "coding") > 0
    assert seen(5.0, 5.0, ended=3).worth_keeping("t", "coding") == 0


def test_a_reservation_is_worth_a_refill_or_nothing() -> None:
    """All wait for 100 iterations: it pays if a refill takes more than that, with a margin."""
    waits = seen(*[100.0] * 10)
    assert waits.worth_reserving("t", "coding", MARGIN * 101) == 100
    assert waits.worth_reserving("t", "coding", MARGIN * 99) == 0
    assert waits.worth_reserving("t", "coding", 0.0) == 0


def test_those_who_are_soon_back_are_waited_for_and_the_others_given_up() -> None:
    waits = seen(*[10.0] * 8, *[5000.0] * 2)
    assert waits.worth_reserving("t", "coding", MARGIN * 100) == 10
    assert waits.worth_reserving("t", "coding", MARGIN * 1e6) == 5000


def test_who_does_not_come_back_makes_a_reservation_dear() -> None:
    assert seen(*[100.0] * 10, ended=10).worth_reserving("t", "coding", MARGIN * 150) == 0
    assert seen(*[100.0] * 10).worth_reserving("t", "coding", MARGIN * 150) == 100


@given(
    st.lists(st.floats(1.0, 1e4), min_size=1, max_size=30),
    st.integers(0, 10),
    st.lists(st.floats(0.0, 1e7), min_size=2, max_size=5).map(sorted),
)
def test_it_is_the_best_of_all_waits_and_grows_with_the_refill(
    waits: list[float], ended: int, refills: list[float]
) -> None:
    one = seen(*waits, ended=ended)
    back = len(waits) / (len(waits) + ended)

    def gain(refill: float, until: float) -> float:
        saved = refill / MARGIN * sum(wait <= until for wait in waits) / len(waits)
        held = sum(min(wait, until) for wait in waits) / len(waits)
        return back * (saved - held) - (1 - back) * until

    chosen = [one.worth_reserving("t", "coding", refill) for refill in refills]
    for refill, until in zip(refills, chosen, strict=True):
        best = max([0.0, *(gain(refill, wait) for wait in waits)])
        assert gain(refill, until) if until else pytest.approx(best, rel=1e-6, abs=1e-3) == 0.0
    assert all(before <= after + 1e-9 for before, after in pairwise(chosen))


def test_what_is_remembered_is_bounded() -> None:
    one = ToolWaits()
    for number in range(CLASSES + 5):
        one.ended("t", f"class-{number}")
    assert one.worth_keeping("t", "class-0") == UNKNOWN
    assert one.worth_keeping("t", f"class-{CLASSES}") == 0
    for _ in range(WAITS):
        one.came_back("t", "class-9", 1.0)
    assert one.worth_keeping("t", "class-9") == 2


def test_no_tenant_moves_or_erases_what_is_known_of_anothers_classes() -> None:
    one = ToolWaits()
    for _ in range(10):
        one.came_back("red", "coding", 100.0)
    for number in range(CLASSES):
        one.ended("blue", "coding")
        one.ended("blue", f"class-{number}")
    assert one.worth_keeping("red", "coding") == 101
    assert one.worth_keeping("blue", "coding") == 0
