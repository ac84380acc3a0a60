"""What comes in from a client: headers, and a body of bounded size. All bodies together are bounded too."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive, Scope

from gateway.protocol.errors import BodyTooLarge, QueueFull, Reason

RETRY_AFTER_S = 5


class ClientGone(Exception):
    """The client left before its request was here."""


class BodyBudget:
    """Bytes of bodies over all clients: of requests, that are being sent, wait, or are kept until their task has ended; or of
    answers, until their ends are here."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class HeldBody:
    """What is held of one body. Release it when the body is gone; more than once does no harm."""

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self._budget = budget

    def has_room(self, size: int) -> bool:
        """For so many bytes more."""
        return self._budget.held_bytes + size <= self._budget.limit_bytes

    def expect(self, size: int) -> None:
        """So many bytes are announced. They are not held yet: a client could announce and never send. Raises `QueueFull` when
        there is no room for them now."""
        budget = self._budget
        if not self.has_room(size):
            raise QueueFull(
                f"bodies of {budget.held_bytes} bytes are held already, of at most {budget.limit_bytes} (max_held_mib)",
                retry_after_s=RETRY_AFTER_S,
                reason=Reason.BYTES,
            )

    def grow(self, size: int) -> None:
        """So many bytes more have come. Raises `QueueFull`; then they are not held, and what came before them still is."""
        self.expect(size)
        self.size += size
        self._budget.held_bytes += size

    def release(self) -> None:
        self._budget.held_bytes -= self.size
        self.size = 0


def headers_of(scope: Scope) -> dict[str, str]:
    """By lower-case name; of several with one name the first."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


async def read_body(receive: Receive, headers: Mapping[str, str], limit_bytes: int, held: HeldBody) -> bytes:
    """Raises `BodyTooLarge` before more than the limit has been read, `QueueFull` when there is no room for it, and
    `ClientGone`."""
    declared = headers.get("content-length", "")
    if len(declared) > 20 or (declared.isdecimal() and int(declared) > limit_bytes):
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
    return BodyTooLarge(f"the body is larger than {limit_bytes} bytes")
