"""Figures by hand, and a picture that is there."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path

import pytest
from rich.console import Console

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.demo import picture, report
from gateway.demo.client import ReplayResult, TaskResult
from gateway.replay.figures import mean, percentile

# Ten agents of one task: 6 small, 3 medium, 1 large.
AGENTS = [AgentTrace(f"a{i}", float(i), (TaskTrace("t", 10, i + 1),), "kind") for i in range(10)]


def result(jcts: list[float], failed: int | None = None) -> ReplayResult:
    """Agent i arrives at i and takes `jcts[i]` seconds."""
    tasks = [
        TaskResult(
            f"a{i}", "t", float(i), i + jct, i + 0.5, 10, 0, i + 1, error="HTTP 500: oops" if i == failed else None
        )
        for i, jct in enumerate(jcts)
    ]
    return ReplayResult(tasks, 60.0)


def test_percentiles_by_hand() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 0.5) == 2.5
    assert percentile(values, 0.9) == pytest.approx(3.7)
    assert percentile(values, 1) == 4
    assert percentile([5.0], 0.99) == 5
    assert math.isnan(percentile([], 0.5))
    assert math.isnan(mean([]))


def test_summary_by_hand() -> None:
    engine = report.EngineFigures(preemptions=3, iterations=400, mean_kv_usage=0.9, mean_running=12, waiting_share=0.5)
    run = report.summarise("fcfs", AGENTS, result([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]), "ladder", engine)
    summary = run.summary
    assert (summary.agents, summary.tasks, summary.failed_tasks) == (10, 10, 0)
    assert (summary.mean_jct_s, summary.p50_jct_s, summary.max_jct_s) == (5.5, 5.5, 10)
    assert summary.p90_jct_s == pytest.approx(9.1)
    assert summary.p99_jct_s == pytest.approx(9.91)
    assert summary.makespan_s == 19  # the last arrives at 9 and takes 10
    assert (summary.prompt_tokens, summary.output_tokens) == (100, 55)
    assert summary.mean_first_token_s == 0.5
    assert (summary.preemptions, summary.iterations) == (3, 400)
    last = run.agents[9]
    assert (last.size, last.arrival_s, last.finish_s, last.jct_s) == ("large", 9, 19, 10)
    assert last.cost == 10 * 10 + 10 * 11 / 2


def test_an_agent_ends_with_its_last_task_and_is_charged_without_what_was_cached() -> None:
    agent = AgentTrace("a", 0, (TaskTrace("t", 10, 4), TaskTrace("u", 20, 2)))
    tasks = [
        TaskResult("a", "u", 1.0, 9.0, 2.0, 20, 16, 2, queue_s=0.5),
        TaskResult("a", "t", 0.5, 3.0, 1.0, 10, 0, 4, queue_s=0.25, predicted_cost=70),
    ]
    (outcome,) = report.summarise("fcfs", [agent], ReplayResult(tasks, 9.0)).agents
    assert (outcome.arrival_s, outcome.finish_s, outcome.jct_s, outcome.queue_s) == (0.5, 9.0, 8.5, 0.75)
    assert outcome.cost == (10 * 4 + 10) + (4 * 2 + 3)


def test_sizes_are_shares_of_the_agents_by_cost() -> None:
    sizes = report.sizes(AGENTS)
    assert [sizes[f"a{i}"] for i in range(10)] == ["small"] * 6 + ["medium"] * 3 + ["large"]


def test_an_agent_with_a_failed_task_has_no_jct_and_is_counted() -> None:
    run = report.summarise("fcfs", AGENTS, result([1.0] * 9 + [100.0], failed=9))
    assert run.summary.failed_tasks == 1
    assert run.summary.mean_jct_s == 1.0
    assert run.agents[9].jct_s is None
    assert run.agents[9].failed_tasks == 1


def test_ratio_and_differing_tokens() -> None:
    slow, fast = result([4.0] * 10), result([1.0] * 10)
    runs = report.summarise("fcfs", AGENTS, slow), report.summarise("justitia", AGENTS, fast)
    assert report.ratio(runs[1], runs[0]) == 0.25
    assert report.differing_tokens(slow, fast) == []
    shorter = ReplayResult([TaskResult("a0", "t", 0, 1, 0.5, 10, 0, 99), *fast.tasks[1:]], 60.0)
    ((one, two),) = report.differing_tokens(slow, shorter)
    assert (one.output_tokens, two.output_tokens) == (1, 99)


def test_json_has_the_format_of_a_replay(tmp_path: Path) -> None:
    run = report.summarise("fcfs", AGENTS, result([1.0] * 10))
    report.write_json(tmp_path / "out.json", {"seed": 7}, {"agents": 10}, [run])
    read = json.loads((tmp_path / "out.json").read_text())
    assert read.keys() == {"config", "trace", "runs"}
    assert read["runs"][0].keys() == {"policy", "predictor", "summary", "agents"}
    assert {"mean_jct_s", "p50_jct_s", "p90_jct_s", "p99_jct_s", "max_jct_s", "makespan_s"} <= read["runs"][0][
        "summary"
    ].keys()
    assert {"agent_id", "class", "arrival_s", "finish_s", "jct_s", "cost"} <= read["runs"][0]["agents"][0].keys()


def test_the_table_has_every_size_and_the_ratio() -> None:
    runs = [report.summarise(name, AGENTS, result([jct] * 10)) for name, jct in (("fcfs", 4.0), ("justitia", 1.0))]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(runs[1], runs[0]))
    text = console.export_text()
    for word in ("small", "medium", "large", "all", "fcfs", "justitia", "4.00", "1.00", "× 0.25"):
        assert word in text


def test_the_picture_is_a_png_of_twice_900_pixels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = report.summarise("fcfs", AGENTS, result([4.0 + i for i in range(10)]))
    after = report.summarise("justitia", AGENTS, result([1.0 + i for i in range(10)], failed=3))
    path = tmp_path / "jct.png"
    picture.draw(after, before, path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24])[0] == 1800
    with pytest.raises(ValueError, match="no agent completed"):
        picture.draw(
            report.summarise("justitia", AGENTS[3:4], ReplayResult([result([1.0] * 10, 3).tasks[3]], 1)), before, path
        )
