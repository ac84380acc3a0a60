"""One bound for all tenants: each gets its share, and there is always room for the next one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.concurrency import ConcurrencyLimit


class Tenant(NamedTuple):
    name: str
    weight: float = 1.0


def fill(limit: ConcurrencyLimit, *tenants: Tenant) -> list[int]:
    """Each takes one unit in its turn, until none can take another. Returns what each then holds."""
    while sum(limit.take(tenant) for tenant in tenants):
        pass
    return [limit.held_by(tenant.name) for tenant in tenants]


def settle(limit: ConcurrencyLimit, *tenants: Tenant) -> list[int]:
    """As `fill`, while what they hold ends and begins anew. Returns what each holds in the end."""
    held = fill(limit, *tenants)
    for _ in range(limit.limit):
        for tenant in tenants:
            if limit.held_by(tenant.name):
                limit.give_back(tenant.name)
        held = fill(limit, *tenants)
    return held


@pytest.mark.parametrize(
    ("limit", "weights", "held"),
    [
        pytest.param(256, [1], [128], id="one leaves half for the next"),
        pytest.param(256, [0.1], [128], id="weights are relative"),
        pytest.param(300, [1, 1], [100, 100], id="two leave a third"),
        pytest.param(500, [1, 1, 1, 1], [100] * 4, id="four leave a fifth"),
        pytest.param(500, [3, 1], [300, 100], id="by weight"),
        pytest.param(500, [0.03, 0.01], [300, 100], id="by small weights"),
        pytest.param(3, [1, 1], [1, 1], id="one each"),
        pytest.param(2, [1, 1], [1, 0], id="a limit below the number of tenants"),
        pytest.param(0, [1], [0], id="nothing to share"),
    ],
)
def test_tenants_that_all_want_more(limit: int, weights: list[float], held: list[int]) -> None:
    tenants = [Tenant(str(number), weight) for number, weight in enumerate(weights)]
    assert settle(ConcurrencyLimit(limit), *tenants) == held


def test_the_only_tenant_may_use_all() -> None:
    only = True
    limit = ConcurrencyLimit(256, lambda: not only)
    assert fill(limit, Tenant("a")) == [256]
    only = False
    assert not limit.take(Tenant("b"))
    limit.give_back("a", 56)
    assert fill(limit, Tenant("a"), Tenant("b")) == [200, 28]


def test_tenants_that_come_one_after_the_other() -> None:
    """As the module's docstring says."""
    limit = ConcurrencyLimit(256)
    assert [fill(limit, Tenant(name))[0] for name in "abcdefgh"] == [128, 64, 32, 16, 8, 4, 2, 1]
    assert not limit.take(Tenant("i"))


@pytest.mark.parametrize(("first", "then", "held"), [(1, 100, [128, 126]), (100, 1, [128, 64])])
def test_a_heavier_or_lighter_tenant_comes(first: float, then: float, held: list[int]) -> None:
    limit = ConcurrencyLimit(256)
    assert [*fill(limit, Tenant("a", first)), *fill(limit, Tenant("b", then))] == held


def test_large_pieces() -> None:
    limit = ConcurrencyLimit(100)
    red, blue = Tenant("red"), Tenant("blue")
    assert not limit.take(red, 51)
    assert limit.take(red, 50)
    assert not limit.take(red, 1)
    assert not limit.take(blue, 26)
    assert limit.take(blue, 25)
    limit.give_back("red", 50)
    assert limit.take(blue, 25)
    assert (limit.held, limit.held_by("red"), limit.held_by("blue")) == (50, 0, 50)


def test_a_smaller_limit_takes_nothing_back() -> None:
    limit = ConcurrencyLimit(100)
    assert limit.take(Tenant("red"), 50)
    limit.limit = 40
    assert limit.held == 50
    assert not limit.take(Tenant("blue"))
    assert limit.take(Tenant("red"), 0)


@pytest.mark.parametrize("size", [-1, 2])
def test_an_illegal_call_changes_nothing(size: int) -> None:
    limit = ConcurrencyLimit(10)
    assert limit.take(Tenant("red"))
    with pytest.raises(ValueError, match="give back"):
        limit.give_back("red", size)
    with pytest.raises(ValueError, match="cannot be taken"):
        limit.take(Tenant("red"), -1)
    assert (limit.held, limit.held_by("red")) == (1, 1)


_STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60), st.booleans()))


@given(_STEPS, st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=5, max_size=5))
def test_what_is_held_stays_within_the_limit_and_each_take_within_the_tenants_share(
    steps: list[tuple[int, int, bool]], weights: list[float]
) -> None:
    limit = ConcurrencyLimit(200)
    held = [0] * 5
    for number, size, gives in steps:
        tenant = Tenant(str(number), weights[number])
        if gives:
            size = min(size, held[number])
            limit.give_back(tenant.name, size)
            held[number] -= size
        else:
            after = [have + size * (place == number) for place, have in enumerate(held)]
            lightest = min(weights[place] for place in range(5) if held[place] or place == number)
            fits = after[number] * lightest <= (200 - sum(after)) * tenant.weight and sum(after) <= 200
            assert limit.take(tenant, size) == (fits or size == 0)
            held = after if fits else held
        assert limit.held == sum(held) <= 200
        assert [limit.held_by(str(place)) for place in range(5)] == held
