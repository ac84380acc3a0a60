"""What can go wrong, as one tree, and the outcomes of a request, as one enum.

    GatewayError
    ├── InvalidRequest      400  the client's: broken JSON, absurd headers
    ├── Unauthorized        401  no API key, or none that is known
    ├── Forbidden           403  the key's tenant may not have that
    ├── NotFound            404  also for what is another tenant's
    ├── AgentCancelled      410  its agent was ended meanwhile; a client that tried again would begin it anew
    ├── RequestTimeout      408  a head or a body that does not come
    ├── BodyTooLarge        413
    ├── UrlTooLong          414
    ├── QueueFull           429  Retry-After from the drain rate
    ├── QuotaSpent          429  Retry-After from when it is open again
    ├── HeadTooLarge        431
    ├── EngineLost          502  the engine died, or broke off, while it had the task
    │   └── engine_client.EngineUnreachable: it never had it
    ├── NoEngine            503  none there, or it is starting; Retry-After
    ├── NoState             503  what is asked for is in the state store, and that cannot be read
    ├── ShuttingDown        503  Retry-After: when the next one should be there
    ├── TooManyConnections  503
    └── WaitedTooLong       504

Whatever the engine itself answers, an error too, passes through as it is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Outcome(StrEnum):
    """How a request ended: a label of the metrics."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"  # the client left, or somebody ended its agent
    REJECTED = "rejected"  # handed back before it reached the engine
    EXPIRED = "expired"  # waited longer than allowed
    FAILED = "failed"  # the engine's or our fault
    INVALID = "invalid"  # the client's fault


class Reason(StrEnum):
    """Why a task was handed back before it reached the engine: a label of the metrics."""

    QUEUE_FULL = "queue_full"  # tasks that wait, of all tenants
    TENANT_QUEUE_FULL = "tenant_queue_full"  # tasks that wait, of its tenant
    BYTES = "bytes"  # bodies that wait, of its tenant or of all; or that are held at all
    TASKS = "tasks"  # tasks at once, of its tenant
    TOKENS_PER_MINUTE = "tokens_per_minute"
    KV_PER_DAY = "kv_per_day"
    DRAINING = "draining"
    NO_ENGINE = "no_engine"


def outcome_of(status: int) -> Outcome:
    """Of a request that the engine has answered."""
    if status < 400:
        return Outcome.COMPLETED
    return Outcome.INVALID if status < 500 else Outcome.FAILED


class GatewayError(Exception):
    """An error that the client is told, in the shape that its dialect has for it.

    param: the field or header that was wrong. retry_after_s: whole seconds after which to try again. reason: of a rejection.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "internal_error"
    outcome: ClassVar[Outcome] = Outcome.FAILED
    reason: Reason | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        reason: Reason | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason or self.reason

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class InvalidRequest(GatewayError):
    status, type, code, outcome = 400, "invalid_request_error", "invalid_request", Outcome.INVALID


class Unauthorized(GatewayError):
    status, type, code, outcome = 401, "authentication_error", "invalid_api_key", Outcome.INVALID

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": "Bearer"}


class Forbidden(GatewayError):
    status, type, code, outcome = 403, "permission_error", "forbidden", Outcome.INVALID


class NotFound(GatewayError):
    status, type, code, outcome = 404, "invalid_request_error", "not_found", Outcome.INVALID


class AgentCancelled(GatewayError):
    """410, and not 409 for a conflict: OpenAI's and Anthropic's SDKs try again after a 409, and would begin the agent anew."""

    status, type, code, outcome = 410, "cancelled_error", "agent_cancelled", Outcome.CANCELLED


class RequestTimeout(GatewayError):
    status, type, code, outcome = 408, "timeout_error", "request_timeout", Outcome.INVALID


class BodyTooLarge(GatewayError):
    status, type, code, outcome = 413, "invalid_request_error", "body_too_large", Outcome.INVALID


class UrlTooLong(GatewayError):
    status, type, code, outcome = 414, "invalid_request_error", "url_too_long", Outcome.INVALID


class QueueFull(GatewayError):
    status, type, code, outcome = 429, "rate_limit_error", "queue_full", Outcome.REJECTED


class QuotaSpent(GatewayError):
    status, type, code, outcome = 429, "rate_limit_error", "quota_spent", Outcome.REJECTED


class HeadTooLarge(GatewayError):
    status, type, code, outcome = 431, "invalid_request_error", "head_too_large", Outcome.INVALID


class EngineLost(GatewayError):
    status, type, code, outcome = 502, "engine_error", "engine_lost", Outcome.FAILED


class NoEngine(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "no_engine", Outcome.REJECTED
    reason = Reason.NO_ENGINE


class NoState(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "no_state", Outcome.FAILED


# Seconds that a gateway takes to start: `Retry-After` of one that ends.
RESTART_S = 5


class ShuttingDown(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "shutting_down", Outcome.REJECTED
    reason = Reason.DRAINING


class TooManyConnections(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "too_many_connections", Outcome.REJECTED


class WaitedTooLong(GatewayError):
    status, type, code, outcome = 504, "timeout_error", "waited_too_long", Outcome.EXPIRED
