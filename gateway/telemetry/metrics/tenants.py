"""Tenants: what each was charged, and what was refused."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from gateway.flowcontrol.records import UsageRow
from gateway.protocol.errors import Reason
from gateway.telemetry.metrics.labels import BoundedLabels
from gateway.telemetry.metrics.table import Subject, counter, counts


class TenantMetrics(Subject):
    _rejected = counter(
        "justitia_rejected_total", "Tasks rejected before they reached the engine, by reason.", "reason", values=Reason
    )
    _tenant_rejected = counter(
        "justitia_tenant_rejected_total", "Tasks rejected before they reached the engine, by tenant.", "tenant"
    )
    _requests = counts("justitia_tenant_requests_total", "Tasks charged to a tenant.", "tenant")
    _tokens = counts(
        "justitia_tenant_tokens_total",
        "Tokens charged to a tenant, by kind: prompt, cached (those of the prompts that were cached), completion.",
        "tenant",
        "kind",
    )
    _cost = counts(
        "justitia_tenant_kv_token_iterations_total", "Cost charged to a tenant, in KV token·iterations.", "tenant"
    )

    def __init__(self, registry: CollectorRegistry, labels: BoundedLabels) -> None:
        super().__init__(registry)
        self._labels = labels

    def rejected(self, tenant: str, reason: Reason) -> None:
        self._rejected.labels(reason).inc()
        self._tenant_rejected.labels(self._labels.tenant(tenant)).inc()

    def charged(self, row: UsageRow) -> None:
        """What a task used, or a correction of it. A counter cannot go back, so a correction downwards is left out."""
        label = self._labels.tenant(row.tenant)
        if row.requests:
            self._requests[label,].inc(row.requests)
            self._tokens[label, "prompt"].inc(row.prompt_tokens)
            self._tokens[label, "cached"].inc(row.cached_tokens)
            self._tokens[label, "completion"].inc(row.completion_tokens)
        self._cost[label,].inc(max(0.0, row.kv_cost))
