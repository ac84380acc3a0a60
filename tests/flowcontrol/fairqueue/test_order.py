"""The order against a dictionary that is searched."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.flowcontrol.fairqueue.order import Order, Place

keys = st.integers(0, 9)
changes = st.lists(
    st.tuples(keys, st.none() | st.tuples(st.integers(0, 5).map(float), keys)),  # a place, or removed
    max_size=200,
)


@given(changes)
def test_agrees_with_a_dictionary(changes: list[tuple[int, Place | None]]) -> None:
    order: Order[int] = Order()
    model: dict[int, Place] = {}
    for key, place in changes:
        if place is None:
            order.remove(key)
            model.pop(key, None)
        else:
            order.put(key, place)
            model[key] = place
        assert len(order) == len(model)
        assert order.first() == min(model, key=lambda key: (model[key], key), default=None)
        assert [order.place(key) for key in order] == sorted(model.values())
        assert all((key in order) == (key in model) for key in range(10))


@given(changes)
@example([(key, (float(turn), 0)) for turn in range(20) for key in range(4)] + [(0, None), (1, (19.0, 0))])
def test_stale_entries_are_bounded_even_if_nobody_asks_for_the_first(changes: list[tuple[int, Place | None]]) -> None:
    order: Order[int] = Order()
    for turn in range(10):
        for key, place in changes:
            if place is None:
                order.remove(key)
            else:
                order.put(key, (place[0] + turn, place[1]))
            assert len(order._heap) <= 64 + 4 * len(order)


def test_a_key_comes_back_to_the_place_that_it_left() -> None:
    order: Order[str] = Order()
    order.put("a", (1.0, 0))
    order.put("b", (2.0, 0))
    order.remove("a")
    assert order.first() == "b"
    order.put("a", (1.0, 0))
    assert order.first() == "a"


def test_no_place_for_a_key_that_is_not_there() -> None:
    order: Order[str] = Order()
    assert order.first() is None
    order.remove("a")
    with pytest.raises(KeyError):
        order.place("a")
