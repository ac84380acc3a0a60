"""The comparison's arithmetic, on runs that are made up. No engine, and no replay."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from engine.lab.profile import StepProfile
from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.demo import report
from gateway.demo.client import ReplayResult, TaskResult
from gateway.replay import results
from tests.benchmarks import validate
from tests.benchmarks.fit import Iteration

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


def steady(jcts: list[float]) -> dict[str, float]:
    return {f"a{i}": jct for i, jct in enumerate(jcts)}


def compared(
    policy: str, live_s: float, replayed_s: float, steady_s: tuple[float, float] | None = None
) -> validate.PolicyCompared:
    steady_live_s, steady_replayed_s = steady_s or (live_s, replayed_s)
    return validate.compare(
        policy,
        [one(live([live_s] * 10))],
        replayed([replayed_s] * 10),
        [1.0],
        [steady([steady_live_s] * 10)],
        [replayed([steady_replayed_s] * 10)],
    )


def test_means_ratios_and_spread_by_hand() -> None:
    runs = [one(live([1.0] * 5 + [3.0] * 5), 0.05), one(live([1.5] * 5 + [3.0] * 5), 0.1)]
    steady_live = [steady([1.2] * 5 + [3.0] * 5), steady([1.3] * 5 + [3.0] * 5)]
    steady_replayed = [replayed([0.9] * 5 + [3.3] * 5), replayed([1.1] * 5 + [3.3] * 5)]
    made = validate.compare("p", runs, replayed([1.0] * 5 + [3.1] * 5), [0.9, 1.1], steady_live, steady_replayed)
    assert (made.live_mean_s, made.replayed_mean_s) == pytest.approx((2.125, 2.05))
    assert (made.ratio, made.spread) == pytest.approx((2.05 / 2.125, 0.25 / 2.125))
    assert (made.steady_live_mean_s, made.steady_replayed_mean_s) == pytest.approx((2.125, 2.15))
    assert (made.steady_ratio, made.steady_spread) == pytest.approx((2.15 / 2.125, 0.05 / 2.125))
    # On the steady clock five agents are 1.25 times too fast, five 1.1 times too slow: the median lies between.
    assert made.agent_error == pytest.approx((1.25 + 1.1) / 2 - 1)
    assert [(run.mean_jct_s, run.pace, run.other_cores) for run in made.live] == [(2.0, 0.9, 0.05), (2.25, 1.1, 0.1)]
    assert [run.steady_replayed_mean_jct_s for run in made.live] == pytest.approx([2.1, 2.2])
    assert (made.live[0].iterations, made.replayed_iterations) == (400, 390)
    first = validate.AgentCompared("a0", "kind", "small", 1.0, [1.0, 1.5], [1.2, 1.3], [0.9, 1.1])
    assert made.agents[0] == first


def test_what_did_not_complete_is_not_compared() -> None:
    good, ten, times = one(live([1.0] * 10)), replayed([1.0] * 10), steady([1.0] * 10)
    failed = one(live([1.0] * 10, failed=3))
    with pytest.raises(ValueError, match="a3 did not complete"):
        validate.compare("p", [good, failed], ten, [1.0, 1.0], [times, times], [ten, ten])
    with pytest.raises(ValueError, match="a9 did not complete"):
        validate.compare("p", [good], ten, [1.0], [times], [replayed([1.0] * 9)])
    with pytest.raises(ValueError, match="no live run"):
        validate.compare("p", [], ten, [], [], [])


PROFILE = StepProfile("p", "by hand", 0.004, 0.0, 1e-3, 0.0, 127, 32, 64, 2048)  # 5 ms with one decode
# From 10.000 to 10.010 in one iteration, then nothing until 10.050, then one until 10.060: twice what the profile says.
TOLD = [Iteration(10.010, 0.010, 0, 1, 100), Iteration(10.060, 0.010, 0, 1, 101)]


def test_on_the_steady_clock_iterations_take_what_the_profile_says() -> None:
    clock = validate.SteadyClock(TOLD, PROFILE)
    assert clock.pace == pytest.approx(2)
    times = {
        9.0: -1.0,
        10.0: 0.0,
        10.004: 0.002,
        10.010: 0.005,
        10.030: 0.025,
        10.050: 0.045,
        10.060: 0.050,
        11.06: 1.05,
    }
    assert {time: clock.at(time) for time in times} == pytest.approx(times)
    with pytest.raises(ValueError, match="no iteration"):
        validate.SteadyClock([], PROFILE)


def test_arrivals_and_times_on_the_steady_clock() -> None:
    agents = [AgentTrace(name, 0.0, (TaskTrace("t", 10, 2),)) for name in "ab"]
    tasks = [
        TaskResult("a", "t", 0.5, 0.510, None, 10, 0, 2),  # the first to come, when the engine begins
        TaskResult("b", "t", 0.508, 0.560, None, 10, 0, 2),
    ]
    run = report.summarise("p", agents, ReplayResult(tasks, 1.0))
    arriving, times = validate.on_steady_clock(agents, run, validate.SteadyClock(TOLD, PROFILE))
    assert [agent.arrival_s for agent in arriving] == pytest.approx([0.0, 0.004])
    assert times == pytest.approx({"a": 0.005, "b": 0.046})


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


def test_both_clocks_are_judged() -> None:
    verdict = validate.judge([compared("a", 2.0, 3.0, (2.1, 2.31)), compared("b", 8.0, 9.0, (8.0, 7.6))])
    assert (verdict.worst_ratio, verdict.worst_steady_ratio) == pytest.approx((1.5, 1.1))
    assert (verdict.within_tolerance, verdict.steady_within_tolerance) == (False, True)
    assert verdict.steady_live_order == verdict.steady_replayed_order == ["a", "b"]
    assert verdict.steady_same_order


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
