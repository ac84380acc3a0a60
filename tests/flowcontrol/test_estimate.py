from __future__ import annotations

import math

import pytest

from gateway.flowcontrol.estimate import estimate_agent, estimate_arrival
from gateway.protocol.body import parse_body
from gateway.protocol.endpoints import CHAT, COMPLETIONS
from gateway.protocol.texts import content_of
from predictor.learned import Learned
from predictor.types import AgentPrediction, AgentProgress, Arrival, FinishedAgent, TaskContent

NEW = AgentProgress("class", "tenant")


class Broken:
    """A predictor that does what it must not."""

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        raise RuntimeError("as told")

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        raise RuntimeError("as told")

    def learn(self, agent: FinishedAgent) -> None:
        raise RuntimeError("as told")


def test_no_task_is_predicted_to_hold_more_than_the_longest_sequence() -> None:
    image = parse_body(b'{"messages": "' + b"A" * 3_000_000 + b'"}')
    assert estimate_arrival(Learned(), image, NEW, None).memory_tokens > 700_000
    bounded = estimate_arrival(Learned(), image, NEW, max_model_len=2048)
    assert bounded.memory_tokens == 2048
    assert bounded.prompt_tokens == 2048


def test_sequences_of_a_request_count_each() -> None:
    one, four = (parse_body(b'{"messages": "abcd", "max_tokens": 10, "n": %d}' % n) for n in (1, 4))
    assert estimate_arrival(Learned(), four, NEW, 2048).cost == 4 * estimate_arrival(Learned(), one, NEW, 2048).cost


def test_a_predictor_that_fails_is_not_passed_on() -> None:
    progress = AgentProgress(None, "t", 1, cost_arrived=77.0)
    estimate = estimate_arrival(Broken(), parse_body(b'{"messages": "abcd"}'), progress, None)
    assert math.isfinite(estimate.cost)
    assert estimate.agent.cost == 77 + estimate.cost
    assert estimate_agent(Broken(), progress) == 77.0


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
    assert parse_body(b'{"prompt": %s}' % prompt.encode(), COMPLETIONS).prompts == prompts


def test_no_limit_is_a_limit_too() -> None:
    assert parse_body(b'{"max_tokens": 0}').max_tokens == 0
    assert parse_body(b'{"max_tokens": null}').max_tokens is None
    assert parse_body(b'{"stream": null, "stream_options": null}').stream is False


def test_an_agents_prediction_is_never_below_what_has_arrived_with_this_task() -> None:
    """Also where the engine's longest sequence bounds what the predictor was told."""
    body = parse_body(b'{"messages": "abcd"}')
    estimate = estimate_arrival(Learned(), body, AgentProgress("class", "tenant", 1, cost_arrived=1e9), 2048)
    assert estimate.agent.p90 >= estimate.agent.cost >= 1e9 + estimate.cost


@pytest.mark.parametrize(
    ("body", "system", "text", "messages"),
    [
        (
            '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}, {}]}',
            b"Be brief.",
            b"Why?\n",
            3,
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"image_url": {}}]}]}',
            b"",
            b"What is it?",
            1,
        ),
        ('{"prompt": "Once\\nupon"}', b"", b"Once\nupon", 1),
        ('{"prompt": ["a", "b"]}', b"", b'["a", "b"]', 1),
        ('{"prompt": [1, 2]}', b"", b"[1, 2]", 1),
        ('{"messages": [{"role": 7}]}', b"", b'[{"role": 7}]', 1),
        ("{}", b"", b"", 1),
    ],
)
def test_what_a_request_says(body: str, system: bytes, text: bytes, messages: int) -> None:
    content = content_of(parse_body(body.encode(), COMPLETIONS if "prompt" in body else CHAT))
    assert (content.system, content.text, content.messages) == (system, text, messages)


def test_what_stands_beside_the_text() -> None:
    content = content_of(
        parse_body(
            b'{"messages": [], "tools": [{"type": "function"}, {}], "max_tokens": 9, "n": 3, "response_format": {}}'
        )
    )
    assert (content.tools, content.tool_bytes, content.max_tokens, content.sequences) == (2, 26, 9, 3)
    assert content.structured
    assert content_of(parse_body(b'{"messages": [], "tools": "odd"}')).tools == 0


def test_what_was_just_not_too_deep_for_the_parser_is_taken_as_it_came() -> None:
    messages = b'[{"role": "user", "new": ' + b"[" * 700 + b"]" * 700 + b"}]"
    body = parse_body(b'{"messages": ' + messages + b"}")

    def called_so_deep(calls: int) -> bytes:
        return called_so_deep(calls - 1) if calls else content_of(body).text

    assert called_so_deep(400) in (messages, b""), "as it came, or, where Python counts otherwise, read"


def test_a_body_of_megabytes_is_not_taken_apart() -> None:
    huge = b"[" + b'{"role": "user", "content": "x"},' * 100_000 + b"{}]"
    content = content_of(parse_body(b'{"messages": ' + huge + b"}"))
    assert content.text == huge
