"""Connections of clients."""

from __future__ import annotations

from collections.abc import Sized
from enum import StrEnum

from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, counter, readings


class CutOff(StrEnum):
    """Why the gateway closed a client's connection early."""

    INVALID = "invalid"  # not HTTP, or too much of it
    SLOW = "slow"  # a head or a body did not come
    UNREAD = "unread"  # the client did not read an answer
    CROWDED = "crowded"  # it was idle, and gave way to a new one
    REFUSED = "refused"  # there were too many, and none was idle


class ConnectionMetrics(Subject):
    _scraped: Row[Scraped[Sized]] = readings(Reading("justitia_connections", "Open connections of clients.", len))
    _cut_off = counter(
        "justitia_connections_cut_off_total",
        "Connections of clients that the gateway closed early, by reason.",
        "reason",
        values=CutOff,
    )

    def reads(self, connections: Sized) -> None:
        self._scraped.view = connections

    def cut_off(self, why: CutOff) -> None:
        self._cut_off.labels(why).inc()
