"""The paper's predictor: it learns what words cost, and leaves to the ladder what it does not know."""

from __future__ import annotations

import math
import random
import sys

import pytest

from predictor.mlp import FEWEST_SAMPLES, MlpUnavailable, PaperMlp, Sample
from predictor.types import AgentProgress, FinishedAgent, FinishedTask, TaskContent

BRIEF, LONG = "Answer in one word, please.", "Write everything down in great detail."


def samples(count: int = 60, agent_class: str | None = "kind") -> list[Sample]:
    rng = random.Random(4)
    drawn = [(BRIEF, 1e3, 10.0) if rng.random() < 0.5 else (LONG, 1e6, 300.0) for _ in range(count)]
    return [
        Sample(agent_class, f"{text} {rng.choice('xyz')}", cost * rng.uniform(0.8, 1.2), decode)
        for text, cost, decode in drawn
    ]


def content(text: str, max_tokens: int | None = None) -> TaskContent:
    return TaskContent(40, text=text.encode(), max_tokens=max_tokens)


@pytest.fixture(scope="module")
def fitted() -> PaperMlp:
    pytest.importorskip("sklearn")
    pytest.importorskip("torch")
    mlp = PaperMlp()
    mlp.fit(samples())
    return mlp


NEW = AgentProgress("kind", "t")


def test_words_tell_the_cost(fitted: PaperMlp) -> None:
    brief, long = (fitted.arrive(content(text), NEW) for text in (BRIEF, LONG))
    assert brief.agent.cost == pytest.approx(1e3, rel=0.5) and long.agent.cost == pytest.approx(1e6, rel=0.5)
    assert brief.task.decode_tokens == pytest.approx(10, rel=0.5)
    assert long.task.decode_tokens == pytest.approx(300, rel=0.5)
    assert long.agent.source == "mlp" and long.agent.p90 >= long.agent.cost
    assert fitted.arrive(content(LONG, max_tokens=50), NEW).task.decode_tokens == 50


def test_the_same_seed_learns_the_same(fitted: PaperMlp) -> None:
    again = PaperMlp()
    again.fit(samples())
    assert again.arrive(content(LONG), NEW).agent == fitted.arrive(content(LONG), NEW).agent


def test_the_ladder_speaks_of_other_classes_and_of_agents_that_outgrew_what_was_said(fitted: PaperMlp) -> None:
    assert fitted.arrive(content(LONG), AgentProgress("another", "t")).agent.source == "ladder"
    grown = fitted.arrive(content(BRIEF), AgentProgress("kind", "t", 3, 3, 5e6, 5e6))
    assert grown.agent.source == "ladder" and grown.agent.cost >= 5e6
    assert fitted.predict_agent(AgentProgress("kind", "t", 3, 3, 5e6, 5e6)).source == "ladder"


def test_the_ladder_learns_from_finished_agents() -> None:
    mlp = PaperMlp()
    for _ in range(30):
        mlp.learn(FinishedAgent("kind", "t", [FinishedTask(40, 10, 0, 7)]))
    assert mlp.arrive(content(BRIEF), NEW).task.decode_tokens == pytest.approx(7, rel=0.1)


def test_too_few_and_absurd_samples_teach_nothing() -> None:
    mlp = PaperMlp()
    mlp.fit([*samples(FEWEST_SAMPLES - 1), *[Sample("kind", "x", cost, 1.0) for cost in (0.0, math.inf, math.nan)]])
    assert mlp.arrive(content(BRIEF), NEW).agent.source == "ladder"


@pytest.mark.usefixtures("fitted")
def test_texts_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = PaperMlp()
    mlp.fit([Sample(None, "", 1e4, 20.0)] * 20)
    arrival = mlp.arrive(TaskContent(0, text=b"\xff\xfe"), AgentProgress(None, "t"))
    assert arrival.agent.cost == pytest.approx(1e4, rel=0.1)


def test_what_is_missing_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MlpUnavailable, match="needs torch and scikit-learn"):
        PaperMlp().fit(samples())
