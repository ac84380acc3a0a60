from __future__ import annotations

import math

import pytest

from gateway.body import parse_body
from gateway.estimate import estimate_agent, estimate_task
from gateway.identify import Identity
from predictor.ladder import Ladder
from predictor.types import AgentProgress, FinishedAgent, TaskFeatures, TaskPrediction

WHO = Identity("a", "x-agent-id", "class", "tenant", final=False)


class Broken:
    """A predictor that does what it must not."""

    def predict_task(self, task: TaskFeatures) -> TaskPrediction:
        return TaskPrediction(math.nan, 1)

    def predict_agent(self, progress: AgentProgress) -> float:
        raise RuntimeError("as told")

    def learn(self, agent: FinishedAgent) -> None:
        raise RuntimeError("as told")


def test_no_task_is_predicted_to_hold_more_than_the_longest_sequence() -> None:
    image = parse_body(b'{"messages": "' + b"A" * 3_000_000 + b'"}')
    assert estimate_task(Ladder(), WHO, image, None).memory_tokens > 700_000
    bounded = estimate_task(Ladder(), WHO, image, max_model_len=2048)
    assert bounded.memory_tokens == 2048
    assert bounded.prompt_tokens == 2048


def test_sequences_of_a_request_count_each() -> None:
    one, four = (parse_body(b'{"messages": "abcd", "max_tokens": 10, "n": %d}' % n) for n in (1, 4))
    assert estimate_task(Ladder(), WHO, four, 2048).cost == 4 * estimate_task(Ladder(), WHO, one, 2048).cost


def test_a_predictor_that_fails_is_not_passed_on() -> None:
    estimate = estimate_task(Broken(), WHO, parse_body(b'{"messages": "abcd"}'), None)
    assert math.isfinite(estimate.cost)
    assert estimate_agent(Broken(), AgentProgress(None, "t", 1, 77.0)) == 77.0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ('"one"', 1),
        ("[1, 2, 3]", 1),
        ('["a", "b"]', 2),
        ("[[1, 2], [3]]", 2),
        ("[]", 1),
        ("null", 1),
        ("7", 1),
        (' [ "a" ]', 1),
    ],
)
def test_prompts_of_a_batch_are_counted(prompt: str, prompts: int) -> None:
    assert parse_body(b'{"prompt": %s}' % prompt.encode()).prompts == prompts


def test_no_limit_is_a_limit_too() -> None:
    assert parse_body(b'{"max_tokens": 0}').max_tokens == 0
    assert parse_body(b'{"max_tokens": null}').max_tokens is None
    assert parse_body(b'{"stream": null, "stream_options": null}').stream is False
