"""`justitia predictor evaluate`: which agents are predicted, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gateway.agent_trace import AgentTrace, TaskTrace, write_trace
from gateway.cli.predictor import run_predictor
from gateway.replay.evaluation import past_and_held_out


def written(path: Path, count: int) -> str:
    tasks = (TaskTrace("t", 30, 20),)
    write_trace([AgentTrace(f"a{number}", float(number), tasks, "kind") for number in range(count)], path)
    return str(path)


def test_of_a_file_the_newest_are_predicted_by_those_before(tmp_path: Path) -> None:
    past, agents = past_and_held_out(written(tmp_path / "ten", 10))
    assert [agent.agent_id for agent in past] == [f"a{number}" for number in range(7)]
    assert [agent.agent_id for agent in agents] == ["a7", "a8", "a9"]


def test_results_are_written(tmp_path: Path) -> None:
    out = tmp_path / "results"
    arguments = ["evaluate", written(tmp_path / "ten", 10), "--predictor", "ladder", "--out", str(out)]
    assert run_predictor(arguments) == 0
    (run,) = msgspec.json.decode(out.read_bytes())["runs"]
    assert run["first"]["agents"] == 3
    assert run["first"]["median_error"] == pytest.approx(0, abs=0.01), "they are all alike"


def test_what_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predictor(["evaluate", written(tmp_path / "one", 1), "--predictor", "ladder"]) == 2
    assert "one agent is too few" in capsys.readouterr().err
    nowhere = str(tmp_path / "nowhere" / "out")
    assert run_predictor(["evaluate", written(tmp_path / "two", 2), "--predictor", "ladder", "--out", nowhere]) == 1
    assert "No such file" in capsys.readouterr().err
