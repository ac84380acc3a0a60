"""What a replay writes: the fields that are promised, and numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.replay.results import (
    AgentResult,
    Memory,
    Replay,
    Run,
    Summary,
    against_vtc,
    jain,
    own_release,
    read,
    spread,
    write,
)

AGENT_FIELDS = (
    "agent_id class tenant arrival_s finish_s jct_s reference_finish_s lateness_s cost predicted_cost preemptions"
)
SUMMARY_FIELDS = (
    "mean_jct_s p50_jct_s p90_jct_s p99_jct_s max_jct_s makespan_s preemptions iterations no_later_than_vtc"
    " worst_ratio_to_vtc no_later_than_reference worst_lateness_s bound_s jain decision_us_p50 decision_us_p99"
)


def run(policy: str, *jcts: float, release: str = "", memory: Memory | None = None) -> Run:
    numbers: dict[str, Any] = {field.name: 1.0 for field in msgspec.structs.fields(Summary) if field.required}
    whole = ("agents", "tasks", "iterations", "preemptions", "recomputed_tokens")
    summary = Summary(**numbers | {"bound_terms": {"L": 2.0}} | dict.fromkeys(whole, 1))
    agents = [
        AgentResult(f"a{i}", "kind", "t", 1.0, 1 + jct, jct, 2.0, jct - 1, 10.0, 9.0, 1, 0, 0)
        for i, jct in enumerate(jcts)
    ]
    return Run(policy, "exact", release or own_release(policy), summary, agents, memory)


@pytest.mark.parametrize(
    ("values", "index"), [([3.0], 1.0), ([2.0, 2.0, 2.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 3.0], 16 / 20)]
)
def test_jain(values: list[float], index: float) -> None:
    assert jain(values) == pytest.approx(index)


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0]) == {
        "mean_jct_s": 2,
        "p50_jct_s": 2,
        "p90_jct_s": pytest.approx(2.8),
        "p99_jct_s": pytest.approx(2.98),
        "max_jct_s": 3,
    }


def test_against_vtc() -> None:
    """Agent by agent: 2/4, 6/3, 5/5."""
    justitia, vtc = against_vtc([run("justitia", 2, 6, 5), run("vtc", 4, 3, 5)])
    assert justitia.summary.no_later_than_vtc == pytest.approx(2 / 3)
    assert justitia.summary.worst_ratio_to_vtc == 2
    assert (vtc.summary.no_later_than_vtc, vtc.summary.worst_ratio_to_vtc) == (1, 1)


def test_only_vtc_as_it_is_in_its_own_engine_is_compared_with() -> None:
    runs = [run("justitia", 2, 6), run("vtc", 4, 3, release="memory")]
    assert against_vtc(runs) == runs
    assert runs[0].summary.no_later_than_vtc is None


def test_labels_say_how_tasks_were_released_where_it_is_not_the_policys_own_way() -> None:
    assert [own_release(policy) for policy in ("justitia", "vtc", "fcfs")] == ["memory", "engine", "engine"]
    assert run("justitia", 1).label == "justitia"
    assert run("vtc", 1).label == "vtc"
    assert run("vtc", 1, release="memory").label == "vtc@memory"
    assert run("justitia", 1, release="all").label == "justitia@all"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    memory = Memory([0.0, 1.0], {"a0": [1, 2], "others": [0, 0]})
    runs = against_vtc([run("justitia", 2, 6, memory=memory), run("vtc", 4, 3)])
    replay = Replay({"beta": 0.98}, {"agents": 2}, runs)
    file = tmp_path / "out.json"
    write(replay, file)
    assert read(file) == replay
    assert file.read_bytes().endswith(b"}\n")


def test_the_fields_that_are_promised(tmp_path: Path) -> None:
    first, vtc = against_vtc([run("justitia", 2, 6), run("vtc", 4, 3)])
    timed = msgspec.structs.replace(first.summary, decision_us_p50=1.0, decision_us_p99=2.0)
    write(Replay({}, {}, [msgspec.structs.replace(first, summary=timed), vtc]), tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["config", "trace", "runs"]
    timed_run, untimed_run = written["runs"]
    assert list(timed_run) == ["policy", "predictor", "release", "summary", "agents"]
    assert set(AGENT_FIELDS.split()) <= timed_run["agents"][0].keys()
    assert set(SUMMARY_FIELDS.split()) <= timed_run["summary"].keys()
    assert not {"decision_us_p50", "decision_us_p99"} & untimed_run["summary"].keys()


def test_what_is_no_replay_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text('{"runs": 3}')
    with pytest.raises(msgspec.DecodeError):
        read(tmp_path / "out.json")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.json")
