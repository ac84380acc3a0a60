"""`justitia export`: from the store to a file or to standard output."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.agent_trace import parse_trace, read_trace
from gateway.cli.predictor import ExportSettings, run_export
from gateway.config.sources import load
from predictor.types import FinishedAgent, FinishedTask
from tests.learning.conftest import State


def agent(arrived_at: float) -> FinishedAgent:
    task = FinishedTask(40, 10, 0, 5, ended_s=1.0, prompt="Why?", max_tokens=8)
    return FinishedAgent("kind", "t", [task], arrived_at=arrived_at)


def half_written(directory: Path) -> list[Path]:
    return list(directory.glob(".*.tmp"))


async def export(*arguments: str) -> int:
    return await run_export(load(ExportSettings, list(arguments), program="justitia export"))


async def test_to_a_file_and_to_standard_output(
    state: State, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    await state.keep([agent(1e9), agent(1e9 + 60)])
    assert await export("--state", state.url, "--out", str(tmp_path / "trace.jsonl")) == 0
    assert (tmp_path / "trace.jsonl").stat().st_mode & 0o777 == 0o600
    agents = read_trace(tmp_path / "trace.jsonl")
    assert [(each.arrival_s, each.tasks[0].prompt) for each in agents] == [(0, None), (60, None)]
    assert await export("--state", state.url, "--text") == 0
    told = capfdbinary.readouterr()
    assert [each.tasks[0].prompt for each in parse_trace(told.out.splitlines())] == ["Why?", "Why?"]
    assert b"2 agents, 2 tasks" in told.err
    assert not half_written(tmp_path)


@pytest.mark.parametrize(
    ("since", "count"),
    [("2001-09-09", 2), ("2001-09-09T01:47:00Z", 1), ("2001-09-09T03:47:00+02:00", 1), ("1000000060", 1)],
)
async def test_since(state: State, tmp_path: Path, since: str, count: int) -> None:
    await state.keep([agent(1e9), agent(1e9 + 60)])  # 2001-09-09, 01:46:40 and 01:47:40
    assert await export("--state", state.url, "--since", since, "--out", str(tmp_path / "trace")) == 0
    assert len(read_trace(tmp_path / "trace")) == count


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--state", "memory:"], 2, "ends with its gateway"),
        (["--state", "sqlite:////nowhere/state.db"], 2, "there is no state /nowhere/state.db"),
        pytest.param(["--state", "redis://127.0.0.1:1/0"], 1, "redis:", marks=pytest.mark.wire),
        (["--since", "2030-01-01"], 1, "no agents are kept since then"),
        (["--out", "/nowhere/trace"], 1, "No such file or directory"),
        (["--out", "/proc/trace"], 1, "/proc/.trace."),
    ],
)
async def test_what_cannot_be_is_said(
    state: State, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await state.keep([agent(1e9)])
    assert await export("--state", state.url, *arguments) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("justitia export: ")


async def test_the_state_may_be_named_in_the_gateways_file(state: State, tmp_path: Path) -> None:
    await state.keep([agent(1e9)])
    config = tmp_path / "justitia.yaml"
    config.write_text(f"port: 1\nmodel: m\nstate: {state.url}\n")
    assert await export("--config", str(config), "--out", str(tmp_path / "trace")) == 0


def test_a_date_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load(ExportSettings, ["--since", "yesterday"], program="justitia export")
    assert exit_.value.code == 2
    assert "since" in capsys.readouterr().err
