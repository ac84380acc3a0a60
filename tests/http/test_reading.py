"""The memory for bodies: what is held is what has come, and all of it is given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.http.reading import HeldBody
from gateway.protocol.errors import QueueFull
from tests.flowcontrol.test_concurrency import Tenant

RED, BLUE = Tenant("red"), Tenant("blue")


def test_what_comes_is_held_and_given_back_once() -> None:
    budget = ConcurrencyLimit(100)
    first, second = HeldBody(budget, RED), HeldBody(budget, RED)
    first.grow(60)
    second.grow(40)
    assert budget.held == 100
    for _ in range(2):
        first.release()
    assert budget.held == 40
    second.release()
    assert budget.held == 0


def test_above_the_limit_it_is_refused_and_nothing_has_changed() -> None:
    budget = ConcurrencyLimit(100)
    first, second = HeldBody(budget, RED), HeldBody(budget, RED)
    first.grow(60)
    second.grow(30)
    with pytest.raises(QueueFull) as refused:
        second.grow(11)
    assert refused.value.status == 429
    assert refused.value.headers()["retry-after"]
    assert (budget.held, second.size) == (90, 30)
    second.grow(10)


def test_what_is_announced_must_fit_and_is_not_held() -> None:
    budget = ConcurrencyLimit(100)
    held = HeldBody(budget, RED)
    held.expect(100)
    assert budget.held == 0
    with pytest.raises(QueueFull):
        held.expect(101)
    HeldBody(budget, RED).grow(1)
    with pytest.raises(QueueFull):
        held.expect(100)


def test_one_tenant_leaves_room_for_another() -> None:
    budget = ConcurrencyLimit(100, lambda: RED.weight + BLUE.weight)
    red, blue = HeldBody(budget, RED), HeldBody(budget, BLUE)
    red.grow(75)
    with pytest.raises(QueueFull, match="tenant red holds 75, all tenants together 75, of at most 100"):
        red.grow(1)
    with pytest.raises(QueueFull):
        HeldBody(budget, RED).expect(1)
    blue.grow(25)
    red.grow(0)  # the end of a body that is complete
    red.release()
    assert (budget.held, budget.held_by("blue")) == (25, 25)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60), st.booleans())))
def test_never_more_than_the_limit_and_never_less_than_nothing(steps: list[tuple[int, int, bool]]) -> None:
    budget = ConcurrencyLimit(100)
    bodies = [HeldBody(budget, RED) for _ in range(5)]
    for number, size, release in steps:
        if release:
            bodies[number].release()
        else:
            try:
                bodies[number].grow(size)
            except QueueFull:
                assert budget.held + size > 100
        assert 0 <= budget.held == sum(body.size for body in bodies) <= 100
    for body in bodies:
        body.release()
    assert budget.held == 0
