"""The demo's settings, its judgement, and what it listens to. The demo itself needs the engine."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError
from rich.console import Console

from engine.link import PROTOCOL, Hello, Report
from gateway.demo import demo, report
from gateway.demo.client import ReplayResult, TaskResult
from gateway.demo.engine_watch import EngineWatch
from gateway.demo.progress import ReplayProgress
from gateway.demo.settings import DemoSettings
from gateway.demo.workload import demo_mix

TRACE = demo_mix(7, agents=10)


def result(factor: float, error: str | None = None, tokens: int = 0) -> ReplayResult:
    """Every task takes `factor` seconds; the first one has an `error`, or so many `tokens` more than the trace says."""
    tasks = [
        TaskResult(agent.agent_id, task.id, 0.0, factor, factor / 2, task.prompt_tokens, 0, task.output_tokens)
        for agent in TRACE
        for task in agent.tasks
    ]
    first = tasks[0]
    tasks[0] = TaskResult(
        first.agent_id, first.task_id, 0.0, factor, None, 1, 0, cast(int, first.output_tokens) + tokens, error=error
    )
    return ReplayResult(tasks, factor)


def conclude(before: ReplayResult, after: ReplayResult, directory: Path, **settings: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), record=True, width=100)
    runs = [(each, report.summarise(name, TRACE, each)) for name, each in (("fcfs", before), ("justitia", after))]
    code = demo._conclude(DemoSettings(out=directory, **settings), console, TRACE, runs[0], runs[1])
    return code, console.export_text()


def test_a_run_that_meets_the_target(tmp_path: Path) -> None:
    code, said = conclude(result(4.0), result(1.0), tmp_path)
    assert code == 0
    assert "0.25" in said
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "jct.png").exists()


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (result(3.0), "the target is missed: 0.75 is above 0.5"),
        (result(1.0, error="HTTP 500: oops"), "1 × HTTP 500: oops"),
        (result(1.0, tokens=1), "1 tasks have other token counts"),
    ],
)
def test_a_run_that_fails_says_why(after: ReplayResult, why: str, tmp_path: Path) -> None:
    code, said = conclude(result(4.0), after, tmp_path)
    assert code == 1
    assert why in said


def test_the_target_is_an_option(tmp_path: Path) -> None:
    assert conclude(result(4.0), result(3.0), tmp_path, target=0.8)[0] == 0


def test_when_everything_failed_there_is_still_an_end(tmp_path: Path) -> None:
    failed = ReplayResult([TaskResult(a.agent_id, t.id, 0, 1, error="x") for a in TRACE for t in a.tasks], 1)
    code, said = conclude(failed, failed, tmp_path)
    assert code == 1
    assert "no picture" in said


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTITIA_DEMO_AGENTS", "12")
    assert DemoSettings().agents == 12


def test_the_predictor_may_not_have_seen_the_trace() -> None:
    with pytest.raises(ValidationError, match="history_seed must differ"):
        DemoSettings(seed=3, history_seed=3)


def test_both_runs_start_with_a_copy_of_what_was_learned(tmp_path: Path) -> None:
    stage = demo.Stage(DemoSettings(), cast(Any, None), tmp_path, Console())
    with sqlite3.connect(stage.state("history")) as store:
        store.execute("create table learned (agent text)")
        store.execute("insert into learned values ('a')")
    stage.copy_state("history", "fcfs", "justitia")
    for name in ("fcfs", "justitia"):
        assert sqlite3.connect(stage.state(name)).execute("select agent from learned").fetchall() == [("a",)]


def heard(*reports: Report, outstanding: int) -> EngineWatch:
    watch = EngineWatch(lambda: outstanding)
    watch.receive(Hello(PROTOCOL, "e", "0.32", 100, 32, 64, 1024))
    for each in reports:
        watch.receive(each)
    return watch


def at(iteration: int, free: int, running: int = 5, preempted: int = 0) -> Report:
    return Report(engine_id="e", iteration=iteration, free_blocks=free, running=running, waiting=0, preempted=preempted)


def test_a_watch_weighs_reports_by_iterations() -> None:
    # One iteration at 50 %, then three (two reports were dropped) at 90 %.
    watch = heard(at(10, 100, running=0), at(11, 50), at(14, 10, preempted=2), outstanding=9)
    figures = watch.figures()
    assert figures is not None
    assert figures.mean_kv_usage == pytest.approx((0.5 + 3 * 0.9) / 4)
    assert (figures.iterations, figures.preemptions, figures.waiting_share) == (4, 2, 1.0)
    assert watch.describe() == "KV cache 90%, 5 running"


def test_a_watch_counts_memory_only_while_tasks_wait() -> None:
    figures = heard(at(10, 100), at(20, 50), outstanding=5).figures()
    assert figures is not None
    assert figures.waiting_share == 0


def test_a_watch_that_heard_nothing_says_nothing() -> None:
    assert EngineWatch().figures() is None
    assert EngineWatch().describe() == ""


def test_progress_without_a_terminal_is_lines() -> None:
    console = Console(file=io.StringIO(), record=True)
    progress = ReplayProgress(console, "fcfs", TRACE)
    tasks = sum(len(agent.tasks) for agent in TRACE)
    with progress.shown():
        for each in result(1.0, error="x").tasks:
            progress.task_sent()
            progress.task_ended(each)
        for agent in TRACE:
            progress.agent_ended(agent.agent_id)
    assert f"fcfs: 10 of 10 agents, {tasks} of {tasks} tasks, 1 failed" in console.export_text()
    assert progress.outstanding == 0
