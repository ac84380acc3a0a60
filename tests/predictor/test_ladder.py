from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.ladder import ENOUGH_AGENTS, MAX_RUNGS, PRIOR_DECODE_TOKENS, REMEMBERED_AGENTS, Ladder
from predictor.types import AgentProgress, FinishedAgent, FinishedTask, TaskFeatures


def agent(agent_class: str | None, *decodes: int, tenant: str = "t", prompt: int = 10) -> FinishedAgent:
    return FinishedAgent(agent_class, tenant, [FinishedTask(4 * prompt, prompt, 0, decode) for decode in decodes])


def taught(*agents: FinishedAgent) -> Ladder:
    ladder = Ladder()
    for one in agents:
        ladder.learn(one)
    return ladder


def task(agent_class: str | None, tenant: str = "t", max_tokens: int | None = None) -> TaskFeatures:
    return TaskFeatures(agent_class, tenant, prompt_bytes=400, max_tokens=max_tokens)


def progress(agent_class: str | None, tasks: int = 1, cost: float = 1, tenant: str = "t") -> AgentProgress:
    return AgentProgress(agent_class, tenant, tasks, cost)


def test_before_anything_is_learned_there_is_a_prior_from_lengths() -> None:
    prediction = Ladder().predict_task(task("new"))
    assert prediction.prompt_tokens == 100
    assert prediction.decode_tokens == PRIOR_DECODE_TOKENS
    assert Ladder().predict_agent(progress("new", cost=77)) == 77


def test_each_rung_answers_when_the_narrower_ones_have_not_seen_enough() -> None:
    ladder = taught(
        *[agent("a", 10, tenant="t")] * ENOUGH_AGENTS,
        *[agent("a", 30, tenant="u")] * ENOUGH_AGENTS,
        *[agent("b", 90, tenant="v")] * ENOUGH_AGENTS,
    )
    decode = {
        "class and tenant": ladder.predict_task(task("a", "t")).decode_tokens,
        "class": ladder.predict_task(task("a", "v")).decode_tokens,
        "tenant": ladder.predict_task(task("new", "v")).decode_tokens,
        "everybody": ladder.predict_task(task("new", "w")).decode_tokens,
    }
    assert decode == {"class and tenant": 10, "class": 20, "tenant": 90, "everybody": pytest.approx(130 / 3)}


def test_too_few_are_not_enough() -> None:
    ladder = taught(*[agent("a", 10)] * (ENOUGH_AGENTS - 1))
    assert ladder.predict_task(task("a")).decode_tokens == PRIOR_DECODE_TOKENS


def test_the_clients_limit_bounds_the_decode_length() -> None:
    assert Ladder().predict_task(task(None, max_tokens=7)).decode_tokens == 7


def test_tokens_per_byte_are_learned() -> None:
    ladder = taught(*[FinishedAgent("a", "t", [FinishedTask(100, 50, 0, 1)])] * ENOUGH_AGENTS)
    assert ladder.predict_task(task("a")).prompt_tokens == 200


def test_the_total_is_the_mean_of_its_kind() -> None:
    small, large = agent("a", 4), agent("a", 4, 4, 4, 4)
    ladder = taught(small, small, large, large)
    assert ladder.predict_agent(progress("a")) == (small.cost + large.cost) / 2


def test_the_total_grows_with_the_agent() -> None:
    small, large = agent("a", 4), agent("a", 4, 4, 4, 4)
    ladder = taught(small, small, small, large)
    assert ladder.predict_agent(progress("a", tasks=2, cost=10)) == large.cost, "a small one has one task only"
    assert ladder.predict_agent(progress("a", tasks=1, cost=small.cost + 1)) == large.cost
    assert ladder.predict_agent(progress("a", tasks=4, cost=1000)) == 1500, (
        "past all of its kind: what came, and half of it"
    )


def test_only_the_last_agents_are_remembered() -> None:
    ladder = taught(*[agent("a", 10)] * REMEMBERED_AGENTS, *[agent("a", 50)] * REMEMBERED_AGENTS)
    assert ladder.predict_task(task("a")).decode_tokens == 50
    assert ladder.predict_agent(progress("a")) == agent("a", 50).cost


def test_words_of_clients_do_not_fill_the_memory() -> None:
    ladder = taught(*[agent("kept", 10)] * ENOUGH_AGENTS)
    for number in range(MAX_RUNGS):
        ladder.learn(agent(f"class-{number}", 1))
        if number % 100 == 0:
            ladder.learn(agent("kept", 10))
    assert len(ladder._memories) == MAX_RUNGS
    assert ladder.predict_task(task("kept")).decode_tokens == 10


def test_an_agent_without_tasks_teaches_nothing() -> None:
    assert taught(FinishedAgent("a", "t", []))._memories == {}


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.lists(st.integers(0, 10**6), min_size=1, max_size=4)),
        max_size=8,
    ),
    st.sampled_from(["a", "c", None]),
    st.integers(0, 10**9),
    st.floats(0, 1e15),
)
def test_never_a_nan_and_never_less_than_what_has_arrived(
    taught_with: list[tuple[str | None, list[int]]], agent_class: str | None, prompt_bytes: int, cost: float
) -> None:
    ladder = taught(*[agent(known, *decodes) for known, decodes in taught_with])
    prediction = ladder.predict_task(TaskFeatures(agent_class, "t", prompt_bytes))
    assert math.isfinite(prediction.cost)
    assert prediction.decode_tokens >= 1
    assert ladder.predict_agent(progress(agent_class, cost=cost)) >= cost
