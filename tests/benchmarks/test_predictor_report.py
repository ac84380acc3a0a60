"""The page on the predictor follows from its runs, whatever they say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("vllm")  # the studies replay

from gateway.replay.evaluation import Evaluation
from gateway.replay.predictors import content_of
from gateway.replay.traces import texts
from predictor.evaluate import ClassQuality, Quality
from predictor.types import AgentProgress
from tests.benchmarks.predictor_costs import Costs
from tests.benchmarks.predictor_report import Report, page, pictures
from tests.benchmarks.predictor_studies import LIARS, Job, Oracle, Row, _with_liars, jobs

pytestmark = pytest.mark.vllm


def evaluation(job: Job, error: float) -> Evaluation:
    of_class = ClassQuality(30, error, 1.2 * error, 0.6, 0.9)
    quality = Quality(60, error, 1.2 * error, 0.8, 0.6, 0.9, {"a": of_class, "b": of_class})
    return Evaluation(job.predictor, job.without, quality, quality, quality, quality)


@pytest.fixture
def report() -> Report:
    rows = [
        Row(job, evaluation(job, 0.25 + 0.01 * job.seed))
        if job.study == "accuracy"
        else Row(job, None, 40.0 if job.predictor == "exact" else 44.0 + job.seed, 100, (10.0, 20.0))
        for job in jobs()
    ]
    return Report({}, Costs(arrive_ms_p50=0.31, arrive_ms_p99=0.72, train_s=200, train_gib=1.7), rows)


def test_the_page_has_means_and_ranges_of_the_seeds(report: Report) -> None:
    made = page(msgspec.json.decode(msgspec.json.encode(report), type=Report))
    assert "**27 % (25 % to 29 %)**" in made
    assert "| xgboost | 46.0 | +15.0 % (+10.0 % to +20.0 %) | 100 |" in made
    assert "of their tenant | a tenth of it | 10.0 s (+0.0 %) | 20.0 s (+0.0 %) | 46.0 |" in made
    assert "0.31 ms, 0.72 ms" in made
    assert "$" not in made


def test_the_pictures(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"predictor-classes.png", "predictor-jct.png"}


def test_the_oracle_knows_what_is_implied_and_sees_what_has_arrived() -> None:
    agents, implied = texts(3, agents=30), texts(3, agents=30, noise=0.0)
    oracle = Oracle(implied)
    for agent, without_noise in zip(agents, implied, strict=True):
        content = content_of(agent, agent.tasks[0])
        arrived = oracle.arrive(content, AgentProgress(None, "t"))
        assert arrived.task.decode_tokens == without_noise.tasks[0].output_tokens
        assert arrived.agent.cost >= without_noise.cost
        late = oracle.arrive(content, AgentProgress(None, "t", 9, 9, 1e12))
        assert late.agent.cost == 1e12 + late.task.cost


@pytest.mark.parametrize(("hints", "factor"), [("true", 1.0), ("few", 0.1), ("many", 10.0)])
def test_liars_lie_and_the_others_say_what_they_did(hints: str, factor: float) -> None:
    honest = texts(3, agents=30)
    told = _with_liars(honest, hints, LIARS, "liar")  # type: ignore[arg-type]
    for place, (agent, before) in enumerate(zip(told, honest, strict=True)):
        if place % LIARS == 0:
            assert (agent.tenant, agent.expected_tasks) == ("liar", max(1, round(factor * len(agent.tasks))))
        else:
            assert agent == before
