"""Which agent a sub-agent counts as: at any depth, without circles, and within a bound that tenants share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol import agents as module
from gateway.flowcontrol.agents import Roots


def fold(roots: Roots, name: str, parent: str | None = None, tenant: str = "t") -> str:
    """A request arrives."""
    root = roots.root_of(tenant, name, parent)
    roots.remember(tenant, name, root)
    return root


def test_sub_agents_of_any_depth_are_their_root() -> None:
    roots = Roots()
    assert fold(roots, "root") == "root"
    assert fold(roots, "child", "root") == "root"
    assert fold(roots, "grandchild", "child") == "root"
    assert fold(roots, "grandchild") == "root", "also when it does not name its parent again"
    assert fold(roots, "child", tenant="other") == "child", "of another tenant"


def test_a_request_that_is_refused_leaves_nothing_behind() -> None:
    roots = Roots()
    assert roots.root_of("t", "child", "root") == "root"
    assert roots.root_of("t", "child", None) == "child"


def test_a_parent_that_turns_out_to_have_one_itself() -> None:
    roots = Roots()
    assert fold(roots, "c", "b") == "b"
    assert fold(roots, "b", "a") == "a"
    assert fold(roots, "c") == "a"


def test_circles_are_cut() -> None:
    roots = Roots()
    assert fold(roots, "a", "a") == "a"
    assert fold(roots, "a", "b") == "b"
    assert fold(roots, "b", "c") == "c"
    assert fold(roots, "c", "a") == "c"
    assert {fold(roots, name) for name in "abc"} == {"c"}


def test_agents_that_were_each_the_others_sub_agent_make_no_circle() -> None:
    """As a state store may have them, where a name was forgotten in between."""
    roots = Roots()
    roots.remember("t", "a", "b")
    roots.remember("t", "b", "a")
    assert fold(roots, "a") == fold(roots, "b") == "b"


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("abcdef"), st.booleans()), max_size=40)
)
def test_every_name_has_a_root_that_is_its_own(steps: list[tuple[str, str | None, bool]]) -> None:
    roots = Roots()
    for name, parent, restored in steps:
        if restored and parent is not None:
            roots.remember("t", name, parent)
        else:
            fold(roots, name, parent)
        for each in "abcdef":
            root = roots.root_of("t", each, None)
            assert roots.root_of("t", root, None) == root


def test_a_long_chain_is_gone_through_once() -> None:
    roots = Roots()
    for number in range(20_000):  # each names the next as its parent, whose own parent comes later
        fold(roots, str(number), str(number + 1))
    for _ in range(2000):
        assert fold(roots, "0") == "20000"
    assert fold(roots, "10000") == "20000"


def test_of_sub_agents_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 2)
    roots = Roots()
    for child in ("c1", "c2"):
        fold(roots, child, "root")
    assert fold(roots, "c1") == "root"
    fold(roots, "c3", "root")
    assert [fold(roots, child) for child in ("c1", "c2", "c3")] == ["root", "c2", "root"]


def test_no_tenant_makes_another_forget_its_sub_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 4)
    roots = Roots()
    fold(roots, "child", "root", "red")
    for number in range(10):
        fold(roots, f"c{number}", "root", "blue")
    assert fold(roots, "child", tenant="red") == "root"
