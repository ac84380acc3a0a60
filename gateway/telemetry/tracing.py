"""Requests as OpenTelemetry's collectors see them: a span for each, and below it `identify`, `queue` and `engine`.

The only file that imports OpenTelemetry (the extra `otel`); it is itself imported only where traces are configured. Spans
leave in batches, in a thread of their own. What a collector does not take is dropped and counted: nothing waits for it.
Sampling, resource, batches, and headers for the collector are set by OpenTelemetry's own variables.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from gateway.protocol.errors import Outcome
from gateway.telemetry.request_log import Line
from gateway.telemetry.request_span import ENGINE, IDENTIFY, LOST, RequestSpan
from gateway.telemetry.trace_context import TRACEPARENT, TRACESTATE, TraceContext

logger = logging.getLogger(__name__)

# Seconds for the last spans, when the gateway stops.
CLOSE_S = 3.0
# Spans that may wait to be exported, unless OTEL_BSP_MAX_QUEUE_SIZE sets another limit.
MAX_WAITING = 2048

Attributes = Mapping[str, str | int | float]


class Tracing:
    """Where the spans of all requests go."""

    def __init__(self, endpoint: str | None, version: str, dropped: Callable[[int], None]) -> None:
        """endpoint: the collector's, as `http://host:4318`; None for the one that OpenTelemetry's variables name. dropped:
        called with the number of spans lost, from any thread."""
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "justitia"}))
        # Not OpenTelemetry's global provider: that is for programs that others instrument.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(_Batches(_Counting(exporter, dropped), dropped))
        self._tracer = self._provider.get_tracer("justitia", version)

    def begins(self, method: str, endpoint: str, parent: TraceContext | None, arrived_s: float) -> TracedRequest:
        return TracedRequest(self._tracer, method, endpoint, parent, arrived_s)

    async def close(self) -> None:
        """Exports what has ended, if the collector takes it in time."""
        closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)
        if closing.is_alive():
            logger.warning("the last spans could not be exported")


class TracedRequest:
    """The spans of one request: its own, and one for each of its stages. Only those that the engine's spans hang below begin
    before the request has ended: the engine needs their ids. Times are seconds on the monotonic clock."""

    def __init__(
        self, tracer: Tracer, method: str, endpoint: str, parent: TraceContext | None, arrived_s: float
    ) -> None:
        self._tracer, self._arrived_s = tracer, arrived_s
        self._arrived_ns = time.time_ns() - int((time.monotonic() - arrived_s) * 1e9)
        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(_remote(parent)), Context())
        attributes = {"http.request.method": method, "http.route": endpoint}
        self._span = self._start(f"{method} {endpoint}", context, SpanKind.SERVER, arrived_s, attributes)
        self._below = set_span_in_context(self._span, Context())
        self._at_engine: list[Span] = []  # one for each time that the engine was asked
        self.trace_id = f"{self._span.get_span_context().trace_id:032x}"

    def asks_engine(self, at_s: float, headers: dict[str, str]) -> None:
        """headers: for the engine; they come to name the span that its own will hang below."""
        span = self._start(ENGINE, self._below, SpanKind.CLIENT, at_s)
        self._at_engine.append(span)
        _put(span.get_span_context(), headers)

    def ended(self, request: RequestSpan, line: Line) -> None:
        """Ends all spans, as the request's facts and its line have it."""
        error = None if request.outcome is Outcome.COMPLETED else line.error or line.outcome
        failed = request.outcome is Outcome.FAILED or (line.status or 0) >= 500
        asked = iter(self._at_engine)
        stages = pairwise(((IDENTIFY, request.arrived_s), *request.stages, (None, request.ended_s)))
        for (stage, begin_s), (following, end_s) in stages:
            if stage is None or stage is LOST:
                continue
            span = next(asked) if stage is ENGINE else self._start(stage, self._below, SpanKind.INTERNAL, begin_s)
            if request.first_token_s is not None and span is self._at_engine[-1]:
                span.add_event("first token", timestamp=self._ns(self._arrived_s + request.first_token_s))
            if following is None:
                self._end(span, end_s, error, failed=failed)
            elif following is LOST:
                self._end(span, end_s, "engine_lost", failed=True)
            else:
                self._end(span, end_s)
        self._span.set_attributes(_attributes(line, request.operation))
        self._end(self._span, request.ended_s, error, failed=failed)

    def _start(
        self, name: str, parent: Context, kind: SpanKind, at_s: float, attributes: Attributes | None = None
    ) -> Span:
        return self._tracer.start_span(name, parent, kind, attributes, start_time=self._ns(at_s))

    def _end(self, span: Span, at_s: float, error: str | None = None, *, failed: bool = False) -> None:
        """error: the kind of error it ended with, if any. failed: the error was not the client's."""
        if error is not None:
            span.set_attribute("error.type", error)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(at_s))

    def _ns(self, at_s: float) -> int:
        """Since 1970."""
        return self._arrived_ns + int((at_s - self._arrived_s) * 1e9)


def _attributes(line: Line, operation: str | None) -> dict[str, str | int | float]:
    """The fields of the line, by OpenTelemetry's names where it has any."""
    found: dict[str, str | int | float | None] = {
        "http.response.status_code": line.status,
        "justitia.request_id": line.request_id,
        "justitia.outcome": line.outcome,
        "justitia.tenant": line.tenant,
    }
    if operation is not None:
        found |= {
            "gen_ai.operation.name": operation,
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
    return {name: value for name, value in found.items() if value is not None}


def _put(context: SpanContext, headers: dict[str, str]) -> None:
    headers[TRACEPARENT] = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"
    headers.pop(TRACESTATE, None)
    if state := context.trace_state.to_header():
        headers[TRACESTATE] = state


def _remote(parent: TraceContext) -> SpanContext:
    return SpanContext(
        int(parent.trace_id, 16),
        int(parent.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([parent.state]) if parent.state else None,
    )


class _Counting(SpanExporter):
    """Counts what the collector does not take, which OpenTelemetry's exporter would only log."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[int], None]) -> None:
        self.done = 0  # spans, counted by the thread that exports
        self._exporter, self._dropped = exporter, dropped
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.done += len(spans)
            failing, self._failing = self._failing, result is not SpanExportResult.SUCCESS
            if self._failing:
                self._dropped(len(spans))
                if not failing:
                    logger.warning("the collector does not take spans: they are dropped (why: --log-level debug)")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _Batches(SpanProcessor):
    """OpenTelemetry's batches; what exceeds them is counted."""

    def __init__(self, exporter: _Counting, dropped: Callable[[int], None]) -> None:
        self._exporter, self._dropped = exporter, dropped
        self._batches = BatchSpanProcessor(exporter)
        limit = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
        self._max_waiting = int(limit) if limit.isdecimal() else MAX_WAITING
        self._taken = 0  # spans, counted by the event loop

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._taken - self._exporter.done >= self._max_waiting:
            self._dropped(1)
            return
        self._taken += 1
        self._batches.on_end(span)

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]  # OpenTelemetry's

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._batches.force_flush(timeout_millis)
