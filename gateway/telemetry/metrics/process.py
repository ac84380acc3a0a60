"""The gateway's process: its version, its settings, its own logs."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from gateway.config.settings import Live
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, counter, readings


class ReloadOutcome(StrEnum):
    """How a reload of the settings ended."""

    APPLIED = "applied"
    REFUSED = "refused"  # something was wrong, and nothing has changed


class _Views(NamedTuple):
    version: str
    live: Live


class ProcessMetrics(Subject):
    _scraped: Row[Scraped[_Views]] = readings(
        Reading(
            "justitia_build_info",
            "Version and policy.",
            lambda views: {(views.version, views.live.settings.policy): 1.0},
            ("version", "policy"),
        )
    )
    _reloads = counter(
        "justitia_reloads_total", "Reloads of the settings, by outcome.", "outcome", values=ReloadOutcome
    )
    _log_dropped = counter(
        "justitia_request_log_dropped_total",
        "Lines of the request log that were lost, because its target did not take them or not in time.",
    )
    _spans_dropped = counter(
        "justitia_spans_dropped_total",
        "Spans that were lost, because no collector took them or not in time.",
    )

    def reads(self, version: str, live: Live) -> None:
        self._scraped.view = _Views(version, live)

    def reloaded(self, outcome: ReloadOutcome) -> None:
        self._reloads.labels(outcome).inc()

    def log_dropped(self, lines: int) -> None:
        """In any thread."""
        self._log_dropped.inc(lines)

    def spans_dropped(self, count: int) -> None:
        """In any thread."""
        self._spans_dropped.inc(count)
