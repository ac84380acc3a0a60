"""What is told of a request: to the metrics, to the request log, and as a trace.

Who serves a request says what happens to it, as it happens; here it is kept until the request has ended, and then told to all
three. Never a text of a request, and never a key.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from gateway.flowcontrol import Arriving
from gateway.protocol.body import Body
from gateway.protocol.endpoints import COMPLETIONS, ENDPOINTS
from gateway.protocol.errors import GatewayError, Outcome
from gateway.protocol.usage import Usage
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_log import Line, RequestLog
from gateway.telemetry.trace_context import take_trace_context

if TYPE_CHECKING:
    from gateway.telemetry.tracing import TracedRequest, Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
# The endpoint of what was asked for in vain.
UNKNOWN = "unknown"
MAX_MODEL_CHARS = 255

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_decode_text = msgspec.json.Decoder(str).decode
_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# What a task is, by path, in the words of OpenTelemetry's conventions where they have one.
_OPERATIONS = {
    **{endpoint.path: endpoint.path.rpartition("/")[2] for endpoint in ENDPOINTS},
    **{endpoint.path: "chat" for endpoint in ENDPOINTS if endpoint.decodes},
    COMPLETIONS.path: "text_completion",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}


class NoOpenTelemetry(Exception):
    """Traces are asked for, and the extra `otel` is not installed."""


class Observer:
    """tracing, log: None where nobody wants them."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None, log: RequestLog | None = None) -> None:
        self.metrics, self.tracing, self.log = metrics, tracing, log

    def begins(
        self, method: str, endpoint: str, headers: dict[str, str], raw: list[tuple[bytes, bytes]], arrived_s: float
    ) -> RequestSpan:
        """A request has come. endpoint: its route, whatever its path. headers: by lower-case name, as they will go on to the
        engine: what must not is taken out, and what is missing put in. raw: as they came. arrived_s: on the monotonic clock."""
        return RequestSpan(self, method, endpoint, headers, raw, arrived_s)

    def reopen(self) -> None:
        """The request log's file, as after it was moved away."""
        if self.log is not None:
            self.log.reopen()

    async def close(self) -> None:
        if self.tracing is not None:
            await self.tracing.close()
        if self.log is not None:
            await self.log.close()


class RequestSpan:
    """One request, from its arrival to its end: identified, then in the queue, then at the engine, which may lose it, and then
    in the queue again. header: to be sent back with every answer."""

    # Until it is known. On the class, so that a request sets what it comes to have, and no more.
    _operation: str | None = None
    _first_token_s: float | None = None
    _asked_s: float | None = None  # since when it is at the engine, on the monotonic clock
    _engine_s: float | None = None  # that it was there
    _queued = 0  # times
    _ended = False
    _traced: TracedRequest | None = None

    def __init__(
        self,
        observer: Observer,
        method: str,
        endpoint: str,
        headers: dict[str, str],
        raw: list[tuple[bytes, bytes]],
        arrived_s: float,
    ) -> None:
        self._observer, self._arrived_s = observer, arrived_s
        request_id = headers.get(REQUEST_ID)
        if request_id is None or not _SANE_ID.fullmatch(request_id):
            request_id = headers[REQUEST_ID] = os.urandom(16).hex()
        self.header = (b"x-request-id", request_id.encode("ascii"))
        self._line = Line(request_id=request_id, endpoint=endpoint)
        parent = take_trace_context(headers, raw)
        if parent is not None:
            self._line.trace_id = parent.trace_id
        if observer.tracing is not None:
            attributes = {"http.request.method": method, "http.route": endpoint}
            traced = self._traced = observer.tracing.begins(f"{method} {endpoint}", parent, arrived_s, attributes)
            traced.enters("identify", arrived_s)
            self._line.trace_id = traced.trace_id

    @property
    def request_id(self) -> str:
        return self._line.request_id

    def authenticated(self, tenant: str) -> None:
        self._line.tenant = tenant

    def identified(self, arriving: Arriving, body: Body) -> None:
        """It is a task, of this agent."""
        line = self._line
        self._operation = _OPERATIONS[line.endpoint]
        line.agent, line.source, line.agent_class = arriving.agent, arriving.source, arriving.agent_class
        line.task, line.model, line.streaming = str(arriving.id), _model_of(body), body.stream

    def queued(self) -> None:
        """It waits for its turn; again, if the engine has lost it."""
        self._queued += 1
        if self._traced is not None:
            now = time.monotonic()
            self._traced.leaves(now)
            self._traced.enters("queue", now)

    def released(self, finish_tag: float) -> None:
        self._line.finish_tag = round(finish_tag, 1)

    def asks_engine(self, headers: dict[str, str]) -> None:
        """headers: for the engine; with tracing they come to name the span that its own will hang below."""
        now = self._asked_s = time.monotonic()
        if self._traced is not None:
            self._traced.leaves(now)
            self._traced.enters("engine", now, headers=headers)

    def engine_lost(self) -> None:
        self._leaves_engine(time.monotonic(), "engine_lost", failed=True)

    def answered(self, status: int) -> None:
        """By the engine: its answer begins to leave."""
        self._line.status = status

    def first_token(self) -> None:
        """The first bytes of a stream leave."""
        now = time.monotonic()
        self._first_token_s = now - self._arrived_s
        self._observer.metrics.first_token(self._first_token_s)
        if self._traced is not None:
            self._traced.notes("first token", now)

    def failed(self, error: GatewayError) -> None:
        """The client is told of an error of ours, be it in the middle of an answer."""
        self._line.error = error.code
        if self._line.status is None:
            self._line.status = error.status

    def ended(
        self,
        outcome: Outcome,
        *,
        at_s: float | None = None,
        queue_s: float | None = None,
        engine_s: float | None = None,
        usage: Usage | None = None,
        predicted_cost: float | None = None,
        observed_cost: float | None = None,
    ) -> None:
        """Once: a later word is passed over. at_s: on the monotonic clock; now, if it is not given. queue_s: None for what was
        never in the queue. engine_s: spent waiting for the engine, if that is known. Costs in token·iterations."""
        if self._ended:
            return
        self._ended = True
        now = time.monotonic() if at_s is None else at_s
        line, metrics = self._line, self._observer.metrics
        completed = outcome is Outcome.COMPLETED
        failed = outcome is Outcome.FAILED or (line.status or 0) >= 500
        error = None if completed else line.error or outcome.value
        self._leaves_engine(now, error, failed=failed)
        total_s, overhead_s = now - self._arrived_s, None
        if completed and engine_s is not None:
            overhead_s = max(0.0, total_s - (queue_s or 0.0) - engine_s)
            metrics.overhead(overhead_s)
        else:
            engine_s = self._engine_s
        metrics.request_ended(line.endpoint, outcome, total_s)
        if usage is not None:
            line.prompt_tokens, line.cached_tokens = usage.prompt_tokens, usage.cached_tokens
            line.completion_tokens = usage.completion_tokens
        if self._operation is not None:
            metrics.operation_ended(
                self._operation, line.model, outcome, total_s, self._first_token_s, line.completion_tokens
            )
        line.time, line.outcome, line.retries = datetime.now(UTC), outcome.value, max(0, self._queued - 1)
        line.queue_ms, line.engine_ms, line.overhead_ms = _ms(queue_s), _ms(engine_s), _ms(overhead_s)
        line.total_ms, line.first_token_ms = _ms(total_s), _ms(self._first_token_s)
        line.predicted_cost, line.observed_cost = _short(predicted_cost), _short(observed_cost)
        if self._observer.log is not None:
            self._observer.log.add(line)
        if self._traced is not None:
            self._traced.leaves(now, error, failed=failed)
            self._traced.ended(now, self._attributes(), error, failed=failed)

    def _leaves_engine(self, now: float, error: str | None, *, failed: bool) -> None:
        if self._asked_s is not None:
            self._engine_s = (self._engine_s or 0.0) + now - self._asked_s
            self._asked_s = None
            if self._traced is not None:
                self._traced.leaves(now, error, failed=failed)

    def _attributes(self) -> dict[str, str | int | float]:
        """What the line says, in OpenTelemetry's words where it has any."""
        line = self._line
        told: dict[str, str | int | float | None] = {
            "http.response.status_code": line.status,
            "justitia.request_id": line.request_id,
            "justitia.outcome": line.outcome,
            "justitia.tenant": line.tenant,
        }
        if self._operation is not None:
            told |= {
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": "vllm",
                "gen_ai.request.model": line.model,
                "gen_ai.agent.id": line.agent,
                "gen_ai.usage.input_tokens": line.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": line.cached_tokens,
                "gen_ai.usage.output_tokens": line.completion_tokens,
                "justitia.agent_class": line.agent_class,
                "justitia.agent_source": line.source,
                "justitia.task": line.task,
                "justitia.queue_ms": line.queue_ms,
                "justitia.predicted_cost": line.predicted_cost,
                "justitia.observed_cost": line.observed_cost,
                "justitia.finish_tag": line.finish_tag,
                "justitia.retries": line.retries,
            }
        return {name: value for name, value in told.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _short(number: float | None) -> float | None:
    return None if number is None else round(number, 1)


def _model_of(body: Body) -> str | None:
    """As it is asked for: a client may write anything."""
    raw = body.fields.get("model")
    if raw is None or len(memoryview(raw)) > 4 * MAX_MODEL_CHARS:
        return None
    try:
        model = _decode_text(raw)[:MAX_MODEL_CHARS]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return model if model.isprintable() else ascii(model)[1:-1]


def open_tracing(endpoint: str | None, version: str, dropped: Callable[[int], None]) -> Tracing | None:
    """endpoint: of a collector, `http://host:4318`; else the one that OpenTelemetry's own variables name; without any
    there are no traces. dropped: told of spans that are lost, also from another thread. Raises `NoOpenTelemetry`."""
    if endpoint is None and not any(os.environ.get(variable) for variable in _OTLP_VARIABLES):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        from gateway.telemetry.tracing import Tracing
    except ImportError as error:
        if endpoint is not None:
            raise NoOpenTelemetry(f"traces need the extra `otel`: pip install 'justitia[otel]' ({error})") from error
        # The variable may be there for other programs.
        logger.warning("no traces are sent: the extra `otel` is not installed")
        return None
    return Tracing(endpoint, version, dropped)
