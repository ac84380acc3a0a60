"""Requests: how many, how they ended, where their time went. Tasks also under the names that OpenTelemetry has for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from gateway.protocol.errors import Outcome
from gateway.telemetry.metrics.labels import BoundedLabels
from gateway.telemetry.metrics.table import Subject, counts, histogram

if TYPE_CHECKING:
    from gateway.telemetry.request_span import RequestSpan

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_OVERHEAD_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
# As OpenTelemetry's conventions for generative AI advise.
_OPERATION_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_OPERATION = ("gen_ai_operation_name", "gen_ai_request_model")


class RequestMetrics(Subject):
    """Seconds throughout."""

    _requests = counts("justitia_requests_total", "Requests, by endpoint and outcome.", "endpoint", "outcome")
    _total = histogram(
        "justitia_request_seconds", "From a request's arrival to its end.", SECONDS, "endpoint", "outcome"
    )
    _queue = histogram("justitia_queue_seconds", "Time that a task waited in the fair queue.", SECONDS, "outcome")
    _overhead = histogram(
        "justitia_gateway_overhead_seconds",
        "Time of a completed task that it spent neither in the queue nor waiting for the engine.",
        _OVERHEAD_SECONDS,
    )
    _first_token = histogram(
        "justitia_time_to_first_token_seconds", "From a task's arrival to the first bytes of its stream.", SECONDS
    )
    _operation = histogram(
        "gen_ai_server_request_duration_seconds",
        "OpenTelemetry's gen_ai.server.request.duration: from a task's arrival to its end.",
        _OPERATION_SECONDS,
        *_OPERATION,
        "error_type",
    )
    _operation_first_token = histogram(
        "gen_ai_server_time_to_first_token_seconds",
        "OpenTelemetry's gen_ai.server.time_to_first_token: of completed streams.",
        _FIRST_TOKEN_SECONDS,
        *_OPERATION,
    )
    _operation_token = histogram(
        "gen_ai_server_time_per_output_token_seconds",
        "OpenTelemetry's gen_ai.server.time_per_output_token: of completed streams, after the first token.",
        _TOKEN_SECONDS,
        *_OPERATION,
    )

    def __init__(self, registry: CollectorRegistry, labels: BoundedLabels) -> None:
        super().__init__(registry)
        self._labels = labels

    def left_queue(self, outcome: Outcome, seconds: float) -> None:
        self._queue[outcome,].observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token[()].observe(seconds)

    def ended(self, span: RequestSpan) -> None:
        """Once for each request, at its end."""
        outcome, seconds = str(span.outcome), span.total_s  # a member of an enum takes long to hash
        self._requests[span.endpoint, outcome].inc()
        self._total[span.endpoint, outcome].observe(seconds)
        if span.overhead_s is not None:
            self._overhead[()].observe(span.overhead_s)
        if (operation := span.operation) is None:
            return
        completed = span.outcome is Outcome.COMPLETED
        model = self._labels.model(span.model, served=completed)
        # An empty label is as good as none.
        self._operation[operation, model, "" if completed else outcome].observe(seconds)
        if completed and (first_token_s := span.first_token_s) is not None:
            self._operation_first_token[operation, model].observe(first_token_s)
            # The first token is there already.
            if span.usage is not None and (later := span.usage.completion_tokens - 1) > 0:
                self._operation_token[operation, model].observe((seconds - first_token_s) / later)
