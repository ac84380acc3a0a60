"""What a replayed gateway believes: the truth, the truth with noise, and what the ladder has learned."""

from __future__ import annotations

import math
from statistics import fmean, median, stdev

import msgspec
import pytest

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.replay.predictors import (
    Believed,
    Exact,
    Noise,
    Serving,
    UnknownPredictor,
    beliefs,
    compute_cost,
    content_of,
    finished_task,
    taught,
    waves,
)
from predictor.cost import task_cost
from predictor.features import is_kept
from predictor.learned import Learned
from predictor.types import AgentProgress, Arrival, FinishedAgent, TaskPrediction


def agent(name: str, *lengths: tuple[int, int], kind: str = "") -> AgentTrace:
    tasks = tuple(TaskTrace(str(i), prompt, output) for i, (prompt, output) in enumerate(lengths))
    return AgentTrace(name, 0.0, tasks, agent_class=kind)


def arrive(believed: Believed, one: AgentTrace, place: int = 0) -> Arrival:
    """A task of the agent arrives before anything else is known."""
    arrival = believed.arrive(content_of(one, one.tasks[place]), AgentProgress(one.agent_class or None, one.tenant))
    assert arrival is not None
    return arrival


def decode_tokens(believed: Believed, one: AgentTrace, place: int = 0) -> float:
    return arrive(believed, one, place).task.decode_tokens


def total(believed: Believed, one: AgentTrace) -> float:
    return arrive(believed, one).agent.cost


MANY = [agent(f"a{i}", (100, 50), (200, 80)) for i in range(1000)]


def test_exact_knows_all_lengths_and_costs() -> None:
    one = agent("a", (100, 50), (200, 80))
    exact = Exact()
    arrival = arrive(exact, one, 1)
    assert arrival.task == TaskPrediction(200, 80)
    assert arrival.agent.cost == arrival.agent.p90 == total(exact, one) == one.cost
    assert exact.predict_agent(AgentProgress(None, "t", 2, 0, 1e9)) is None, "what was predicted stands"
    assert total(Exact(compute_cost), one) == 100 + 50 + 200 + 80


def test_the_cost_of_computing_counts_tokens_and_none_that_was_cached() -> None:
    assert compute_cost(100, 20) == 120
    assert compute_cost(100, 20, 64) == 56
    assert task_cost(100, 20, 64) == 36 * 20 + 210


def test_noise_of_no_size_is_exact() -> None:
    noise, exact = Noise(0.0, 3), Exact()
    for one in MANY[:20]:
        for place in range(len(one.tasks)):
            noisy, true = arrive(noise, one, place), arrive(exact, one, place)
            assert (noisy.task, noisy.agent) == (true.task, true.agent)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_noise_is_log_normal_of_median_one(sigma: float) -> None:
    noise = Noise(sigma, 0)
    totals = [math.log(total(noise, one) / one.cost) for one in MANY]
    lengths = [
        math.log(decode_tokens(noise, one, place) / task.output_tokens)
        for one in MANY
        for place, task in enumerate(one.tasks)
    ]
    for logarithms in (totals, lengths):
        assert abs(median(logarithms)) < 0.1 * sigma
        assert stdev(logarithms) == pytest.approx(sigma, rel=0.1)


def test_noise_follows_from_its_seed_and_prompts_are_known() -> None:
    one = MANY[0]
    first, same, other = (Noise(0.5, seed) for seed in (1, 1, 2))
    assert arrive(first, one).task == arrive(same, one).task != arrive(other, one).task
    assert arrive(first, one).agent == arrive(same, one, 1).agent != arrive(other, one).agent
    assert arrive(first, one).task.prompt_tokens == 100
    short = agent("short", (5, 1))
    assert all(decode_tokens(Noise(3.0, seed), short) >= 1 for seed in range(50))


def test_the_ladder_predicts_what_is_usual_in_a_class() -> None:
    small = [agent(f"s{i}", (40, 10 + i % 5), kind="small") for i in range(60)]
    large = [agent(f"l{i}", (400, 100 + i % 5), (400, 300), kind="large") for i in range(60)]
    ladder = beliefs("ladder", past=[*small, *large])
    for past in (small, large):
        new = AgentTrace("new", 0.0, past[0].tasks, agent_class=past[0].agent_class)
        arrived = arrive(ladder, new)
        assert arrived.task.prompt_tokens == pytest.approx(new.tasks[0].prompt_tokens)
        usual = fmean(task.output_tokens for one in past for task in one.tasks)
        assert arrived.task.decode_tokens == pytest.approx(usual, rel=0.1)
        assert arrived.agent.cost == pytest.approx(fmean(one.cost for one in past), rel=0.1)


def test_a_predictor_learns_from_those_that_finish_net_of_what_was_cached() -> None:
    serving = Serving(Learned())
    for i in range(60):
        one = agent(f"a{i}", (64, 20), kind="k")
        arrive(serving, one)
        tasks = [msgspec.structs.replace(finished_task(task), cached_tokens=48) for task in one.tasks]
        serving.learn(FinishedAgent("k", "", tasks))
    asking = agent("new", (64, 20), kind="k")
    arrived = arrive(serving, asking)
    assert arrived.task.decode_tokens == pytest.approx(20, rel=0.05)
    assert arrived.task.prompt_tokens == 64
    assert serving.predict_agent(AgentProgress("k", "", 1, 0, 1.0)).cost == pytest.approx(
        task_cost(64, 20, 48), rel=0.05
    )


def test_what_it_has_served_is_kept_with_the_rows_of_each_arrival_in_order() -> None:
    serving = Serving(Learned())
    one = agent("a", *[(10 * i + 10, 5) for i in range(12)])
    taught([one], serving)
    tasks = serving.finished[0].tasks
    assert [task.prompt_tokens for task in tasks] == [task.prompt_tokens for task in one.tasks]
    assert [bool(task.row) for task in tasks] == [is_kept(number) for number in range(1, 13)]


def test_tasks_come_in_waves() -> None:
    tasks = (
        TaskTrace("r", 1, 1, after=("b", "a")),
        TaskTrace("a", 1, 1),
        TaskTrace("b", 1, 1, after=("a",)),
        TaskTrace("c", 1, 1),
    )
    assert [[task.id for task in wave] for wave in waves(AgentTrace("x", 0.0, tasks))] == [["a", "c"], ["b"], ["r"]]


def test_a_prompt_in_the_trace_is_measured_and_else_taken_for_english() -> None:
    written = TaskTrace("t", 10, 5, prompt="grüße")
    assert finished_task(written).prompt_bytes == 7
    assert finished_task(TaskTrace("t", 10, 5)).prompt_bytes == 40


def test_predictors_by_name() -> None:
    past = [agent(f"a{i}", (64, 20), kind="k") for i in range(3)]
    assert isinstance(beliefs("exact"), Exact)
    new = agent("b", (64, 20), kind="k")
    assert decode_tokens(beliefs("ladder", past=past * 20), new) == pytest.approx(20, rel=0.1)
    noisy = beliefs("noise:0.5", seed=7, cost=compute_cost)
    assert total(noisy, past[0]) == total(Noise(0.5, 7, compute_cost), past[0])
    assert total(beliefs("noise:0"), past[0]) == past[0].cost


@pytest.mark.parametrize(
    "name", ["", "XGBoost", "Exact", "exact:1", "noise", "noise:", "noise:x", "noise:-1", "noise:nan", "noise:inf"]
)
def test_what_is_no_predictor_is_refused_in_words(name: str) -> None:
    with pytest.raises(UnknownPredictor, match="exact, xgboost, mlp, ladder, or noise:SIGMA"):
        beliefs(name)


def test_the_ladder_knows_one_cost_only() -> None:
    with pytest.raises(UnknownPredictor, match="memory-centric"):
        beliefs("ladder", cost=compute_cost)
