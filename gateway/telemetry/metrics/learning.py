"""Predictions: how good they were, what they took, and the models that make them."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry

from gateway.telemetry.counters import Count
from gateway.telemetry.metrics.table import Reading, Row, Scraped, Subject, counter, gauge, histogram, readings
from predictor.accuracy import WINDOW

_PREDICTION_SECONDS = (0.0001, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.005, 0.01, 0.1)
_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)


class TrainingOutcome(StrEnum):
    """How a training ended."""

    PROMOTED = "promoted"
    UNCHANGED = "unchanged"  # the new model was no better
    TOO_FEW = "too_few"  # agents to learn from
    BUSY = "busy"  # another gateway, or a user, was training on the same models
    FAILED = "failed"
    LATE = "late"  # it exceeded its limit and was ended
    KILLED = "killed"  # from outside, as when memory ran out


class AccuracyView(Protocol):
    """How good the latest predictions were; NaN for what is not known. `error` is of one source or of all: how many, and the
    median."""

    def share_below_p90(self) -> float: ...
    def order(self) -> float: ...
    def error(self, source: str | None = None, /) -> tuple[int, float]: ...


class ServesView(Protocol):
    """The model that serves."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def created_at(self) -> float: ...
    @property
    def error(self) -> float: ...


class LearningView(Protocol):
    @property
    def serves(self) -> ServesView | None: ...
    @property
    def failures(self) -> int: ...


class _Views(NamedTuple):
    accuracy: AccuracyView
    learning: LearningView
    failed: Count  # predictions that failed altogether

    def failures(self) -> dict[tuple[str, ...], float]:
        return {("model",): self.learning.failures, ("predictor",): self.failed.value}

    def model_error(self) -> float:
        serves = self.learning.serves
        return math.nan if serves is None else self.accuracy.error(serves.name)[1]

    def validation_error(self) -> float:
        serves = self.learning.serves
        return math.nan if serves is None else serves.error

    def model_version(self) -> int:
        serves = self.learning.serves
        return 0 if serves is None else serves.version

    def model_created_at(self) -> float:
        serves = self.learning.serves
        return 0.0 if serves is None else serves.created_at


class LearningMetrics(Subject):
    _prediction = histogram(
        "justitia_prediction_seconds", "Time from a parsed request to its predicted cost.", _PREDICTION_SECONDS
    )
    _cost_ratio = histogram(
        "justitia_agent_cost_ratio",
        "Observed cost of an agent over the cost predicted at its first release, by what predicted it: model, ladder.",
        _RATIO,
        "source",
    )
    _below_p90 = counter(
        "justitia_agents_below_p90_total",
        "Agents that cost at most the predicted ninth decile: 0.9 of all, where that is calibrated.",
        "source",
    )
    _scraped: Row[Scraped[_Views]] = readings(
        Reading(
            "justitia_predictor_failures_total",
            "Predictions that failed: of the model, where the ladder stepped in; of the predictor, where nothing did.",
            _Views.failures,
            ("part",),
        ),
        Reading(
            "justitia_recent_share_below_p90",
            f"Share of the last {WINDOW} agents that cost at most the predicted ninth decile.",
            lambda views: views.accuracy.share_below_p90(),
        ),
        Reading(
            "justitia_recent_order",
            f"Kendall's tau between predicted and observed cost of the last {WINDOW} agents; 1 is the right order.",
            lambda views: views.accuracy.order(),
        ),
        Reading(
            "justitia_recent_error",
            f"Median relative error of the predicted costs of the last {WINDOW} agents.",
            lambda views: views.accuracy.error()[1],
        ),
        Reading(
            "justitia_model_recent_error",
            f"Median relative error of the costs that the serving model predicted, among the last {WINDOW} agents.",
            _Views.model_error,
        ),
        Reading(
            "justitia_model_validation_error",
            "Median relative error of the serving model on the agents held out from its training.",
            _Views.validation_error,
        ),
        Reading(
            "justitia_model_version",
            "Version of the serving model; 0 if there is none and the ladder serves.",
            _Views.model_version,
        ),
        Reading(
            "justitia_model_created_timestamp_seconds",
            "When the serving model was made, in seconds since 1970; 0 if there is none.",
            _Views.model_created_at,
        ),
    )
    _models_refused = counter("justitia_models_refused_total", "Models that could not be loaded and do not serve.")
    _trainings = counter("justitia_trainings_total", "Trainings, by outcome.", "outcome", values=TrainingOutcome)
    _training = gauge("justitia_training_seconds", "Duration of the last training.")

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._failed = Count()

    def reads(self, accuracy: AccuracyView, learning: LearningView) -> None:
        self._scraped.view = _Views(accuracy, learning, self._failed)

    def predicted(self, seconds: float, *, failed: bool) -> None:
        self._prediction[()].observe(seconds)
        if failed:
            self._failed.inc()

    def judged(self, source: str, ratio: float, *, below_p90: bool) -> None:
        """A prediction, once its agent has ended. source: see `accuracy.kind`. ratio: observed cost over predicted."""
        self._cost_ratio[source,].observe(ratio)
        self._below_p90.labels(source).inc(below_p90)

    def model_refused(self) -> None:
        self._models_refused.inc()

    def trained(self, outcome: TrainingOutcome, seconds: float) -> None:
        self._trainings.labels(outcome).inc()
        self._training.set(seconds)
