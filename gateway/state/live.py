"""Live agents in a store: a blob for the state of each, one for each of its tasks, and what becomes of both when it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from gateway.flowcontrol.records import AgentRecord
from gateway.state.batch import Tasks, sample_of
from predictor.types import FinishedTask

logger = logging.getLogger(__name__)

packed = msgspec.msgpack.Encoder().encode
_agent = msgspec.msgpack.Decoder(AgentRecord).decode
_task = msgspec.msgpack.Decoder(FinishedTask).decode


class Ending(NamedTuple):
    """What becomes of an agent that a gateway has ended."""

    refused: bool  # it has gone on at another gateway, and lives
    sample: bytes | None = None  # the finished agent that is kept, packed
    in_part: bool = False  # it would be kept, but tasks of it are missing


def ending(agent: AgentRecord, living: AgentRecord | None, tasks: Mapping[int, FinishedTask]) -> Ending:
    """agent: as it ended. living, tasks: as the store has them."""
    if living is not None and living.last_end_at > agent.last_end_at:
        return Ending(refused=True)
    sample = sample_of(agent, tasks)
    # If the store has nothing of it, another gateway has ended it before.
    is_known = living is not None or bool(tasks)
    return Ending(False, sample, sample is None and agent.whole and agent.answered > 0 and is_known)


def unpack_agent(blob: bytes) -> AgentRecord | None:
    """None for a blob that cannot be read."""
    try:
        return _agent(blob)
    except (msgspec.DecodeError, RecursionError, TypeError) as error:
        logger.warning("skipped an unreadable live agent of the state store: %s", error)
        return None


def unpack_tasks(blobs: Iterable[tuple[int, bytes]]) -> tuple[Tasks, int]:
    """The tasks by their places, and how many could not be read."""
    tasks: Tasks = {}
    unreadable = 0
    for place, blob in blobs:
        try:
            tasks[place] = _task(blob)
        except (msgspec.DecodeError, RecursionError, TypeError):
            unreadable += 1
    return tasks, unreadable


def with_tasks(agent: AgentRecord, tasks: Mapping[int, FinishedTask]) -> AgentRecord:
    """A live agent as a store returns it: with its tasks, without texts."""
    replace = msgspec.structs.replace
    in_order = [replace(tasks[place], prompt=None, system=None) for place in sorted(tasks)]
    return replace(agent, tasks=tuple(in_order), whole=agent.whole and len(in_order) == agent.answered)
