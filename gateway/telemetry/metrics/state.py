"""The state store, and the journal before it."""

from __future__ import annotations

from operator import add
from typing import Protocol

from prometheus_client import CollectorRegistry

from gateway.telemetry.counters import Count
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, readings


class StoreView(Protocol):
    @property
    def unreadable(self) -> int: ...


class JournalView(Protocol):
    @property
    def up(self) -> bool: ...
    @property
    def waiting_bytes(self) -> int: ...
    @property
    def unreadable(self) -> int: ...
    @property
    def store(self) -> StoreView: ...
    def take_counts(self) -> tuple[int, int, int]:
        """Errors, steps that were not written, and steps and agents that were given up, since this was called last."""
        ...


class _Views:
    def __init__(self, journal: JournalView, failed: Count) -> None:
        self.journal, self.failed = journal, failed
        self._counts = (0, 0, 0)

    def counts(self) -> tuple[int, int, int]:
        """Since the start."""
        errors, unwritten, given_up = map(add, self._counts, self.journal.take_counts())
        self._counts = errors, unwritten, given_up
        return self._counts


class StateMetrics(Subject):
    _scraped: Row[Scraped[_Views]] = readings(
        Reading(
            "justitia_state_up",
            "1 while the state store answers; at 0 the gateway serves without it.",
            lambda views: views.journal.up,
        ),
        Reading(
            "justitia_state_waiting_bytes",
            "Bytes in the journal that are not yet in the state store.",
            lambda views: views.journal.waiting_bytes,
        ),
        Reading(
            "justitia_state_unreadable_agents",
            "Agents of the state store, and steps of the journal, that could not be read and were skipped.",
            lambda views: views.journal.store.unreadable + views.journal.unreadable,
        ),
        Reading(
            "justitia_state_errors_total",
            "Failed reads and writes of the state store.",
            lambda views: views.failed.value + views.counts()[0],
        ),
        Reading(
            "justitia_state_unwritten_total",
            "Settled tasks that the journal's disk did not take: in memory only until the state store has them.",
            lambda views: views.counts()[1],
        ),
        Reading(
            "justitia_state_given_up_total",
            "Records given up for good: finished agents, after a long outage of the store; settled tasks.",
            lambda views: views.counts()[2],
        ),
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._failed = Count()

    def reads(self, journal: JournalView) -> None:
        self._scraped.view = _Views(journal, self._failed)

    def failed(self) -> None:
        """A read of the state store, past the journal."""
        self._failed.inc()
