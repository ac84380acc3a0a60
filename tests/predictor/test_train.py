"""Training, and who takes over."""

from __future__ import annotations

import math
from statistics import median

import msgspec
import numpy as np
import pytest

from predictor.evaluate import Quality
from predictor.ladder import LAST_AGENTS, REMEMBERED_AGENTS, Ladder
from predictor.learned import Learned
from predictor.model import Boosted, Settings
from predictor.train import FEWEST_AGENTS, TooFewAgents, Trained, _ninth_decile, _verdict, train
from predictor.types import AgentProgress, FinishedAgent, TaskContent
from tests.predictor.made import Gateway, replaced_rows

FAST = Settings(rounds=40, depth=3, learning_rate=0.3, columns_share=1.0)


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    return Gateway(seed=5)


@pytest.fixture(scope="module")
def past(gateway: Gateway) -> list[FinishedAgent]:
    return gateway.serve(240)


@pytest.fixture(scope="module")
def trained(past: list[FinishedAgent]) -> Trained:
    return train(past, settings=FAST, nthread=1)


def median_factor(gateway: Gateway, agent_class: str, model: Boosted | None) -> float:
    """Of what is said at the first task to what comes."""
    serving = Gateway(gateway.predictor, gateway.scale, seed=99)
    serving.predictor.model = model
    arrivals = [serving.first(*drawn) for drawn in serving.draw(40, agent_class)]
    serving.predictor.model = None
    return median(arrival.agent.cost / cost for arrival, cost in arrivals)


def test_what_the_text_says_is_learned(trained: Trained) -> None:
    report = trained.report
    assert report.agents == 240 and report.held_out == 48 and report.left_out == 0
    assert report.challenger.tau is not None and report.challenger.tau > 0.8
    assert report.ladder.tau is not None and report.ladder.tau < 0.3, "all classes are alike to it"
    assert report.challenger.median_error < 0.3 < report.ladder.median_error
    assert report.promote and "of the ladder" in report.reason
    assert report.champion is None


def test_a_winner_learns_once_more_from_all(trained: Trained, past: list[FinishedAgent]) -> None:
    assert trained.model.told.agents == 240
    assert trained.model.told.rows == sum(len(agent.tasks) for agent in past)
    assert trained.model.told.metrics["tau"] == trained.report.challenger.tau


def test_nine_of_ten_new_agents_cost_at_most_the_p90(gateway: Gateway, trained: Trained) -> None:
    serving = Gateway(Learned(trained.model), seed=7)
    serving.predictor.ladder = gateway.predictor.ladder
    arrivals = [serving.first(*drawn) for drawn in serving.draw(300)]
    covered = sum(cost <= arrival.agent.p90 for arrival, cost in arrivals) / len(arrivals)
    assert 0.84 < covered < 0.96, "four standard errors of 0.9 are 0.07"
    assert all(arrival.agent.source == "xgboost" for arrival, _ in arrivals)


def test_decode_lengths_add_up(gateway: Gateway, trained: Trained) -> None:
    serving = Gateway(Learned(trained.model), seed=8)
    serving.predictor.ladder = gateway.predictor.ladder
    said = [serving.first("a", 1, depth)[0].task.decode_tokens for depth in (0, 1, 2)]
    assert said == pytest.approx([20, 60, 180], rel=0.3)


def test_the_same_seed_makes_the_same_model(past: list[FinishedAgent], trained: Trained) -> None:
    again = train(past, settings=FAST, nthread=1)
    assert again.model.encoded() == trained.model.encoded()
    assert again.report == trained.report
    other = train(past, settings=FAST, seed=1, nthread=1)
    assert other.model.encoded() != trained.model.encoded()


def test_a_champion_that_orders_better_stays(past: list[FinishedAgent], trained: Trained) -> None:
    dull = Settings(rounds=1, depth=1, learning_rate=0.01)
    kept = train(past, trained.model, settings=dull, nthread=1)
    assert not kept.report.promote and "of xgboost" in kept.report.reason
    assert kept.report.champion is not None
    assert kept.model.told.agents == 240 - kept.report.held_out, "it has not learned from all"
    beaten = train(past, kept.model, settings=FAST, nthread=1)
    assert beaten.report.promote
    assert beaten.report.champion == kept.report.challenger


def test_judged_is_on_agents_that_the_champion_has_not_seen(past: list[FinishedAgent], trained: Trained) -> None:
    assert train(past, trained.model, unseen=20, settings=FAST, nthread=1).report.held_out == 20
    with pytest.raises(TooFewAgents, match="5 new agents to judge by; 12 are needed"):
        train(past, trained.model, unseen=5, settings=FAST, nthread=1)
    without_rows = replaced_rows(past[:8], lambda row: b"")
    with pytest.raises(TooFewAgents, match="7 new agents to judge by"):
        train([*past, *without_rows], trained.model, unseen=15, settings=FAST, nthread=1)


def test_too_few_agents(past: list[FinishedAgent]) -> None:
    with pytest.raises(TooFewAgents, match=f"59 agents with rows of this version; {FEWEST_AGENTS} are needed"):
        train(past[:59], settings=FAST)
    of_another_version = [msgspec.structs.replace(agent, schema="0-other") for agent in past]
    with pytest.raises(TooFewAgents, match="0 agents"):
        train(of_another_version, settings=FAST)


def quality_of(tau: float | None, error: float) -> Quality:
    return Quality(10, error, error, tau, None, None, {})


@pytest.mark.parametrize(
    ("ours", "theirs", "promote"),
    [
        ((0.8, 0.9), (0.7, 0.1), True),
        ((0.7, 0.1), (0.8, 0.9), False),
        ((0.7, 0.1), (0.7, 0.2), True),
        ((0.7, 0.2), (0.7, 0.2), False),
        ((None, 0.1), (0.1, 0.2), False),
    ],
)
def test_order_first_then_error(
    ours: tuple[float | None, float], theirs: tuple[float | None, float], promote: bool
) -> None:
    assert _verdict(quality_of(*ours), quality_of(*theirs), "the champion")[0] is promote


def test_absurd_rows_are_survived(past: list[FinishedAgent]) -> None:
    rng = np.random.default_rng(3)

    def damaged(row: bytes) -> bytes:
        values = np.frombuffer(row, np.float32).copy()
        values[rng.random(values.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38])
        return values.tobytes()

    made = train([*past[:200], *replaced_rows(past[200:], damaged)], settings=FAST, nthread=1)
    assert math.isfinite(made.report.challenger.median_error)
    answer = made.model.predict(np.frombuffer(past[0].tasks[0].row, np.float32))
    assert all(map(math.isfinite, answer))


def test_a_class_whose_costs_jump_tenfold_is_followed() -> None:
    gateway = Gateway(seed=3)
    past = gateway.serve(240)
    gateway.scale["a"] = 10
    past += gateway.serve(60)
    after = train(past, settings=FAST, nthread=1)
    assert after.report.promote
    assert 0.5 < median_factor(gateway, "a", after.model) < 2
    assert 0.5 < median_factor(gateway, "b", after.model) < 2, "others have not changed"


def test_a_challenger_that_knows_no_more_than_the_champion_does_not_take_over(past: list[FinishedAgent]) -> None:
    champion = train(past[:200], settings=FAST, nthread=1)
    older = train(past[:200], champion.model, settings=FAST, nthread=1)
    assert not older.report.promote


def test_the_ladder_forgets_what_a_class_was() -> None:
    gateway = Gateway(seed=3)
    gateway.serve(300, "a")
    assert 0.5 < median_factor(gateway, "a", None) < 2
    gateway.scale["a"] = 10
    gateway.serve(LAST_AGENTS, "a")
    assert 0.3 < median_factor(gateway, "a", None) < 3


def test_the_ladder_forgets_nobody_while_a_class_stays_as_it_was() -> None:
    gateway = Gateway(seed=3)
    gateway.serve(900)
    ladder = gateway.predictor.ladder
    remembered = [len(own.since_change.agents) for own in ladder._own.values()]
    assert remembered == [REMEMBERED_AGENTS] * len(remembered)


def test_of_a_class_never_seen_something_is_said(gateway: Gateway, trained: Trained) -> None:
    serving = Learned(trained.model)
    serving.ladder = gateway.predictor.ladder
    for agent_class in ("never-seen", None):
        arrival = serving.arrive(TaskContent(400, text=b"There are 3 files. Answer."), AgentProgress(agent_class, "u"))
        assert arrival.agent.source == "xgboost"
        assert math.isfinite(arrival.agent.p90) and arrival.agent.p90 >= arrival.agent.cost > 0
    alone = Learned(trained.model)
    assert isinstance(alone.ladder, Ladder)
    assert math.isfinite(alone.arrive(TaskContent(400), AgentProgress("x", "t")).agent.cost), (
        "a ladder that knows nothing"
    )


def test_the_ninth_decile_counts_the_one_to_come() -> None:
    values = np.arange(1.0, 20.0)
    assert _ninth_decile(values, np.ones(19)) == 18, "18 of 20"
    assert _ninth_decile(values[:3], np.ones(3)) == 3
    assert _ninth_decile(-values, np.ones(19)) == 0, "never below the median"
    assert _ninth_decile(np.array([1.0, 2.0]), np.array([1.0, 0.01])) == 2
