"""One request, observed: metrics, a line of the request log and a trace follow from it.

Whatever serves a request notes facts in its span, as they happen. When the request has ended, three readers read them. A span
never holds a text of a request, nor a key.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from gateway.flowcontrol import Arriving
from gateway.protocol.body import Body
from gateway.protocol.endpoints import COMPLETIONS, ENDPOINTS
from gateway.protocol.errors import GatewayError, Outcome
from gateway.protocol.usage import Usage
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_log import RequestLog, line_of
from gateway.telemetry.trace_context import take_trace_context

if TYPE_CHECKING:
    from gateway.telemetry.tracing import TracedRequest, Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
# The endpoint of a request that no route takes.
UNKNOWN = "unknown"
MAX_MODEL_CHARS = 255
# The stages of a request, by the names of their spans. A lost task is in none.
IDENTIFY, QUEUE, ENGINE, LOST = "identify", "queue", "engine", "lost"

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_decode_text = msgspec.json.Decoder(str).decode
_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# The kind of a task, by path, as OpenTelemetry's conventions name it where they do.
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
    """Begins the spans, and has the readers read them."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None, log: RequestLog | None = None) -> None:
        self.metrics, self.tracing, self.log = metrics, tracing, log

    def begins(
        self, method: str, endpoint: str, headers: dict[str, str], raw: list[tuple[bytes, bytes]], arrived_s: float
    ) -> RequestSpan:
        """The span of a request that has arrived. endpoint: its route, whatever its path. headers: by lower-case name, as they
        go on to the engine; a malformed trace context is removed, and a missing request id added. raw: the headers as they
        came. arrived_s: on the monotonic clock."""
        return RequestSpan(self, method, endpoint, headers, raw, arrived_s)

    def ended(self, span: RequestSpan) -> None:
        self.metrics.requests.ended(span)
        if self.log is None and span.trace is None:
            return
        line = line_of(span)
        if self.log is not None:
            self.log.add(line)
        if span.trace is not None:
            span.trace.ended(span, line)

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
    """The facts of one request: identified, then in the queue, then at the engine, which may lose it, and then in the queue
    again. Times are seconds, moments on the monotonic clock, costs KV token·iterations."""

    # What is not set below is set once it is known. The defaults are the class's, so that a request sets only what it has.
    outcome: Outcome  # these three at the end, and not before
    ended_s: float
    total_s: float
    trace: TracedRequest | None = None
    trace_id: str | None = None
    tenant: str | None = None
    arriving: Arriving | None = None  # where the request is a task
    operation: str | None = None
    model: str | None = None
    streaming: bool | None = None
    predicted_cost: float | None = None
    observed_cost: float | None = None
    finish_tag: float | None = None
    usage: Usage | None = None
    status: int | None = None
    error: str | None = None  # the gateway's own code
    first_token_s: float | None = None  # after the arrival
    queue_s: float | None = None
    engine_s: float | None = None
    overhead_s: float | None = None
    _is_over = False

    def __init__(
        self,
        observer: Observer,
        method: str,
        endpoint: str,
        headers: dict[str, str],
        raw: list[tuple[bytes, bytes]],
        arrived_s: float,
    ) -> None:
        self._observer, self.endpoint, self.arrived_s = observer, endpoint, arrived_s
        self.stages: list[tuple[str, float]] = []  # after `IDENTIFY`, with the moment that each began
        request_id = headers.get(REQUEST_ID)
        if request_id is None or not _SANE_ID.fullmatch(request_id):
            request_id = headers[REQUEST_ID] = os.urandom(16).hex()
        self.request_id = request_id
        self.header = (b"x-request-id", request_id.encode("ascii"))  # for every answer
        parent = take_trace_context(headers, raw)
        if parent is not None:
            self.trace_id = parent.trace_id
        if observer.tracing is not None:
            self.trace = observer.tracing.begins(method, endpoint, parent, arrived_s)
            self.trace_id = self.trace.trace_id

    @property
    def retries(self) -> int:
        """How often the task was queued again."""
        if len(self.stages) <= 2:  # as most requests: in the queue, at the engine
            return 0
        return max(0, [stage for stage, _ in self.stages].count(QUEUE) - 1)

    def authenticated(self, tenant: str) -> None:
        self.tenant = tenant

    def identified(self, arriving: Arriving, body: Body) -> None:
        """The request is a task of this agent."""
        self.arriving = arriving
        self.operation = _OPERATIONS[self.endpoint]
        self.model, self.streaming = _model_of(body), body.stream

    def predicted(self, cost: float) -> None:
        self.predicted_cost = cost

    def queued(self) -> None:
        """The task waits for its turn; again, if the engine has lost it."""
        self.stages.append((QUEUE, time.monotonic()))

    def released(self, finish_tag: float) -> None:
        self.finish_tag = finish_tag

    def asks_engine(self, headers: dict[str, str]) -> None:
        """headers: for the engine; with tracing they come to name the span that the engine's own will hang below."""
        now = time.monotonic()
        self.stages.append((ENGINE, now))
        if self.trace is not None:
            self.trace.asks_engine(now, headers)

    def engine_lost(self) -> None:
        self.stages.append((LOST, time.monotonic()))

    def answered(self, status: int) -> None:
        """The engine's answer, or the gateway's own, begins to leave."""
        self.status = status

    def first_token(self) -> None:
        """The first bytes of a stream leave."""
        self.first_token_s = time.monotonic() - self.arrived_s
        self._observer.metrics.requests.first_token(self.first_token_s)  # now: a stream may last for minutes

    def failed(self, error: GatewayError) -> None:
        """The gateway sends its own error to the client, possibly mid-stream."""
        self.error = error.code
        if self.status is None:
            self.status = error.status

    def charged(self, usage: Usage | None, cost: float | None) -> None:
        """What the task used, and what it cost; None for what is not known."""
        self.usage, self.observed_cost = usage, cost

    def ended(
        self,
        outcome: Outcome,
        *,
        at_s: float | None = None,
        queue_s: float | None = None,
        engine_s: float | None = None,
    ) -> None:
        """The last call; further ones do nothing. at_s: now by default. queue_s: None if it was never in the queue. engine_s:
        spent waiting for the engine, if that was measured."""
        if self._is_over:
            return
        self._is_over = True
        self.outcome, self.queue_s = outcome, queue_s
        self.ended_s = time.monotonic() if at_s is None else at_s
        self.total_s = self.ended_s - self.arrived_s
        if engine_s is not None and outcome is Outcome.COMPLETED:
            self.engine_s = engine_s
            self.overhead_s = max(0.0, self.total_s - (queue_s or 0.0) - engine_s)
        else:
            self.engine_s = self._at_engine_s()
        self._observer.ended(self)

    def _at_engine_s(self) -> float | None:
        times = [
            end_s - begin_s
            for (stage, begin_s), (_, end_s) in pairwise((*self.stages, (None, self.ended_s)))
            if stage is ENGINE
        ]
        return sum(times) if times else None


def _model_of(body: Body) -> str | None:
    """As the client wrote it, which may be anything."""
    raw = body.fields.get("model")
    if raw is None or len(memoryview(raw)) > 4 * MAX_MODEL_CHARS:
        return None
    try:
        model = _decode_text(raw)[:MAX_MODEL_CHARS]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return model if model.isprintable() else ascii(model)[1:-1]


def open_tracing(endpoint: str | None, version: str, dropped: Callable[[int], None]) -> Tracing | None:
    """None if there is no collector to send to. endpoint: the collector's, as `http://host:4318`; by default the one that
    OpenTelemetry's own variables name. dropped: called with the number of spans lost, from any thread. Raises
    `NoOpenTelemetry`."""
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
