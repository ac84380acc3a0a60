"""Responses that the engine makes in the background: answered at once, fetched later, and held in its memory meanwhile.

The engine does not report when one is done, so it is asked. An answer's id contains its tenant, so that no other tenant can
fetch it, cancel it, or go on from it, and no list has to be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from gateway.protocol.errors import EngineLost, Outcome
from gateway.relay.engine_client import EngineClient, EngineUnreachable

POLL_S = 0.25
# Seconds that the engine is given to answer that a response is cancelled.
CANCEL_S = 2.0
# Of the engine's answers, in a row, that say nothing of the response.
UNSURE = 20
ID_PATTERN = "resp_[0-9a-f]{48}"
_ID = re.compile(ID_PATTERN)
_UNFINISHED = frozenset(("queued", "in_progress"))
_OUTCOMES = {
    "completed": Outcome.COMPLETED,
    "incomplete": Outcome.COMPLETED,  # as long as it was allowed to be
    "cancelled": Outcome.CANCELLED,
}


class _Answer(msgspec.Struct):
    status: str = ""


_decode = msgspec.json.Decoder(_Answer).decode


class Background:
    """What goes on when its client has been answered. `cancel` ends it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def answer_id(tenant: str) -> str:
    """A new one."""
    return f"resp_{_owner(tenant)}{uuid.uuid4().hex}"


def owns(tenant: str, answer: str) -> bool:
    return _ID.fullmatch(answer) is not None and answer.startswith(f"resp_{_owner(tenant)}")


def unfinished(answer: bytes) -> bool:
    """Whether a response says that it is still being made."""
    return _status(answer) in _UNFINISHED


def outcome_of_response(answer: bytes) -> Outcome:
    """Of one that is not being made any more."""
    return _OUTCOMES.get(_status(answer), Outcome.FAILED)


async def until_finished(client: EngineClient, answer: str, headers: Mapping[str, str]) -> bytes | None:
    """The response, when it is done, cancelled or failed; None if the engine does not know it any more."""
    unsure = 0
    while unsure < UNSURE:
        await asyncio.sleep(POLL_S)
        try:
            told = await client.get(f"/v1/responses/{answer}", headers)
        except EngineUnreachable:
            unsure += 1
            continue
        if told.status_code == 404:
            return None
        unsure = 0 if told.is_success else unsure + 1
        if told.is_success and not unfinished(told.content):
            return told.content
    return None


async def cancel_response(client: EngineClient, answer: str, headers: Mapping[str, str]) -> None:
    """Has the engine give up a response, as far as it can be reached."""
    with contextlib.suppress(EngineLost, TimeoutError):
        async with asyncio.timeout(CANCEL_S):
            told = await client.ask("POST", f"/v1/responses/{answer}/cancel", b"", headers)
            told.close()


def _status(answer: bytes) -> str:
    try:
        return _decode(answer).status
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def _owner(tenant: str) -> str:
    return hashlib.blake2b(tenant.encode(), digest_size=8).hexdigest()
