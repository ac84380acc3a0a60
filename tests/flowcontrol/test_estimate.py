"""The estimate of a task and its agent: bounded by the engine, never below what is known, and finite whatever is predicted."""

from __future__ import annotations

import math

import pytest

from gateway.flowcontrol.estimate import estimate_agent, estimate_arrival
from gateway.protocol.body import parse_body
from gateway.protocol.texts import content_of
from predictor.cost import task_cost
from predictor.ladder import PRIOR_DECODE_TOKENS
from predictor.learned import Learned
from predictor.types import NO_SOURCE, AgentPrediction, AgentProgress, Arrival, TaskContent, TaskPrediction

NEW = AgentProgress("class", "tenant")


class Fixed:
    """A predictor whose answers are given; None: it has failed."""

    def __init__(self, arrival: Arrival | None = None, agent: AgentPrediction | None = None) -> None:
        self._arrival, self._agent = arrival, agent

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival | None:
        return self._arrival

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction | None:
        return self._agent


def content(body: bytes) -> TaskContent:
    return content_of(parse_body(body))


def test_no_task_is_predicted_to_hold_more_than_the_longest_sequence() -> None:
    image = content(b'{"messages": "' + b"A" * 3_000_000 + b'"}')
    assert estimate_arrival(Learned(), image, NEW, None).memory_tokens > 700_000
    bounded = estimate_arrival(Learned(), image, NEW, max_model_len=2048)
    assert bounded.memory_tokens == 2048
    assert bounded.prompt_tokens == 2048


def test_sequences_of_a_request_count_each() -> None:
    one, four = (content(b'{"messages": "abcd", "max_tokens": 10, "n": %d}' % n) for n in (1, 4))
    assert estimate_arrival(Learned(), four, NEW, 2048).cost == 4 * estimate_arrival(Learned(), one, NEW, 2048).cost


def test_without_a_prediction_there_is_still_an_estimate() -> None:
    progress = AgentProgress(None, "t", 1, cost_arrived=77.0)
    estimate = estimate_arrival(Fixed(), TaskContent(400, sequences=2), progress, None)
    assert estimate.cost == 2 * task_cost(100, PRIOR_DECODE_TOKENS, 0)
    assert (estimate.agent.cost, estimate.agent.source) == (77 + estimate.cost, NO_SOURCE)
    assert (estimate.sketch, estimate.numbers) == (None, b"")
    assert estimate_agent(Fixed(), progress) == 77.0


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_cannot_be_is_no_prediction(number: float) -> None:
    progress = AgentProgress(None, "t", 1, cost_arrived=77.0)
    task, agent = TaskPrediction(10, 10), AgentPrediction(100.0, 200.0, "ladder")
    sketch = Learned().arrive(TaskContent(400), progress).sketch
    without = estimate_arrival(Fixed(), TaskContent(400), progress, None)
    for lengths in (TaskPrediction(10, number), TaskPrediction(number, 10), TaskPrediction(-1, 10)):
        arrival = Arrival(lengths, agent, sketch, b"")
        assert estimate_arrival(Fixed(arrival), TaskContent(400), progress, None) == without
    for odd in (AgentPrediction(number, 200.0, "ladder"), AgentPrediction(100.0, number, "ladder")):
        estimate = estimate_arrival(Fixed(Arrival(task, odd, sketch, b"")), TaskContent(400), progress, None)
        assert estimate.cost == task_cost(10, 10, 0), "the task's own prediction holds"
        assert (estimate.agent.cost, estimate.agent.source) == (77 + estimate.cost, NO_SOURCE)
        assert estimate_agent(Fixed(agent=odd), progress) == 77.0


def test_another_formula_of_the_cost() -> None:
    estimate = estimate_arrival(
        Fixed(), TaskContent(400, sequences=3), NEW, None, cost=lambda prompt, decode, cached: prompt - cached
    )
    assert estimate.cost == 300


def test_an_agents_prediction_is_never_below_what_has_arrived_with_this_task() -> None:
    """The engine's longest sequence also bounds the predictor's answer."""
    body = content(b'{"messages": "abcd"}')
    estimate = estimate_arrival(Learned(), body, AgentProgress("class", "tenant", 1, cost_arrived=1e9), 2048)
    assert estimate.agent.p90 >= estimate.agent.cost >= 1e9 + estimate.cost
