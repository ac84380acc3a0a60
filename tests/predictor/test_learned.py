"""The predictor that serves: a model's word above the ladder's, and the ladder's where the model's cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from predictor.features import Row
from predictor.learned import Answer, Learned
from predictor.types import AgentProgress, FinishedAgent, FinishedTask, TaskContent

CONTENT = TaskContent(400, b"", b"Why?")
NEW = AgentProgress("kind", "t")


class Told:
    name = "told"

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self._answer = answer

    def predict(self, row: Row) -> Answer:
        return self._answer()


def fails() -> Answer:
    raise RuntimeError("as told")


def test_without_a_model_the_ladder_answers() -> None:
    arrival = Learned().arrive(CONTENT, NEW)
    assert arrival.agent.source == "ladder"
    assert arrival.agent.cost == pytest.approx(arrival.task.cost)


def test_a_model_is_believed() -> None:
    arrival = Learned(Told(lambda: Answer(5e6, 9e6, 30.0))).arrive(CONTENT, NEW)
    assert (arrival.agent.cost, arrival.agent.p90, arrival.agent.source) == (5e6, 9e6, "told")
    assert arrival.task.decode_tokens == 30


def test_never_less_than_what_has_arrived_and_never_more_than_the_client_allows() -> None:
    predictor = Learned(Told(lambda: Answer(1.0, 0.5, 3000.0)))
    arrival = predictor.arrive(TaskContent(400, max_tokens=20), AgentProgress("kind", "t", 1, 0, 7e6))
    assert arrival.task.decode_tokens == 20
    assert arrival.agent.p90 >= arrival.agent.cost >= 7e6


@pytest.mark.parametrize(
    "answer", [fails, lambda: Answer(math.nan, 1, 1), lambda: Answer(1, math.inf, 1), lambda: Answer(1, 1, -1)]
)
def test_a_model_that_fails_is_passed_over_and_counted(answer: Callable[[], Answer]) -> None:
    predictor = Learned(Told(answer))
    plain = Learned().arrive(CONTENT, NEW)
    arrival = predictor.arrive(CONTENT, NEW)
    assert (arrival.task, arrival.agent) == (plain.task, plain.agent)
    known = AgentProgress("kind", "t", 1, 1, 500.0, opening=arrival.sketch, latest=arrival.sketch)
    assert predictor.predict_agent(known).source == "ladder"
    assert predictor.failures == 2


def test_a_model_that_fails_at_every_request_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Learned(Told(fails))
    for _ in range(3):
        predictor.arrive(CONTENT, NEW)
    assert caplog.text.count("the model told failed") == 1
    predictor.model = Told(fails)
    predictor.arrive(CONTENT, NEW)
    assert caplog.text.count("the model told failed") == 2, "once each"
    assert predictor.failures == 4


def test_an_agent_that_outgrew_its_prediction_is_asked_for_again() -> None:
    predictor = Learned(Told(lambda: Answer(5e6, 9e6, 30.0)))
    arrival = predictor.arrive(CONTENT, NEW)
    known = AgentProgress("kind", "t", 1, 1, 500.0, opening=arrival.sketch, latest=arrival.sketch)
    assert predictor.predict_agent(known).cost == 5e6
    assert predictor.predict_agent(AgentProgress("kind", "t", 1, 1, 6e6)).source == "ladder", (
        "nothing is known of its text"
    )


def test_the_ladder_learns_whether_there_is_a_model_or_not() -> None:
    predictor = Learned(Told(fails))
    for _ in range(30):
        predictor.learn(FinishedAgent("kind", "t", [FinishedTask(40, 10, 0, 7)]))
    assert predictor.arrive(CONTENT, NEW).task.decode_tokens == pytest.approx(7, rel=0.1)
