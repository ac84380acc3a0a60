"""The metrics that have OpenTelemetry's names. What the others say is seen in the tests of those who call them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from gateway.flowcontrol.records import UsageRow
from gateway.protocol.errors import Outcome, Reason
from gateway.telemetry.metrics import MAX_CLASSES, MAX_MODELS, MAX_TENANTS, Metrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry, version="", policy="")


def value(registry: CollectorRegistry, name: str, model: str = "m", **labels: str) -> float | None:
    told = {"gen_ai_operation_name": "chat", "gen_ai_request_model": model, **labels}
    return registry.get_sample_value(f"gen_ai_server_{name}", told)


def test_a_stream(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.operation_ended("chat", "m", Outcome.COMPLETED, 3.0, 1.0, 5)
    assert value(registry, "request_duration_seconds_sum", error_type="") == 3
    assert value(registry, "time_to_first_token_seconds_sum") == 1
    assert value(registry, "time_per_output_token_seconds_sum") == 0.5, "the first token is there already"


@pytest.mark.parametrize("tokens", [None, 0, 1])
def test_a_stream_of_no_more_than_one_token_has_no_time_per_token(
    metrics: Metrics, registry: CollectorRegistry, tokens: int | None
) -> None:
    metrics.operation_ended("chat", "m", Outcome.COMPLETED, 3.0, 1.0, tokens)
    assert value(registry, "time_to_first_token_seconds_count") == 1
    assert value(registry, "time_per_output_token_seconds_count") is None


def test_what_fails_has_its_outcome_as_the_type_of_the_error(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.operation_ended("chat", "m", Outcome.COMPLETED, 1.0, None, 5)
    metrics.operation_ended("chat", "m", Outcome.CANCELLED, 3.0, 1.0, None)
    assert value(registry, "request_duration_seconds_sum", error_type="cancelled") == 3
    assert value(registry, "time_to_first_token_seconds_count") is None


def test_models_that_never_answered_and_those_above_the_limit_are_other(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    for number in range(1000):
        metrics.operation_ended("chat", f"invented-{number}", Outcome.INVALID, 1.0, None, None)
    for number in range(MAX_MODELS + 1):
        metrics.operation_ended("chat", f"served-{number}", Outcome.COMPLETED, 1.0, None, None)
    metrics.operation_ended("chat", None, Outcome.COMPLETED, 1.0, None, None)
    count = "request_duration_seconds_count"
    assert value(registry, count, "other", error_type="invalid") == 1000
    assert value(registry, count, "other", error_type="") == 2
    assert value(registry, count, f"served-{MAX_MODELS - 1}", error_type="") == 1


def test_a_tenant_that_makes_up_classes_leaves_labels_for_others(metrics: Metrics, registry: CollectorRegistry) -> None:
    for number in range(MAX_CLASSES):
        metrics.agent_finished("blue", f"run-{number}", 1.0)
    metrics.agent_finished("red", "rag", 1.0)
    metrics.agent_finished("blue", "rag", 1.0)
    ended = {
        agent_class: registry.get_sample_value("justitia_agents_finished_total", {"agent_class": agent_class})
        for agent_class in ("run-0", f"run-{MAX_CLASSES - 1}", "rag", "other")
    }
    assert ended == {"run-0": 1, f"run-{MAX_CLASSES - 1}": None, "rag": 2, "other": MAX_CLASSES // 2}


def test_labels_of_tenants_are_bounded(metrics: Metrics, registry: CollectorRegistry) -> None:
    for number in range(MAX_TENANTS + 5):
        metrics.rejected(f"t{number}", Reason.TASKS)
        metrics.charged(UsageRow(f"t{number}", 0, 1, 10, 4, 2, 7.5))
    metrics.charged(UsageRow("t0", 0, kv_cost=-1.5))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"justitia_{name}", labels)

    assert value("rejected_total", reason="tasks") == MAX_TENANTS + 5
    assert value("rejected_total", reason="bytes") == 0, "there from the start"
    assert (value("tenant_rejected_total", tenant="t0"), value("tenant_rejected_total", tenant="other")) == (1, 5)
    assert value("tenant_requests_total", tenant="t0") == 1
    kinds = [value("tenant_tokens_total", tenant="other", kind=kind) for kind in ("prompt", "cached", "completion")]
    assert kinds == [50, 20, 10]
    assert value("tenant_kv_token_iterations_total", tenant="t0") == 7.5
