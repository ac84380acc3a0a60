"""The command `justitia replay`: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.agent_trace import AgentTrace, TaskTrace, TraceError, write_trace
from gateway.config.sources import load
from gateway.replay.command import LEARN_FROM_SEEDS, ReplaySettings, load_past, load_trace, run_replay
from gateway.replay.results import read
from gateway.replay.traces import BUILT_IN

SMALL = ("--kv-blocks", "16", "--max-num-seqs", "8")


def replay(*arguments: str | Path) -> int:
    """As the command does it. A setting that is wrong raises `SystemExit`."""
    return run_replay(load(ReplaySettings, [str(argument) for argument in arguments], program="justitia replay"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight agents of two stages, too many for sixteen blocks."""
    agents = [
        AgentTrace(
            f"a{i}",
            0.1 * i,
            (TaskTrace("map", 60, 20 + 5 * i), TaskTrace("reduce", 40, 30, ("map",), 0.2)),
            agent_class=f"k{i % 2}",
        )
        for i in range(8)
    ]
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    write_trace(agents, path)
    return path


# What it writes


@pytest.fixture(scope="module")
def written(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "made" / "out.json"
    assert replay(trace, *SMALL, "--predictor", "noise:0.5", "--seed", "3", "--json", out) == 0
    return out


@pytest.mark.vllm
def test_the_results_of_all_policies(written: Path, trace: Path) -> None:
    found = read(written)
    assert [run.label for run in found.runs] == ["justitia", "vtc", "agent-fcfs", "fcfs", "las", "sjf", "srjf"]
    assert [run.release for run in found.runs] == ["memory", *["engine"] * 6]
    names = [agent.agent_id for agent in load_trace(str(trace))]
    for run in found.runs:
        assert run.predictor == "noise:0.5"
        assert [agent.agent_id for agent in run.agents] == names
        assert run.summary.worst_ratio_to_vtc is not None and run.summary.decision_us_p50 is None
        assert run.memory is None
    assert (found.trace["agents"], found.trace["tasks"]) == (8, 16)
    assert found.config["kv_blocks"] == 16 and found.config["seed"] == 3 and found.config["versions"]
    assert not {"out", "json", "plot"} & found.config.keys()


@pytest.mark.vllm
def test_another_process_writes_the_same_to_the_byte(written: Path, trace: Path, tmp_path: Path) -> None:
    """With other hashes of strings, and through the command itself."""
    out = tmp_path / "out.json"
    options = [*SMALL, "--predictor", "noise:0.5", "--seed", "3", "--json", out]
    done = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "replay", trace, *options],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == written.read_bytes()
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert done.stdout.startswith("Completion time of an agent (JCT), seconds")


@pytest.mark.vllm
def test_a_table_on_stdout_and_progress_on_stderr(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert replay(trace, *SMALL, "--policy", "justitia, vtc ,vtc@memory", "--json", out) == 0
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    for run in read(out).runs:
        assert [run.label, f"{run.summary.mean_jct_s:.1f}"] in [row[:2] for row in rows]
    for heading in ("mean", "P50", "P99", "÷ vtc", "no later", "worst", "late", "bound"):
        assert heading in said.out
    assert "8 agents, 16 tasks, llama-7b-a100" in said.err
    assert "vtc@memory: mean JCT" in said.err and f"results: {out}" in said.err


@pytest.mark.vllm
def test_timings_and_pictures_only_when_asked(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, pictures = tmp_path / "out.json", tmp_path / "deep" / "pictures"
    arguments = (trace, *SMALL, "--policy", "justitia,vtc", "--timings", "--json", out, "--plot", pictures)
    assert replay(*arguments) == 0
    run = read(out).runs[0]
    assert run.summary.decision_us_p99 is not None and run.summary.decision_us_p99 > 0
    assert run.memory is not None
    names = {"jct.png", "ratio-to-vtc.png", "memory-justitia.png", "memory-vtc.png"}
    assert {path.name for path in pictures.iterdir()} == names


@pytest.mark.vllm
def test_the_ladder_learns_from_another_trace(trace: Path, tmp_path: Path) -> None:
    predicted: dict[str, list[float]] = {}
    for name, past in (("nothing", ()), ("itself", ("--learn-from", str(trace)))):
        out = tmp_path / f"{name}.json"
        assert replay(trace, *SMALL, "--policy", "justitia", "--predictor", "ladder", *past, "--json", out) == 0
        predicted[name] = [agent.predicted_cost for agent in read(out).runs[0].agents]
    agents = load_trace(str(trace))
    even = sum(agent.cost for agent in agents[::2]) / 4
    assert predicted["itself"][0] == pytest.approx(even, rel=0.2)
    assert predicted["nothing"][0] != pytest.approx(even, rel=0.2)


@pytest.mark.vllm
def test_the_prefix_cache_is_on_where_prompts_are_said_to_begin_alike(trace: Path, tmp_path: Path) -> None:
    alike = tmp_path / "alike.jsonl"
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    for line in lines:
        for each in line["tasks"]:
            each["prefix"] = {"id": "all", "tokens": 32}
    alike.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates: list[float] = []
    for path, further in ((trace, ()), (alike, ()), (alike, ("--no-prefix-caching",))):
        assert replay(path, *SMALL, "--policy", "justitia", *further, "--json", tmp_path / "out.json") == 0
        rates.append(read(tmp_path / "out.json").runs[0].summary.prefix_hit_rate)
    assert rates[0] == rates[2] == 0 < rates[1]


# What it refuses


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"agent_id":"b","arrival_s":0,"tasks":[{"id":"t","prompt_tokens":0,"output_tokens":1}]}', "line 3"),
        ('{"agent_id":"b","arrival_s":0}', "line 3"),
        ("not JSON", "line 3"),
        ('{"agent_id":"b","arrival_s":0,"tasks":[{"id":"t","after":["u"],"prompt_tokens":1,"output_tokens":1}]}', "u"),
    ],
)
def test_a_malformed_line_stops_it_with_its_number(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"agent_id":"a","arrival_s":0,"tasks":[{"id":"t","prompt_tokens":5,"output_tokens":1}]}'
    (tmp_path / "trace.jsonl").write_text(f"{good}\n\n{line}\n")
    assert replay(tmp_path / "trace.jsonl", "--json", tmp_path / "out.json") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("justitia replay: line 3: ") and said in told.err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere/trace.jsonl"], "no file /nowhere/trace.jsonl, and no built-in trace: paper"),
        (["/"], "directory"),
        (["paper:0"], "paper:SEED:LOAD"),
        (["elephant:many"], "whole number"),
        (["elephant:3", "--predictor", "lightgbm"], "no predictor 'lightgbm'"),
        (["elephant:3", "--predictor", "noise:-1"], "noise:SIGMA"),
        (["elephant:3", "--predictor", "ladder", "--cost", "compute"], "memory-centric"),
        (["elephant:3", "--predictor", "ladder", "--learn-from", "/nowhere"], "no file /nowhere"),
        (["elephant:3", "--profile", "h1000"], "llama-7b-a100"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("justitia replay: ") and said in told.err and "Traceback" not in told.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["elephant:3", "--policy", "luck"], "no policy 'luck'"),
        (["elephant:3", "--policy", "vtc,"], "no policy ''"),
        (["elephant:3", "--policy", "vtc@later"], "no release 'later'"),
        (["elephant:3", "--policy", "vtc@"], "no release ''"),
        (["elephant:3", "--kv-blocks", "0"], "--kv-blocks: must be greater than or equal to 1, not 0"),
        (["elephant:3", "--beta", "0"], "beta"),
        (["elephant:3", "--seed", "-1"], "seed"),
        (["elephant:3", "--cost", "money"], "cost"),
        (["elephant:3", "--no-such-thing", "1"], "no-such-thing"),
        ([], "TRACE|trace"),
    ],
)
def test_a_setting_that_is_wrong_ends_it_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        replay(*arguments)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert any(each in told for each in said.split("|")), told


@pytest.mark.vllm
def test_a_task_too_long_for_the_engine_is_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(trace, "--kv-blocks", "5") == 2
    assert "task 'map' of agent 'a1' is 60 + 25 tokens long, and the engine holds 80" in capsys.readouterr().err


@pytest.mark.vllm
def test_more_tasks_at_once_than_the_engine_takes_is_said_in_a_sentence(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(trace, "--max-num-seqs", "100000") == 2
    assert "max_num_seqs" in capsys.readouterr().err


def test_only_names_that_begin_like_ours_are_read_from_the_environment(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSON", str(tmp_path / "not-ours.json"))
    assert load(ReplaySettings, [str(trace)], program="justitia replay").out is None


def test_an_unknown_name_in_its_own_part_of_the_environment_is_an_error(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUSTITIA_REPLAY_PROFIEL", "cpu-tiny")
    with pytest.raises(SystemExit):
        load(ReplaySettings, [str(trace)], program="justitia replay")
    assert "JUSTITIA_REPLAY_PROFIEL: is not a setting; did you mean JUSTITIA_REPLAY_PROFILE?" in capsys.readouterr().err


def test_help_names_the_built_in_traces(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        replay("--help")
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, written_as in BUILT_IN.items():
        assert f"{name}:" in words
        assert written_as.partition(" – ")[0] in words
    for option in ("--policy", "--predictor", "--kv-blocks", "--json", "--plot", "--timings"):
        assert option in words


# Other seeds to learn from


@pytest.mark.parametrize(
    ("spec", "others"),
    [
        ("paper:7:2.5", "paper:{}:2.5"),
        ("paper:7:3:light", "paper:{}:3:light"),
        ("tools:7", "tools:{}"),
        ("prefix:7", "prefix:{}"),
        ("tenants:7", "tenants:{}"),
        ("elephant:5:7", "elephant:5:{}"),
    ],
)
def test_the_ladder_learns_from_other_seeds_of_a_built_in_trace(spec: str, others: str) -> None:
    expected = [agent for further in LEARN_FROM_SEEDS for agent in load_trace(others.format(7 + further))]
    assert load_past(spec, "") == expected
    own = {agent.tasks for agent in load_trace(spec)}
    assert not own & {agent.tasks for agent in expected if len(agent.tasks) > 1}


def test_an_elephant_without_a_seed_has_seed_0() -> None:
    assert load_past("elephant:5", "") == load_past("elephant:5:0", "")
    assert len(load_past("elephant:5", "")) == 6 * len(LEARN_FROM_SEEDS)


def test_what_to_learn_from_can_be_told(trace: Path) -> None:
    told: list[Any] = load_past("paper:0:1", f"{trace}, elephant:3")
    assert told == [*load_trace(str(trace)), *load_trace("elephant:3")]
    assert load_past(str(trace), "") == []
    with pytest.raises(TraceError, match="no file"):
        load_past("paper:0:1", "/nowhere")
