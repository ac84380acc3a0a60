"""What can go wrong, as one tree, and the outcomes of a request, as one enum.

    GatewayError
    ├── InvalidRequest      400  the client's: broken JSON, absurd headers
    ├── NotFound            404  nobody of that name, or not yours
    ├── BodyTooLarge        413
    ├── QueueFull           429  Retry-After from the drain rate
    ├── EngineLost          502  the engine died, or broke off, while it had the task
    │   └── engine_client.EngineUnreachable: it never had it
    ├── NoEngine            503  none there, or it is starting; Retry-After
    ├── ShuttingDown        503
    └── WaitedTooLong       504

Whatever the engine itself answers, an error too, passes through as it is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Outcome(StrEnum):
    """How a request ended: a label of the metrics."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"  # the client left
    REJECTED = "rejected"  # handed back before it reached the engine
    EXPIRED = "expired"  # waited longer than allowed
    FAILED = "failed"  # the engine's or our fault
    INVALID = "invalid"  # the client's fault


def outcome_of(status: int) -> Outcome:
    """Of a request that the engine has answered."""
    if status < 400:
        return Outcome.COMPLETED
    return Outcome.INVALID if status < 500 else Outcome.FAILED


class GatewayError(Exception):
    """An error that the client is told, in the shape that its dialect has for it.

    param: the field or header that was wrong. retry_after_s: whole seconds after which to try again.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "internal_error"
    outcome: ClassVar[Outcome] = Outcome.FAILED

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class InvalidRequest(GatewayError):
    status, type, code, outcome = 400, "invalid_request_error", "invalid_request", Outcome.INVALID


class NotFound(GatewayError):
    status, type, code, outcome = 404, "invalid_request_error", "not_found", Outcome.INVALID


class BodyTooLarge(GatewayError):
    status, type, code, outcome = 413, "invalid_request_error", "body_too_large", Outcome.INVALID


class QueueFull(GatewayError):
    status, type, code, outcome = 429, "rate_limit_error", "queue_full", Outcome.REJECTED


class EngineLost(GatewayError):
    status, type, code, outcome = 502, "engine_error", "engine_lost", Outcome.FAILED


class NoEngine(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "no_engine", Outcome.REJECTED


class ShuttingDown(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "shutting_down", Outcome.REJECTED


class WaitedTooLong(GatewayError):
    status, type, code, outcome = 504, "timeout_error", "waited_too_long", Outcome.EXPIRED
