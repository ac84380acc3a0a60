"""Memory for bodies: how much of what clients send may be held at once, and who is turned away above it."""

from __future__ import annotations

from gateway.errors import QueueFull

RETRY_AFTER_S = 5


class BodyBudget:
    """Bytes of bodies that are being sent, wait, or are kept until their task has ended, over all clients."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class HeldBody:
    """What is held of one body. Release it when the body is gone; more than once does no harm."""

    def __init__(self, budget: BodyBudget) -> None:
        self.size = 0
        self._budget = budget

    def expect(self, size: int) -> None:
        """So many bytes are announced. They are not held yet: a client could announce and never send. Raises `QueueFull` when
        there is no room for them now."""
        budget = self._budget
        if budget.held_bytes + size > budget.limit_bytes:
            raise QueueFull(
                f"bodies of {budget.held_bytes / 2**20:.0f} MiB are held already", retry_after_s=RETRY_AFTER_S
            )

    def grow(self, size: int) -> None:
        """So many bytes more have come. Raises `QueueFull`; then they are not held, and what came before them still is."""
        self.expect(size)
        self.size += size
        self._budget.held_bytes += size

    def release(self) -> None:
        self._budget.held_bytes -= self.size
        self.size = 0
