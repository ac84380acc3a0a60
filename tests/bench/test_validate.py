"""The comparison's arithmetic, on runs that are made up. No engine, and no replay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from engine.link import Holding, Report
from engine.profile import StepProfile
from gateway.bench import report, validate
from gateway.bench.client import ReplayResult, TaskResult
from gateway.bench.fit import Heard
from gateway.replay import results
from gateway.trace import AgentTrace, TaskTrace

AGENTS = [AgentTrace(f"a{i}", float(i), (TaskTrace("t", 10, i + 1),), "kind") for i in range(10)]


def live(jcts: list[float], failed: int | None = None) -> report.Run:
    tasks = [
        TaskResult(f"a{i}", "t", float(i), i + jct, None, 10, 0, i + 1, error="oops" if i == failed else None)
        for i, jct in enumerate(jcts)
    ]
    engine = report.EngineFigures(preemptions=3, iterations=400, mean_kv_usage=0.9, mean_running=12, waiting_share=0.5)
    return report.summarise("p", AGENTS, ReplayResult(tasks, 60.0), engine=engine)


def replayed(jcts: list[float]) -> results.Run:
    agents = [
        results.AgentResult(f"a{i}", "kind", "", float(i), i + jct, jct, 0.0, 0.0, 1.0, 1.0, 1, 0, 0)
        for i, jct in enumerate(jcts)
    ]
    numbers = dict.fromkeys(results.Summary.__struct_fields__, 0) | {
        "makespan_s": 19.0,
        "iterations": 390,
        "preemptions": 2,
        "mean_kv_usage": 0.8,
        "bound_terms": {},
    }
    return results.Run("p", "ladder", "memory", msgspec.convert(numbers, results.Summary), agents)


def one(run: report.Run, other_cores: float = 0.0) -> validate.Live:
    return validate.Live(run, 0.0, 60.0, other_cores)


def compared(policy: str, live_s: float, replayed_s: float, paced_s: float | None = None) -> validate.PolicyCompared:
    paced = replayed([replayed_s if paced_s is None else paced_s] * 10)
    return validate.compare(policy, [one(live([live_s] * 10))], [1.0], replayed([replayed_s] * 10), [paced])


def test_means_ratios_and_spread_by_hand() -> None:
    runs = [one(live([1.0] * 5 + [3.0] * 5), 0.05), one(live([1.5] * 5 + [3.0] * 5), 0.1)]
    paced = [replayed([0.9] * 5 + [3.3] * 5), replayed([1.1] * 5 + [3.3] * 5)]
    made = validate.compare("p", runs, [0.9, 1.1], replayed([1.0] * 5 + [3.1] * 5), paced)
    assert (made.live_mean_s, made.replayed_mean_s, made.paced_mean_s) == pytest.approx((2.125, 2.05, 2.15))
    assert made.ratio == pytest.approx(2.05 / 2.125)
    assert made.paced_ratio == pytest.approx(2.15 / 2.125)
    assert made.spread == pytest.approx((2.25 - 2.0) / 2.125)
    # At their pace five agents are 1.25 times too fast, five 1.1 times too slow: the median lies between.
    assert made.agent_error == pytest.approx((1.25 + 1.1) / 2 - 1)
    assert [(run.mean_jct_s, run.pace, run.other_cores) for run in made.live] == [(2.0, 0.9, 0.05), (2.25, 1.1, 0.1)]
    assert [run.paced_mean_jct_s for run in made.live] == pytest.approx([2.1, 2.2])
    assert (made.live[0].iterations, made.replayed_iterations) == (400, 390)
    assert made.agents[0] == validate.AgentCompared("a0", "kind", "small", [1.0, 1.5], 1.0, [0.9, 1.1])


def test_what_did_not_complete_is_not_compared() -> None:
    good, ten = one(live([1.0] * 10)), replayed([1.0] * 10)
    with pytest.raises(ValueError, match="a3 did not complete"):
        validate.compare("p", [good, one(live([1.0] * 10, failed=3))], [1.0, 1.0], ten, [ten, ten])
    with pytest.raises(ValueError, match="a9 did not complete"):
        validate.compare("p", [good], [1.0], ten, [replayed([1.0] * 9)])
    with pytest.raises(ValueError, match="no live run"):
        validate.compare("p", [], [], ten, [])


PROFILE = StepProfile("p", "by hand", 0.004, 1e-5, 1e-4, 0.0, 127, 32, 64, 2048)


def test_the_pace_is_what_iterations_took_over_what_the_profile_says() -> None:
    def heard(at_s: float, iteration: int) -> Heard:
        return Heard(at_s, Report("e", iteration, 100, 1, 0, 0, {1: Holding(100 + iteration, 1 + iteration)}))

    # One decode each: 4.1 ms by the profile. The third report was lost, and nothing is told of the time around it.
    reports = [heard(1.0, 0), heard(1.0041, 1), heard(1.0041 + 0.0082, 2), heard(1.5, 4)]
    assert validate.pace(reports, PROFILE) == pytest.approx(1.5)
    assert math.isnan(validate.pace([], PROFILE))
    assert validate.at_pace(PROFILE, 1.5).step_s(100, 10, 900) == pytest.approx(1.5 * PROFILE.step_s(100, 10, 900))


def test_latency_is_a_pause_before_each_task() -> None:
    agent = AgentTrace("a", 1.0, (TaskTrace("t", 10, 4), TaskTrace("u", 20, 2, ("t",), 0.5)))
    (later,) = validate.with_latency([agent], 0.04)
    assert [task.think_s for task in later.tasks] == [0.04, 0.54]
    assert (later.arrival_s, later.cost) == (agent.arrival_s, agent.cost)


def test_an_equal_order_within_the_tolerance() -> None:
    verdict = validate.judge([compared("slow", 9.0, 8.0), compared("fast", 2.0, 2.2)])
    assert verdict.live_order == verdict.replayed_order == ["fast", "slow"]
    assert (verdict.same_order, verdict.within_tolerance, verdict.swapped) == (True, True, {})
    assert verdict.worst_ratio == pytest.approx(8 / 9)


def test_another_order_says_how_close_the_two_were() -> None:
    verdict = validate.judge([compared("a", 2.0, 2.2), compared("b", 2.1, 2.0), compared("c", 8.0, 10.0)])
    assert (verdict.live_order, verdict.replayed_order) == (["a", "b", "c"], ["b", "a", "c"])
    assert not verdict.same_order
    assert verdict.swapped == {"a / b": pytest.approx(0.05)}
    assert not verdict.within_tolerance  # c
    assert verdict.worst_ratio == pytest.approx(1.25)


def test_both_speeds_are_judged() -> None:
    verdict = validate.judge([compared("a", 2.0, 3.0, 2.2), compared("b", 8.0, 9.0, 7.6)])
    assert (verdict.worst_ratio, verdict.worst_paced_ratio) == pytest.approx((1.5, 1.1))
    assert (verdict.within_tolerance, verdict.paced_within_tolerance) == (False, True)
    assert verdict.paced_order == ["a", "b"]


def test_json_table_and_picture(tmp_path: Path) -> None:
    both = [compared("justitia", 2.0, 2.2), compared("fcfs", 9.0, 9.5)]
    validate.write(tmp_path / "new" / "out.json", {"benchmark": "validation"}, {"name": "demo:1"}, both)
    document = json.loads((tmp_path / "new" / "out.json").read_text())
    assert document["verdict"]["same_order"] is True
    assert [policy["policy"] for policy in document["policies"]] == ["justitia", "fcfs"]
    assert document["policies"][0]["agents"][0]["class"] == "kind"
    assert validate.table(both).row_count == 2
    validate.draw(both, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
