"""Reads headers, and bodies of bounded size. What all bodies hold together is bounded too, and shared between tenants."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope

from gateway.flowcontrol.concurrency import ConcurrencyLimit, Sharer
from gateway.protocol.errors import BodyTooLarge, QueueFull, Reason

RETRY_AFTER_S = 5
# Digits of a Content-Length that is worth reading.
MAX_LENGTH_DIGITS = 20


class ClientGone(Exception):
    """The client disconnected before its request was complete."""


class HeldBody:
    """The bytes of one body that are in memory, as a part of a budget. Release it when the body is gone; releasing it again
    does no harm."""

    def __init__(self, budget: ConcurrencyLimit, tenant: Sharer) -> None:
        self.size = 0
        self._budget = budget
        self._tenant = tenant

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more fit."""
        return self._budget.has_room(self._tenant, size)

    def expect(self, size: int) -> None:
        """Check that announced bytes would fit. They are not held yet: a client could announce and never send. Raises
        `QueueFull`."""
        if not self.has_room(size):
            raise self._full(size)

    def grow(self, size: int) -> None:
        """Hold bytes that have arrived. Raises `QueueFull`; then they are not held, and what came before them still is."""
        if not self._budget.take(self._tenant, size):
            raise self._full(size)
        self.size += size

    def release(self) -> None:
        self._budget.give_back(self._tenant.name, self.size)
        self.size = 0

    def _full(self, size: int) -> QueueFull:
        budget, name = self._budget, self._tenant.name
        return QueueFull(
            f"no room for {size} more bytes of request bodies: tenant {name} holds {budget.held_by(name)}, all tenants together"
            f" {budget.held}, of at most {budget.limit} (max_held_mib), and each leaves room for the others",
            retry_after_s=RETRY_AFTER_S,
            reason=Reason.BYTES,
        )


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers by lower-case name. Of several with one name, the first counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


async def read_body(receive: Receive, headers: Mapping[str, str], limit_bytes: int, held: HeldBody) -> bytes:
    """Raises `BodyTooLarge` before more than the limit has been read, `QueueFull` when there is no room for it, and
    `ClientGone`."""
    declared = headers.get("content-length", "")
    if len(declared) > MAX_LENGTH_DIGITS or (declared.isdecimal() and int(declared) > limit_bytes):
        raise _too_large(limit_bytes)
    if declared.isdecimal():
        held.expect(int(declared))
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        held.grow(len(chunk))
        if not message.get("more_body", False):
            return chunk if not chunks else b"".join([*chunks, chunk])
        chunks.append(chunk)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit_bytes} bytes")
