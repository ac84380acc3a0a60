"""Which running tasks make room for a more urgent one that waits. A pure function on numbers; imports no vLLM.

Two agents could displace each other's tasks for ever. Hence three limits: an agent displaces a task once, a task is
displaced `DISPLACED_AT_MOST` times, and what is lost stays below `DISPLACED_SHARE` of all that the engine computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.hints import Hints

DISPLACED_AT_MOST = 2
DISPLACED_SHARE = 0.05


class Running(NamedTuple):
    """A running task, as one that may be displaced."""

    request_id: str
    hints: Hints
    computed_tokens: int  # that displacing it would lose
    ahead_tokens: int  # that it would compute in the next step, were there no limit
    blocks: int  # that it has in each group
    displaced_by: tuple[str, ...] = ()  # the agents that have displaced it


class Room(NamedTuple):
    """The engine's room at the begin of a step."""

    free_slots: int  # further tasks that may run
    free_blocks: int  # beyond those that vLLM holds back from admission; may be negative
    block_size: int  # tokens
    groups: int  # of layers: each has a block of its own for the same tokens
    step_tokens: int  # that a step computes at most
    computed_tokens: int  # by the engine since its start
    displaced_tokens: int  # of these, lost by displacing


def choose_victims(
    urgent: Hints,
    urgent_tokens: int,
    running: Sequence[Running],
    room: Room,
    margin: float,
    own_blocks: Callable[[str], int],
) -> list[Running]:
    """The tasks to displace so that the urgent one is admitted in this step; none where that is not possible or needed.

    `running` begins with the next victim. Only tasks whose tag exceeds the urgent one's by more than `margin` are
    displaced. `own_blocks` counts the blocks, over all groups, that only this request holds; it is asked about candidates
    only, as it has to look at each block.
    """
    if sum(task.ahead_tokens for task in running) >= room.step_tokens:
        return []  # nothing is admitted in this step
    # Tasks that stay are scheduled first, and take the blocks that they need.
    taken = {task.request_id: _next_blocks(task, room) for task in running}
    # As if the prefix cache had nothing of the urgent task: a look into it would count as a hit.
    wanted_blocks = room.groups * math.ceil(urgent_tokens / room.block_size) + sum(taken.values()) - room.free_blocks
    wanted_slots = 1 - room.free_slots
    victims: list[Running] = []
    lost = room.displaced_tokens
    for task in running:
        if wanted_slots <= 0 and wanted_blocks <= 0:
            return victims
        if task.hints.tag <= urgent.tag + margin:
            return []
        if spared(task, urgent) or lost + task.computed_tokens > DISPLACED_SHARE * room.computed_tokens:
            continue
        victims.append(task)
        lost += task.computed_tokens
        wanted_slots -= 1
        wanted_blocks -= taken[task.request_id] + own_blocks(task.request_id)
    return victims if wanted_slots <= 0 and wanted_blocks <= 0 else []


def spared(task: Running, urgent: Hints) -> bool:
    """Whether the urgent task's agent may not displace this one, whatever their tags."""
    return (
        task.hints.agent == urgent.agent
        or urgent.agent in task.displaced_by
        or len(task.displaced_by) >= DISPLACED_AT_MOST
    )


def _next_blocks(task: Running, room: Room) -> int:
    """Blocks that the task takes in this step if it stays."""
    computed = task.computed_tokens + min(task.ahead_tokens, room.step_tokens)
    return room.groups * max(0, math.ceil(computed / room.block_size) - task.blocks)
