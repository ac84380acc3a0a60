"""Every metric, by subject: prefix `justitia_`, base units, bounded labels.

A subject is a small class in a file of its own, with its metrics declared as a table (`table`). Events are counted by verb,
as in `metrics.tenants.charged(row)`. What can be looked up is read at each scrape from the object that a subject `reads`, of
which it names the few properties that it needs.

    requests, queue, agents, tenants, engine, learning, state, connections, process  the subjects
    table    how a subject declares its metrics
    labels   how many different labels there may be
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from gateway.telemetry.metrics.agents import AgentMetrics
from gateway.telemetry.metrics.connections import ConnectionMetrics, CutOff
from gateway.telemetry.metrics.engine import EngineMetrics
from gateway.telemetry.metrics.labels import MAX_CLASSES, MAX_MODELS, MAX_TENANTS, OTHER, OWN_CLASSES, BoundedLabels
from gateway.telemetry.metrics.learning import LearningMetrics, TrainingOutcome
from gateway.telemetry.metrics.process import ProcessMetrics, ReloadOutcome
from gateway.telemetry.metrics.queue import QueueMetrics
from gateway.telemetry.metrics.requests import RequestMetrics
from gateway.telemetry.metrics.state import StateMetrics
from gateway.telemetry.metrics.tenants import TenantMetrics

__all__ = [
    "MAX_CLASSES",
    "MAX_MODELS",
    "MAX_TENANTS",
    "OTHER",
    "OWN_CLASSES",
    "CutOff",
    "Metrics",
    "ReloadOutcome",
    "TrainingOutcome",
]


class Metrics:
    """All subjects, on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        labels = BoundedLabels()
        self.requests = RequestMetrics(registry, labels)
        self.queue = QueueMetrics(registry, labels)
        self.agents = AgentMetrics(registry, labels)
        self.tenants = TenantMetrics(registry, labels)
        self.engine = EngineMetrics(registry)
        self.learning = LearningMetrics(registry)
        self.state = StateMetrics(registry)
        self.connections = ConnectionMetrics(registry)
        self.process = ProcessMetrics(registry)
