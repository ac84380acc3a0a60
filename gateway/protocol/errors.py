"""The errors that the gateway answers with, as one tree, and the outcomes of a request, as one enum.

    GatewayError
    ├── InvalidRequest      400  the client's fault: broken JSON, absurd headers
    ├── Unauthorized        401  no API key, or an unknown one
    ├── Forbidden           403  the key's tenant may not do that
    ├── NotFound            404  also for what belongs to another tenant
    ├── RequestTimeout      408  a head or a body did not arrive
    ├── AgentCancelled      410  the agent was ended meanwhile; trying again would begin it anew
    ├── BodyTooLarge        413  the request's body
    ├── UrlTooLong          414
    ├── QueueFull           429  Retry-After from the drain rate
    ├── QuotaSpent          429  Retry-After until it is open again
    ├── HeadTooLarge        431
    ├── EngineLost          502  the engine died, or closed the connection, while it had the task
    │   └── engine_client.EngineUnreachable: the task never reached it
    ├── NoEngine            503  the engine is down or starting; Retry-After
    ├── NoState             503  the answer is in the state store, which cannot be read
    ├── ShuttingDown        503  Retry-After: when the next gateway should have started
    ├── TooManyConnections  503  and none is idle
    └── WaitedTooLong       504  the task waited longer than allowed

What the engine answers, errors included, is forwarded unchanged.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Outcome(StrEnum):
    """How a request ended: a label of the metrics."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"  # the client disconnected, or its agent was ended
    REJECTED = "rejected"  # refused before it reached the engine
    EXPIRED = "expired"  # waited longer than allowed
    FAILED = "failed"  # the engine's or the gateway's fault
    INVALID = "invalid"  # the client's fault


class Reason(StrEnum):
    """Why a task was refused before it reached the engine: a label of the metrics."""

    QUEUE_FULL = "queue_full"  # waiting tasks of all tenants
    TENANT_QUEUE_FULL = "tenant_queue_full"  # waiting tasks of its tenant
    BYTES = "bytes"  # bodies of waiting tasks, of its tenant or of all; or bodies in memory
    TASKS = "tasks"  # concurrent tasks of its tenant
    TOKENS_PER_MINUTE = "tokens_per_minute"
    KV_PER_DAY = "kv_per_day"
    DRAINING = "draining"
    NO_ENGINE = "no_engine"


def outcome_of(status: int) -> Outcome:
    """The outcome of a request that the engine has answered with this status."""
    if status < 400:
        return Outcome.COMPLETED
    return Outcome.INVALID if status < 500 else Outcome.FAILED


class GatewayError(Exception):
    """An error that is sent to the client, in the shape of its dialect."""

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
        self.param = param  # the field or header that was wrong
        self.retry_after_s = retry_after_s  # whole seconds after which to try again
        self.reason = reason or self.reason  # of a rejection

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
    """410 rather than 409 (conflict): OpenAI's and Anthropic's SDKs try again after a 409, and would begin the agent anew."""

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


# `Retry-After` of a gateway that shuts down, in seconds: the time that another takes to start.
RESTART_S = 5


class ShuttingDown(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "shutting_down", Outcome.REJECTED
    reason = Reason.DRAINING


class TooManyConnections(GatewayError):
    status, type, code, outcome = 503, "service_unavailable", "too_many_connections", Outcome.REJECTED


class WaitedTooLong(GatewayError):
    status, type, code, outcome = 504, "timeout_error", "waited_too_long", Outcome.EXPIRED
