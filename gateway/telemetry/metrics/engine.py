"""The engine and the link to its scheduler."""

from __future__ import annotations

from typing import Protocol

from gateway.flowcontrol.engine_state import Counters
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, counter, readings


class EngineView(Protocol):
    """What is known of the engine."""

    @property
    def up(self) -> bool: ...
    @property
    def linked(self) -> bool: ...
    @property
    def reporting(self) -> bool: ...
    @property
    def iterations(self) -> float: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def held_tokens(self) -> float: ...
    @property
    def kept_tokens(self) -> float: ...
    @property
    def capacity_tokens(self) -> float: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def restarts(self) -> int: ...


class EngineMetrics(Subject):
    _scraped: Row[Scraped[EngineView]] = readings(
        Reading("justitia_engine_up", "1 while the engine serves.", lambda engine: engine.up),
        Reading("justitia_engine_running", "Tasks that the engine runs.", lambda engine: engine.running),
        Reading("justitia_engine_waiting", "Tasks in the engine's own queue.", lambda engine: engine.waiting),
        Reading(
            "justitia_service_iterations",
            "Iterations that the engine has done: the service clock.",
            lambda engine: engine.iterations,
        ),
        Reading(
            "justitia_kv_held_tokens", "KV cache in use at the engine, in tokens.", lambda engine: engine.held_tokens
        ),
        Reading(
            "justitia_kv_capacity_tokens",
            "Size of the engine's KV cache, in tokens (M).",
            lambda engine: engine.capacity_tokens,
        ),
        Reading(
            "justitia_kv_kept_tokens",
            "Free KV cache that still holds what agents will need after their tool calls, in tokens.",
            lambda engine: engine.kept_tokens,
        ),
        Reading(
            "justitia_preemptions_total",
            "Tasks that the engine preempted.",
            lambda engine: engine.counters.preempted,
        ),
        Reading(
            "justitia_recomputed_tokens_total",
            "Tokens that were lost by preemption and computed again.",
            lambda engine: engine.counters.recomputed_tokens,
        ),
        Reading(
            "justitia_displaced_total",
            "Tasks that the engine preempted for a more urgent one. Part of justitia_preemptions_total.",
            lambda engine: engine.counters.displaced,
        ),
        Reading(
            "justitia_displaced_tokens_total",
            "Recomputed tokens of displaced tasks. Part of justitia_recomputed_tokens_total.",
            lambda engine: engine.counters.displaced_tokens,
        ),
        Reading(
            "justitia_engine_restarts_total",
            "Restarts of the engine that the gateway has seen.",
            lambda engine: engine.restarts,
        ),
        Reading(
            "justitia_link_up",
            "1 while the engine's scheduler reports over the link.",
            lambda engine: engine.up and engine.linked and engine.reporting,
        ),
        Reading(
            "justitia_link_refused_total",
            "Messages on the link that the engine refused: unreadable, from an unknown sender, or out of order.",
            lambda engine: engine.counters.refused,
        ),
    )
    _link_reports = counter("justitia_link_reports_total", "Reports received over the link.")
    _link_lost = counter(
        "justitia_link_lost_total", "Messages to the engine that were sent again, or could not be sent."
    )

    def reads(self, engine: EngineView) -> None:
        self._scraped.view = engine

    def link_reported(self) -> None:
        self._link_reports.inc()

    def link_lost(self, count: int) -> None:
        self._link_lost.inc(count)
