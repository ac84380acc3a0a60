"""Which tasks are displaced, from numbers alone. `test_scheduler` has the same choice on vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.hints import Hints
from engine.scheduler.displacement import DISPLACED_AT_MOST, DISPLACED_SHARE, Room, Running, choose_victims

BLOCK = 10  # tokens
URGENT = Hints(5, "urgent", 99)
# Two slots, both taken; a block is free.
FULL = Room(
    free_slots=0,
    free_blocks=1,
    block_size=BLOCK,
    groups=1,
    step_tokens=1000,
    computed_tokens=10_000,
    displaced_tokens=0,
)


def task(
    name: str, tag: int, computed: int = 35, *, agent: str | None = None, ahead: int = 1, by: tuple[str, ...] = ()
) -> Running:
    blocks = -(-computed // BLOCK)
    return Running(name, Hints(tag, agent or name, 0), computed, ahead, blocks, by)


def chosen(
    running: Sequence[Running],
    room: Room = FULL,
    *,
    tokens: int = BLOCK,
    margin: float = 0,
    own: dict[str, int] | None = None,
) -> list[str]:
    """`running`: the next victim first. Unless told otherwise by `own`, tasks share no blocks."""
    blocks = {each.request_id: room.groups * each.blocks for each in running} | (own or {})
    return [each.request_id for each in choose_victims(URGENT, tokens, running, room, margin, blocks.__getitem__)]


# Slots


def test_the_next_victim_gives_its_slot() -> None:
    assert chosen([task("last", 50), task("first", 40)]) == ["last"]


def test_with_a_slot_and_blocks_free_no_task_is_displaced() -> None:
    assert chosen([task("last", 50)], FULL._replace(free_slots=1)) == []


@pytest.mark.parametrize("missing", [1, 2])
def test_as_many_give_way_as_slots_are_missing(missing: int) -> None:
    running = [task("c", 52), task("b", 51), task("a", 50)]
    assert chosen(running, FULL._replace(free_slots=1 - missing)) == ["c", "b"][:missing]


# Blocks


@pytest.mark.parametrize(
    ("tokens", "free_blocks", "victims"),
    [
        (30, 3, []),  # three blocks are wanted
        (31, 3, ["b"]),
        (30, 2, ["b"]),
        (30, -1, ["b"]),  # b has four
        (30, -2, ["b", "a"]),
        (30, -5, ["b", "a"]),
        (30, -6, []),  # not even both would be enough
    ],
)
def test_blocks_as_they_are_missing(tokens: int, free_blocks: int, victims: list[str]) -> None:
    room = FULL._replace(free_slots=1, free_blocks=free_blocks)
    assert chosen([task("b", 51), task("a", 50)], room, tokens=tokens) == victims


def test_blocks_that_others_hold_too_are_no_gain() -> None:
    room = FULL._replace(free_slots=1, free_blocks=0)
    running = [task("b", 51), task("a", 50)]
    assert chosen(running, room, own={"b": 1}) == ["b"]
    assert chosen(running, room, own={"b": 0}) == ["b", "a"]
    assert chosen(running, room, own={"b": 0, "a": 0}) == []


def test_what_the_others_take_in_the_same_step_is_not_free() -> None:
    """At a full block the task that stays takes the only free one. The victim's own next block is gained."""
    room = FULL._replace(free_slots=1, free_blocks=1)
    assert chosen([task("b", 51), task("a", 50)], room) == []
    assert chosen([task("b", 51), task("a", 50, 40)], room) == ["b"]
    assert chosen([task("b", 51, 40), task("a", 50)], room, own={"b": 0}) == ["b"]


def test_every_group_has_blocks_of_its_own() -> None:
    room = FULL._replace(free_slots=1, free_blocks=2)
    assert chosen([task("b", 51)], room, tokens=2 * BLOCK) == []
    assert chosen([task("b", 51)], room._replace(groups=2), tokens=2 * BLOCK) == ["b"]


# Tags


@pytest.mark.parametrize(("margin", "victims"), [(0, ["last"]), (44, ["last"]), (45, []), (1000, [])])
def test_tags_must_differ_by_more_than_the_margin(margin: float, victims: list[str]) -> None:
    assert chosen([task("last", 50)], margin=margin) == victims


def test_a_task_that_is_as_urgent_ends_the_search() -> None:
    room = FULL._replace(free_slots=-1)
    assert chosen([task("b", 50), task("a", 6)], room) == ["b", "a"]
    assert chosen([task("b", 50), task("a", 5)], room) == [], "b alone would not be enough"


# Guards


@pytest.mark.parametrize(
    "guarded",
    [
        task("guarded", 60, agent="urgent"),
        task("guarded", 60, by=("urgent",)),
        task("guarded", 60, by=tuple("xy"[:DISPLACED_AT_MOST])),
    ],
)
def test_a_guarded_task_is_passed_over(guarded: Running) -> None:
    assert chosen([guarded, task("other", 50)]) == ["other"]
    assert chosen([guarded]) == []


def test_a_task_may_be_displaced_again_by_another_agent() -> None:
    assert chosen([task("last", 50, by=("other",))]) == ["last"]


def test_what_is_lost_stays_below_its_share() -> None:
    allowed = int(DISPLACED_SHARE * FULL.computed_tokens)
    assert chosen([task("large", 50, allowed)]) == ["large"]
    assert chosen([task("large", 50, allowed + 1)]) == []
    assert chosen([task("large", 50, allowed)], FULL._replace(displaced_tokens=1)) == []
    assert chosen([task("large", 51, allowed + 1), task("small", 50, 1)]) == ["small"]
    two = [task("b", 51, allowed - 10), task("a", 50, 11)]
    assert chosen(two, FULL._replace(free_slots=-1)) == [], "together they are too much"


# The step's tokens


def test_where_the_step_has_no_tokens_left_no_task_is_displaced() -> None:
    room = FULL._replace(free_blocks=200)
    assert chosen([task("b", 51, ahead=600), task("a", 50, ahead=399)], room) == ["b"]
    assert chosen([task("b", 51, ahead=600), task("a", 50, ahead=400)], room) == []
