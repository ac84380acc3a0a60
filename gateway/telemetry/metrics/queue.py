"""The fair queue, as it is at a scrape. It never sees this package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry

from gateway.flowcontrol.fairqueue import TenantId
from gateway.telemetry.counters import Labels
from gateway.telemetry.metrics.labels import BoundedLabels
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, readings


class QueueView(Protocol):
    """What `FairQueue` has of it."""

    @property
    def waiting(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def peak_tokens(self) -> float: ...
    def virtual_time(self, tenant: TenantId, /) -> float: ...


class Named(Protocol):
    """A tenant."""

    @property
    def name(self) -> str: ...


class _Views(NamedTuple):
    queue: QueueView
    tenants: Iterable[Named]
    labels: BoundedLabels

    def virtual_times(self) -> dict[Labels, float]:
        return {
            (self.labels.tenant(tenant.name),): self.queue.virtual_time(TenantId(tenant.name))
            for tenant in self.tenants
        }


class QueueMetrics(Subject):
    _scraped: Row[Scraped[_Views]] = readings(
        Reading(
            "justitia_tasks",
            "Tasks, by state: waiting, in_flight.",
            lambda views: {("waiting",): views.queue.waiting, ("in_flight",): views.queue.in_flight},
            ("state",),
        ),
        Reading(
            "justitia_kv_predicted_tokens",
            "KV cache that the tasks in flight are predicted to occupy at their peak, in tokens.",
            lambda views: views.queue.peak_tokens,
        ),
        Reading(
            "justitia_virtual_time",
            "Virtual time of a tenant's agents in the fluid reference, in token·iterations per unit of weight.",
            _Views.virtual_times,
            ("tenant",),
        ),
    )

    def __init__(self, registry: CollectorRegistry, labels: BoundedLabels) -> None:
        super().__init__(registry)
        self._labels = labels

    def reads(self, queue: QueueView, tenants: Iterable[Named]) -> None:
        self._scraped.view = _Views(queue, tenants, self._labels)
