"""Live agents in a store: a blob for where each stands, one for each of its tasks, and what becomes of both when it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from gateway.state.batch import Tasks, sample_of
from gateway.state.types import AgentState
from predictor.types import FinishedTask

logger = logging.getLogger(__name__)

packed = msgspec.msgpack.Encoder().encode
_agent = msgspec.msgpack.Decoder(AgentState).decode
_task = msgspec.msgpack.Decoder(FinishedTask).decode


class Ending(NamedTuple):
    """Of an agent that was given up. refused: it has gone on elsewhere, and lives. sample: what is kept of it, packed. in_part:
    something would be, but is not all there."""

    refused: bool
    sample: bytes | None = None
    in_part: bool = False


def ending(agent: AgentState, living: AgentState | None, tasks: Mapping[int, FinishedTask]) -> Ending:
    """living, tasks: of it, as the store has them."""
    if living is not None and living.last_end_at > agent.last_end_at:
        return Ending(refused=True)
    sample = sample_of(agent, tasks)
    # Of one of which nothing is there, another gateway has said the same before.
    is_known = living is not None or bool(tasks)
    return Ending(False, sample, sample is None and agent.whole and agent.answered > 0 and is_known)


def unpack_agent(blob: bytes) -> AgentState | None:
    """None for what cannot be read."""
    try:
        return _agent(blob)
    except (msgspec.DecodeError, RecursionError, TypeError) as error:
        logger.warning("a live agent of the state store cannot be read and is passed over: %s", error)
        return None


def unpack_tasks(blobs: Iterable[tuple[int, bytes]]) -> tuple[Tasks, int]:
    """By their places; and how many could not be read."""
    tasks: Tasks = {}
    unreadable = 0
    for place, blob in blobs:
        try:
            tasks[place] = _task(blob)
        except (msgspec.DecodeError, RecursionError, TypeError):
            unreadable += 1
    return tasks, unreadable


def with_tasks(agent: AgentState, tasks: Mapping[int, FinishedTask]) -> AgentState:
    """As it is given back."""
    replace = msgspec.structs.replace
    in_order = [replace(tasks[place], prompt=None, system=None) for place in sorted(tasks)]
    return replace(agent, tasks=in_order, whole=agent.whole and len(in_order) == agent.answered)
