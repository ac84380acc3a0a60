"""Requests as OpenTelemetry's collectors see them: a span for each, and below it `identify`, `queue` and `engine`.

The only file that imports OpenTelemetry (the extra `otel`); it is itself imported only if somebody wants traces. Spans leave
in batches, in a thread of their own. What a collector does not take is dropped and counted: nothing waits for it. Sampling,
resource, batches, and headers for the collector are set by OpenTelemetry's own variables.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

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

from gateway.telemetry.trace_context import TRACEPARENT, TRACESTATE, TraceContext

logger = logging.getLogger(__name__)

# For the last spans, at the end.
CLOSE_S = 3.0
# Of spans that wait to be exported, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise.
MAX_WAITING = 2048

Attributes = Mapping[str, str | int | float]


class Tracing:
    """endpoint: of a collector, `http://host:4318`; None: the one that OpenTelemetry's variables name. dropped: told of spans
    that are lost, also from another thread."""

    def __init__(self, endpoint: str | None, version: str, dropped: Callable[[int], None]) -> None:
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "justitia"}))
        # Not OpenTelemetry's global provider: that is for who is instrumented by others.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(_Batches(_Counting(exporter, dropped), dropped))
        self._tracer = self._provider.get_tracer("justitia", version)

    def begins(self, name: str, parent: TraceContext | None, arrived_s: float, attributes: Attributes) -> TracedRequest:
        return TracedRequest(self._tracer, name, parent, arrived_s, attributes)

    async def close(self) -> None:
        """What has ended leaves, if the collector takes it in time."""
        closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)
        if closing.is_alive():
            logger.warning("the last spans could not be exported")


class TracedRequest:
    """The spans of one request: its own, and one for each part of it, of which one at a time goes on. Times are seconds on the
    monotonic clock."""

    def __init__(
        self, tracer: Tracer, name: str, parent: TraceContext | None, arrived_s: float, attributes: Attributes
    ) -> None:
        self._tracer, self._arrived_s = tracer, arrived_s
        self._arrived_ns = time.time_ns() - int((time.monotonic() - arrived_s) * 1e9)
        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(_remote(parent)), Context())
        self._span = tracer.start_span(name, context, SpanKind.SERVER, attributes, start_time=self._arrived_ns)
        self._below = set_span_in_context(self._span, Context())
        self._part: Span | None = None
        self.trace_id = f"{self._span.get_span_context().trace_id:032x}"

    def enters(self, part: str, at_s: float, *, headers: dict[str, str] | None = None) -> None:
        """A part begins. headers: for the engine, if it is the one to whom they go; its own spans will hang below this part."""
        kind = SpanKind.INTERNAL if headers is None else SpanKind.CLIENT
        self._part = self._tracer.start_span(part, self._below, kind, start_time=self._ns(at_s))
        if headers is not None:
            _put(self._part.get_span_context(), headers)

    def leaves(self, at_s: float, error: str | None = None, *, failed: bool = False) -> None:
        """The part that goes on ends, if one does. error: what kind of one it ended with, if any; failed: it was not the
        client's."""
        if self._part is not None:
            self._end(self._part, at_s, error, failed=failed)
            self._part = None

    def notes(self, event: str, at_s: float) -> None:
        if self._part is not None:
            self._part.add_event(event, timestamp=self._ns(at_s))

    def ended(self, at_s: float, attributes: Attributes, error: str | None, *, failed: bool) -> None:
        """error, failed: as of a part."""
        self._span.set_attributes(dict(attributes))
        self._end(self._span, at_s, error, failed=failed)

    def _end(self, span: Span, at_s: float, error: str | None, *, failed: bool) -> None:
        if error is not None:
            span.set_attribute("error.type", error)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(at_s))

    def _ns(self, at_s: float) -> int:
        """Since 1970."""
        return self._arrived_ns + int((at_s - self._arrived_s) * 1e9)


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
    """Counts what the collector does not take, of which OpenTelemetry's exporter would tell the log alone."""

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
    """OpenTelemetry's batches, with what is too much for them counted."""

    def __init__(self, exporter: _Counting, dropped: Callable[[int], None]) -> None:
        self._exporter, self._dropped = exporter, dropped
        self._batches = BatchSpanProcessor(exporter)
        told = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
        self._max_waiting = int(told) if told.isdecimal() else MAX_WAITING
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
