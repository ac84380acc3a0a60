"""Metrics that have OpenTelemetry's names, bounded labels, and readings. The others are seen in the tests of their callers."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.protocol.errors import Outcome
from gateway.protocol.usage import Usage
from gateway.telemetry.metrics import MAX_CLASSES, MAX_MODELS, OWN_CLASSES, Metrics
from gateway.telemetry.request_span import Observer


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def value(registry: CollectorRegistry, name: str, model: str = "m", **labels: str) -> float | None:
    labels = {"gen_ai_operation_name": "chat", "gen_ai_request_model": model, **labels}
    return registry.get_sample_value(f"gen_ai_server_{name}", labels)


def ended(
    metrics: Metrics,
    model: str | None,
    outcome: Outcome,
    *,
    after_s: float = 1.0,
    first_token_s: float | None = None,
    tokens: int | None = None,
) -> None:
    """A chat that has ended."""
    span = Observer(metrics).begins("POST", "/v1/chat/completions", {}, [], 100.0)
    span.operation, span.model, span.first_token_s = "chat", model, first_token_s
    span.charged(None if tokens is None else Usage(7, tokens, 0), None)
    span.ended(outcome, at_s=100.0 + after_s)


def test_a_stream(metrics: Metrics, registry: CollectorRegistry) -> None:
    ended(metrics, "m", Outcome.COMPLETED, after_s=3.0, first_token_s=1.0, tokens=5)
    assert value(registry, "request_duration_seconds_sum", error_type="") == 3
    assert value(registry, "time_to_first_token_seconds_sum") == 1
    assert value(registry, "time_per_output_token_seconds_sum") == 0.5, "the first token is there already"


@pytest.mark.parametrize("tokens", [None, 0, 1])
def test_a_stream_of_no_more_than_one_token_has_no_time_per_token(
    metrics: Metrics, registry: CollectorRegistry, tokens: int | None
) -> None:
    ended(metrics, "m", Outcome.COMPLETED, after_s=3.0, first_token_s=1.0, tokens=tokens)
    assert value(registry, "time_to_first_token_seconds_count") == 1
    assert value(registry, "time_per_output_token_seconds_count") is None


def test_what_fails_has_its_outcome_as_the_type_of_the_error(metrics: Metrics, registry: CollectorRegistry) -> None:
    ended(metrics, "m", Outcome.COMPLETED, tokens=5)
    ended(metrics, "m", Outcome.CANCELLED, after_s=3.0, first_token_s=1.0)
    assert value(registry, "request_duration_seconds_sum", error_type="cancelled") == 3
    assert value(registry, "time_to_first_token_seconds_count") is None


def test_models_that_never_answered_and_those_above_the_limit_are_other(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    for number in range(1000):
        ended(metrics, f"invented-{number}", Outcome.INVALID)
    for number in range(MAX_MODELS + 1):
        ended(metrics, f"served-{number}", Outcome.COMPLETED)
    ended(metrics, None, Outcome.COMPLETED)
    count = "request_duration_seconds_count"
    assert value(registry, count, "other", error_type="invalid") == 1000
    assert value(registry, count, "other", error_type="") == 2
    assert value(registry, count, f"served-{MAX_MODELS - 1}", error_type="") == 1


def test_a_tenant_with_ever_new_classes_leaves_room_for_those_of_others(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    for number in range(MAX_CLASSES + 5):
        metrics.agents.finished("flood", f"flood-{number}", 1.0)
    for number in range(OWN_CLASSES + 3):
        metrics.agents.finished("red", f"red-{number}", 1.0)
    metrics.agents.finished("flood", "red-0", 1.0)

    def finished(agent_class: str) -> float | None:
        return registry.get_sample_value("justitia_agents_finished_total", {"agent_class": agent_class})

    assert finished(f"flood-{MAX_CLASSES - 1}") == 1
    assert finished(f"red-{OWN_CLASSES - 1}") == 1
    assert finished("red-0") == 2, "a name that is known is no new one"
    assert finished("other") == 5 + 3


def test_what_is_read_at_a_scrape_has_no_samples_before_there_is_a_view(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    assert registry.get_sample_value("justitia_connections") is None
    connections = [1, 2]
    metrics.connections.reads(connections)
    assert registry.get_sample_value("justitia_connections") == 2
    connections.clear()
    assert registry.get_sample_value("justitia_connections") == 0


def test_what_the_journal_counts_between_scrapes_adds_up(metrics: Metrics, registry: CollectorRegistry) -> None:
    class Journal:
        up, waiting_bytes, unreadable = True, 7, 1
        counts = (1, 2, 3)

        @property
        def store(self) -> Journal:
            return self

        def take_counts(self) -> tuple[int, int, int]:
            counts, self.counts = self.counts, (0, 0, 0)
            return counts

    journal = Journal()
    metrics.state.reads(journal)
    metrics.state.failed()
    names = ("errors", "unwritten", "given_up")

    def counted() -> list[float | None]:
        return [registry.get_sample_value(f"justitia_state_{name}_total") for name in names]

    assert counted() == [2, 2, 3]
    assert counted() == [2, 2, 3]
    journal.counts = (1, 1, 1)
    generate_latest(registry)
    assert counted() == [3, 3, 4]
    assert registry.get_sample_value("justitia_state_unreadable_agents") == 2
