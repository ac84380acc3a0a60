"""One bound for all tenants: half is kept for each by weight, half is for the first, and no flood takes another's share."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.flowcontrol.concurrency import ConcurrencyLimit, Part, fits


class Tenant(NamedTuple):
    name: str
    weight: float = 1.0


def shared(limit: int, *tenants: Tenant) -> ConcurrencyLimit:
    """A bound of these tenants, and of no others."""
    return ConcurrencyLimit(limit, lambda: sum(tenant.weight for tenant in tenants))


def fill(limit: ConcurrencyLimit, *tenants: Tenant) -> list[int]:
    """Each takes one unit in its turn, until none can take another. Returns what each then holds."""
    while sum(limit.take(tenant) for tenant in tenants):
        pass
    return [limit.held_by(tenant.name) for tenant in tenants]


def flood(limit: ConcurrencyLimit, *tenants: Tenant) -> list[int]:
    """Each takes what it can, one after the other. Returns what each then holds."""
    return [fill(limit, tenant)[0] for tenant in tenants]


@pytest.mark.parametrize(
    ("limit", "weights", "first"),
    [
        pytest.param(256, [1], 256, id="a sole tenant may use all"),
        pytest.param(256, [0.1], 256, id="of any weight"),
        pytest.param(400, [1, 1], 300, id="half and a quarter, of two"),
        pytest.param(300, [1, 1, 1], 200, id="half and a sixth, of three"),
        pytest.param(400, [3, 1], 350, id="half, and its share of the other"),
        pytest.param(400, [1, 3], 250, id="also of the lighter one"),
        pytest.param(400, [0.01, 0.03], 250, id="by small weights"),
        pytest.param(0, [1], 0, id="nothing to share"),
    ],
)
def test_what_the_first_may_hold_and_what_is_left_for_the_others(limit: int, weights: list[float], first: int) -> None:
    """As the module's docstring says."""
    tenants = [Tenant(str(number), weight) for number, weight in enumerate(weights)]
    bound = shared(limit, *tenants)
    held = flood(bound, *tenants)
    kept = [limit / 2 * weight / sum(weights) for weight in weights]
    assert held == [first, *kept[1:]]
    assert bound.held == limit


def test_tenants_that_take_turns_share_the_other_half_alike() -> None:
    red, blue = Tenant("red"), Tenant("blue")
    assert fill(shared(400, red, blue), red, blue) == [200, 200]


def test_who_comes_after_any_flood_has_its_share() -> None:
    tenants = [Tenant(name) for name in "abcdefgh"]
    bound = shared(256, *tenants)
    assert flood(bound, *tenants) == [144, *[16] * 7]


def test_what_is_given_back_is_for_the_first_that_asks() -> None:
    red, blue = Tenant("red"), Tenant("blue")
    bound = shared(400, red, blue)
    assert flood(bound, red, blue) == [300, 100]
    bound.give_back("red", 50)
    assert flood(bound, blue, red) == [150, 250]


def test_each_of_more_tenants_than_units_has_room_for_one() -> None:
    """The flaw that the docstring names, and its bound."""
    tenants = [Tenant(str(number)) for number in range(10)]
    bound = shared(4, *tenants)
    assert fill(bound, tenants[0]) == [2]
    held = fill(bound, *tenants)
    assert all(held)
    assert bound.held <= 4 + len(tenants)


def test_large_pieces() -> None:
    red, blue = Tenant("red"), Tenant("blue")
    bound = shared(100, red, blue)
    assert not bound.take(red, 76)
    assert bound.take(red, 75)
    assert not bound.take(red, 1)
    assert not bound.take(blue, 26)
    assert bound.take(blue, 25)
    bound.give_back("red", 75)
    assert bound.take(blue, 50)
    assert (bound.held, bound.held_by("red"), bound.held_by("blue")) == (75, 0, 75)


def test_a_tenant_comes_and_another_has_all() -> None:
    """What was held before the new one was known stays held; its share is free as soon as so much has ended."""
    red, blue = Tenant("red"), Tenant("blue")
    known = [red]
    bound = ConcurrencyLimit(256, lambda: sum(tenant.weight for tenant in known))
    assert fill(bound, red) == [256]
    known.append(blue)
    assert not bound.take(red)
    assert fill(bound, blue) == [64], "its share, whatever the other holds"
    bound.give_back("red", 64)
    assert (bound.held, bound.take(red), bound.take(blue)) == (256, False, False)


def test_a_smaller_limit_takes_nothing_back() -> None:
    red, blue = Tenant("red"), Tenant("blue")
    bound = shared(100, red, blue)
    assert bound.take(red, 75)
    bound.limit = 40
    assert bound.held == 75
    assert not bound.take(red)
    assert bound.take(red, 0)
    assert fill(bound, blue) == [10]


@pytest.mark.parametrize("size", [-1, 2])
def test_an_illegal_call_changes_nothing(size: int) -> None:
    limit = ConcurrencyLimit(10)
    assert limit.take(Tenant("red"))
    with pytest.raises(ValueError, match="give back"):
        limit.give_back("red", size)
    with pytest.raises(ValueError, match="cannot be taken"):
        limit.take(Tenant("red"), -1)
    assert (limit.held, limit.held_by("red")) == (1, 1)


TENANTS = 5
STEPS = st.lists(st.tuples(st.integers(0, TENANTS - 1), st.integers(0, 120), st.booleans()), max_size=60)
WEIGHTS = st.lists(st.sampled_from([0.1, 0.7, 1.0, 3.0]), min_size=TENANTS, max_size=TENANTS)


def has_room(limit: int, weights: list[float], held: list[int], number: int, size: int) -> bool:
    """What all hold beyond their shares, with this, fits into the half that is for the first. In fractions."""
    after = [have + size * (place == number) for place, have in enumerate(held)]
    shares = [Fraction(limit) / 2 * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    beyond = sum(max(Fraction(0), have - share) for have, share in zip(after, shares, strict=True))
    return after[number] <= max(1, shares[number]) or beyond <= Fraction(limit) / 2


@given(st.integers(300, 400), WEIGHTS, STEPS)
def test_the_bound_is_never_exceeded_and_a_tenant_below_its_share_always_has_room(
    limit: int, weights: list[float], steps: list[tuple[int, int, bool]]
) -> None:
    tenants = [Tenant(str(number), weight) for number, weight in enumerate(weights)]
    bound = shared(limit, *tenants)
    held = [0] * TENANTS
    for number, size, gives in steps:
        tenant = tenants[number]
        if gives:
            size = min(size, held[number])
            bound.give_back(tenant.name, size)
            held[number] -= size
        else:
            took = bound.take(tenant, size)
            assert took == (size == 0 or has_room(limit, weights, held, number, size))
            held[number] += size * took
        assert bound.held == sum(held) <= limit
        assert [bound.held_by(tenant.name) for tenant in tenants] == held
        for other, have in zip(tenants, held, strict=True):
            share = floor(Fraction(limit) / 2 * Fraction(other.weight) / sum(map(Fraction, weights)))
            assert have >= share or bound.has_room(other, share - have)


@example(3, 0.7, [])  # 3 / 2 / 0.7 * 0.7 is less than 1.5
@given(st.integers(0, 3000), st.sampled_from([0.1, 0.7, 1.0, 3.0]) | st.floats(0.01, 100), STEPS)
def test_a_sole_tenant_may_use_all(limit: int, weight: float, steps: list[tuple[int, int, bool]]) -> None:
    only = Tenant("only", weight)
    bound = shared(limit, only)
    for _, size, gives in steps:
        before = bound.held
        if gives:
            bound.give_back("only", min(size, before))
        else:
            assert bound.take(only, size) == (size == 0 or before + size <= limit)
    assert bound.take(only, limit - bound.held)
    assert bound.held == limit


@given(st.integers(1, 400), WEIGHTS, st.lists(st.integers(0, 80), min_size=TENANTS, max_size=TENANTS))
def test_who_has_no_room_for_some_has_none_for_more(limit: int, weights: list[float], held: list[int]) -> None:
    mine, *others = (Part(*part) for part in zip(held, weights, strict=True))
    rooms = [fits(limit, size, mine, others, sum(weights)) for size in range(1, limit + 2)]
    assert all(before >= after for before, after in pairwise(rooms))
    assert not rooms[-1]
