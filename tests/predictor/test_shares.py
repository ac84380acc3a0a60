"""A memory that tenants share: bounded, and nobody's share is another's to take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from predictor.shares import Shares


def test_the_least_recently_used_goes_first() -> None:
    shares = Shares[str, int](2)
    assert shares.put("t", "a", 1) is None and shares.put("t", "b", 2) is None
    assert shares.get("t", "a") == 1
    assert shares.put("t", "c", 3) == ("t", "b")
    assert [shares.get("t", name) for name in "abc"] == [1, None, 3]
    assert shares.put("t", "a", 4) is None, "it is there already"
    assert len(shares) == 2 and sorted(shares.values()) == [3, 4]


def test_of_tenants_with_equally_much_the_least_recently_used_loses() -> None:
    shares = Shares[str, int](2)
    shares.put("t", "a", 1)
    shares.put("u", "a", 2)
    assert shares.get("t", "other") is None
    assert shares.put("v", "a", 3) == ("u", "a")
    assert shares.get("u", "a") is None


@given(st.lists(st.tuples(st.sampled_from("tuv"), st.integers(0, 12), st.booleans()), max_size=120))
def test_none_loses_its_share(steps: list[tuple[str, int, bool]]) -> None:
    most, tenants = 12, 3
    shares = Shares[int, str](most)
    held: dict[str, set[int]] = {tenant: set() for tenant in "tuv"}
    for tenant, name, asks in steps:
        if asks:
            assert (shares.get(tenant, name) is not None) == (name in held[tenant])
            continue
        held[tenant].add(name)
        gone = shares.put(tenant, name, "value")
        if gone is not None:
            loser, forgotten = gone
            assert len(held[loser]) > most // tenants, "it held more than its share"
            assert len(held[loser]) == max(map(len, held.values()))
            held[loser].remove(forgotten)
        assert len(shares) == sum(map(len, held.values())) <= most
