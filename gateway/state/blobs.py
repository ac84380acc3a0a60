"""A finished agent as one blob, the same in all stores: packed and unpacked here.

A blob that cannot be unpacked (damaged, or of a later version) is skipped and counted.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable

import msgspec

from gateway.state.types import StateError
from predictor.types import FinishedAgent

logger = logging.getLogger(__name__)

# Of one agent, unpacked. A larger one was not written by a gateway.
LARGEST_BYTES = 2**29

# An agent of ten tasks has 6.7 kB: fast compression makes that 1.1, thorough 0.9 in twice the time.
_LEVEL = 1

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FinishedAgent).decode


def pack(agent: FinishedAgent) -> bytes:
    """A finished agent as a blob. Raises `StateError` for what cannot be packed, such as a limit of more than 64 bits."""
    try:
        return zlib.compress(_encode(agent), _LEVEL)
    except (msgspec.EncodeError, OverflowError, ValueError) as error:
        raise StateError(f"an agent cannot be packed: {error}") from error


def without_texts(agent: FinishedAgent) -> FinishedAgent:
    """A finished agent without its texts: nothing is learned from them, and they can be many times the rest."""
    if all(task.prompt is None and task.system is None for task in agent.tasks):
        return agent
    replace = msgspec.structs.replace
    return replace(agent, tasks=[replace(task, prompt=None, system=None) for task in agent.tasks])


def unpack(blobs: Iterable[bytes], *, texts: bool = True) -> tuple[list[FinishedAgent], int]:
    """The agents, and how many could not be read. With `texts` false, no more than one agent's texts are in memory at once."""
    agents, unreadable = [], 0
    for blob in blobs:
        try:
            agent = _decode(_decompress(blob))
            agents.append(agent if texts else without_texts(agent))
        except (zlib.error, msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            unreadable += 1
            reason = str(error)
    if unreadable:
        logger.warning("skipped %d unreadable agents of the state store: %s", unreadable, reason)
    return agents, unreadable


def _decompress(blob: bytes) -> bytes:
    """Raises `zlib.error` and `ValueError`."""
    decompressor = zlib.decompressobj()
    data = decompressor.decompress(blob, LARGEST_BYTES)
    if not decompressor.eof:
        raise ValueError("cut off, or too large")
    return data
