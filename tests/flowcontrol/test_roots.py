"""Sub-agents count as their roots, whatever order they are named in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gateway.flowcontrol.agents
from gateway.flowcontrol.agents import MAX_ALIASES, MAX_NAMES, Roots, agent_id_of
from predictor.shares import Shares
from tests.flowcontrol.scene import Scene


def fold(roots: Roots, tenant: str, name: str, parent: str | None) -> str:
    """A request of `name`, which names this parent, has arrived."""
    root = roots.root_of(tenant, name, parent)
    roots.remember(tenant, name, root)
    return root


def test_sub_agents_of_any_depth_are_their_root() -> None:
    roots = Roots()
    assert fold(roots, "t", "root", None) == "root"
    assert fold(roots, "t", "child", "root") == "root"
    assert fold(roots, "t", "grandchild", "child") == "root"
    assert fold(roots, "t", "grandchild", None) == "root", "also when it does not name it again"
    assert fold(roots, "other", "child", None) == "child", "of another tenant"


def test_to_ask_for_a_root_remembers_nothing() -> None:
    roots = Roots()
    assert roots.root_of("t", "child", "root") == "root"
    assert roots.root_of("t", "child", None) == "child"


def test_a_parent_that_turns_out_to_have_one_itself() -> None:
    roots = Roots()
    assert fold(roots, "t", "c", "b") == "b"
    assert fold(roots, "t", "b", "a") == "a"
    assert fold(roots, "t", "c", None) == "a"


def test_circles_are_cut() -> None:
    roots = Roots()
    assert fold(roots, "t", "a", "a") == "a"
    assert fold(roots, "t", "a", "b") == "b"
    assert fold(roots, "t", "b", "c") == "c"
    assert fold(roots, "t", "c", "a") == "c"
    assert {roots.root_of("t", name, None) for name in "abc"} == {"c"}


def test_a_circle_that_two_requests_make_together_is_cut() -> None:
    """Each asks before the other is remembered; so does an agent that is put back when its store can be read again."""
    roots = Roots()
    assert (roots.root_of("t", "a", "b"), roots.root_of("t", "b", "a")) == ("b", "a")
    roots.remember("t", "a", "b")
    roots.remember("t", "b", "a")
    assert roots.root_of("t", "a", None) == roots.root_of("t", "b", None) == "b"


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("abcdef"), st.booleans()), max_size=40)
)
def test_every_name_has_a_root_that_is_its_own(steps: list[tuple[str, str | None, bool]]) -> None:
    roots = Roots()
    for name, parent, restored in steps:
        if restored and parent is not None:
            roots.remember("t", name, parent)
        else:
            fold(roots, "t", name, parent)
        for each in "abcdef":
            root = roots.root_of("t", each, None)
            assert roots.root_of("t", root, None) == root


def test_a_long_chain_is_gone_through_once() -> None:
    class Counting(Shares[str, str]):
        gets = 0

        def get(self, tenant: str, name: str) -> str | None:
            self.gets += 1
            return super().get(tenant, name)

    roots = Roots()
    roots._roots = counting = Counting(MAX_NAMES)
    for number in range(2000):  # each is named below the next, whose own parent comes later
        fold(roots, "t", str(number), str(number + 1))
    assert roots.root_of("t", "0", None) == "2000"
    counting.gets = 0
    assert roots.root_of("t", "0", None) == roots.root_of("t", "1000", None) == "2000"
    assert counting.gets == 4


def test_so_many_sub_agents_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.flowcontrol.agents, "MAX_NAMES", 2)
    roots = Roots()
    for child in ("c1", "c2"):
        fold(roots, "t", child, "root")
    assert roots.root_of("t", "c1", None) == "root"
    fold(roots, "t", "c3", "root")
    assert [roots.root_of("t", child, None) for child in ("c1", "c2", "c3")] == ["root", "c2", "root"]
    assert MAX_NAMES == 100_000


def test_no_tenant_makes_another_forget_its_sub_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.flowcontrol.agents, "MAX_NAMES", 4)
    roots = Roots()
    fold(roots, "red", "child", "root")
    for number in range(10):
        fold(roots, "blue", f"c{number}", "root")
    assert roots.root_of("red", "child", None) == "root"


# As flow control uses them


def test_a_task_of_a_sub_agent_counts_for_its_root_and_is_remembered_with_it() -> None:
    scene = Scene()
    roots = scene.flow.agents.roots
    assert roots.root_of("t", "child", "a") == "a"
    scene.serve("a", 5.0, alias="child")
    scene.serve("a", 5.0, alias="child")
    scene.serve("a", 5.0, alias="a")
    scene.serve("a", 5.0)
    agent = scene.agent()
    assert agent is not None and (agent.arrived, agent.record.aliases) == (4, ("child",))
    assert roots.root_of("t", "child", None) == "a"
    anew = scene.restarted()
    assert anew.flow.agents.roots.root_of("t", "child", None) == "a"
    anew.serve("a", 5.0, alias="other", final=True)
    assert anew.learned[0].cost == 25 and anew.seen.ended[0].record.aliases == ("child", "other")
    assert anew.flow.agents.roots.root_of("t", "child", None) == "a", "also after its end"


def test_a_refused_task_of_a_sub_agent_is_not_remembered() -> None:
    scene = Scene(max_waiting=0)
    with pytest.raises(Exception, match="queue is full"):
        scene.arrive("a", alias="child")
    assert scene.flow.agents.roots.root_of("t", "child", None) == "child" and scene.there() == set()


def test_the_names_that_are_kept_with_an_agent_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.flowcontrol.agents, "MAX_ALIASES", 3)
    scene = Scene()
    for number in range(5):
        agent = scene.serve("a", 5.0, alias=f"c{number}")
    assert agent.record.aliases == ("c0", "c1", "c2")
    assert scene.flow.agents.roots.root_of("t", "c4", None) == "a", "beyond them, by this process alone"
    assert MAX_ALIASES == 256


def test_a_name_counts_together_with_its_tenant() -> None:
    assert agent_id_of("red", "a/b") == "red/a/b"
