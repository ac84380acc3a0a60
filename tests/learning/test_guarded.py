"""A predictor that fails stops nothing: it is counted, and said in the log."""

from __future__ import annotations

import logging
import math

import pytest

from gateway.learning.guarded import GuardedPredictor
from predictor.learned import Learned
from predictor.types import (
    AgentPrediction,
    AgentProgress,
    Arrival,
    FinishedAgent,
    FinishedTask,
    TaskContent,
    TaskPrediction,
)

NEW = AgentProgress("class", "tenant")
CONTENT = TaskContent(400)


class Counted:
    """Predictions, as the metrics get them."""

    def __init__(self) -> None:
        self.failed: list[bool] = []

    def predicted(self, seconds: float, *, failed: bool) -> None:
        assert seconds >= 0
        self.failed.append(failed)


class Broken:
    """A predictor that does what it must not."""

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        raise RuntimeError("broken")

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        raise RuntimeError("broken")

    def learn(self, agent: FinishedAgent) -> None:
        raise RuntimeError("broken")


class Endless(Learned):
    """A predictor that returns a cost that cannot be."""

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        agent = AgentPrediction(math.nan, math.nan, "ladder")
        return Arrival(TaskPrediction(1, 1), agent, super().arrive(content, progress).sketch, b"")


def test_what_is_predicted_is_passed_on() -> None:
    counted, learned = Counted(), Learned()
    guarded = GuardedPredictor(learned, counted)
    arrival, expected = guarded.arrive(CONTENT, NEW), learned.arrive(CONTENT, NEW)
    assert arrival is not None
    assert (arrival.task, arrival.agent, arrival.row) == (expected.task, expected.agent, expected.row)
    assert guarded.predict_agent(NEW) == learned.predict_agent(NEW)
    assert counted.failed == [False]
    before = arrival.agent
    guarded.learn(FinishedAgent("class", "tenant", [FinishedTask(1000, 500, 0, 4000)]))
    assert learned.arrive(CONTENT, NEW).agent != before


def test_a_predictor_that_raises_is_caught_counted_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    counted = Counted()
    guarded = GuardedPredictor(Broken(), counted)
    with caplog.at_level(logging.ERROR):
        assert guarded.arrive(CONTENT, NEW) is None
        assert guarded.predict_agent(NEW) is None
        guarded.learn(FinishedAgent("class", "tenant", []))
    assert counted.failed == [True]
    assert [record.message for record in caplog.records] == [
        "the predictor failed on a task",
        "the predictor failed on an agent",
        "the predictor failed to learn from an agent",
    ]
    assert all(record.exc_info for record in caplog.records)


def test_a_cost_that_cannot_be_counts_as_a_failure() -> None:
    counted = Counted()
    assert GuardedPredictor(Endless(), counted).arrive(CONTENT, NEW) is not None
    assert counted.failed == [True]
