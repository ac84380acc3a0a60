"""The pictures of a replay: that they are there, of one size, and only where there is something to show."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.replay import plot
from gateway.replay.figures import mean
from gateway.replay.results import AgentResult, Memory, Replay, Run, Summary

JCTS = {"justitia": [1.0, 2.5, 4.0, 90.0], "vtc": [8.0, 9.0, 30.0, 100.0], "fcfs": [60.0, 70.0, 85.0, 1200.0]}
MEMORY = Memory([0.0, 1.0, 2.0, 4.0], {"a0": [5, 0, 3, 0], "a3": [0, 7, 7, 9], "others": [1, 1, 0, 0]})


def run(policy: str, *, memory: Memory | None = None, release: str = "engine") -> Run:
    jcts = JCTS[policy]
    numbers: dict[str, Any] = {field.name: 1.0 for field in msgspec.structs.fields(Summary) if field.required}
    summary = Summary(**numbers | {"bound_terms": {}, "agents": len(jcts), "mean_jct_s": mean(jcts)})
    agents = [
        AgentResult(f"a{i}", "kind", "", float(i), i + jct, jct, i + jct, 0.0, jct * 10, jct * 9, 1, 0, 0)
        for i, jct in enumerate(jcts)
    ]
    return Run(policy, "exact", "memory" if policy == "justitia" else release, summary, agents, memory)


def is_picture(path: Path) -> bool:
    """A PNG of 900 by 440, with twice the dots."""
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (1800, 880)


def names(paths: list[Path]) -> list[str]:
    assert all(is_picture(path) for path in paths)
    return [path.name for path in paths]


def test_all_pictures_of_a_replay(tmp_path: Path) -> None:
    runs = [run("justitia", memory=MEMORY), run("vtc"), run("fcfs", memory=MEMORY, release="memory")]
    drawn = plot.draw_all(Replay({}, {}, runs), tmp_path)
    assert names(drawn) == ["jct.png", "ratio-to-vtc.png", "memory-justitia.png", "memory-fcfs-memory.png"]
    assert sorted(drawn) == sorted(tmp_path.iterdir())


def test_nothing_to_compare_with_and_no_memory(tmp_path: Path) -> None:
    empty = Memory([], {})
    assert names(plot.draw_all(Replay({}, {}, [run("justitia", memory=empty)]), tmp_path)) == ["jct.png"]
    # It is the run of vtc as it is in its own engine that others are compared with.
    other = [run("justitia"), run("vtc", release="memory")]
    assert names(plot.draw_all(Replay({}, {}, other), tmp_path)) == ["jct.png"]
    assert names(plot.draw_all(Replay({}, {}, [run("vtc")]), tmp_path)) == ["jct.png"]
    with pytest.raises(ValueError, match="no run of vtc"):
        plot.ratio_to_vtc([run("justitia")], tmp_path / "ratio.png")
    with pytest.raises(ValueError, match="no memory"):
        plot.memory_over_time(run("fcfs"), tmp_path / "memory.png")


def test_memory_of_one_sample_and_in_per_cent(tmp_path: Path) -> None:
    plot.memory_over_time(run("vtc", memory=Memory([3.0], {"a0": [0]})), tmp_path / "one.png")
    plot.memory_over_time(run("vtc", memory=MEMORY), tmp_path / "share.png", capacity_tokens=12)
    assert is_picture(tmp_path / "one.png") and is_picture(tmp_path / "share.png")


def test_memory_is_averaged_over_many_samples() -> None:
    samples = 2 * plot.MEMORY_POINTS
    memory = Memory([float(i) for i in range(samples)], {"a": list(range(samples))})
    times_s, tokens = plot._averaged(memory)
    assert times_s[:3] == [0, 2, 4] and times_s[-1] == samples - 1
    assert tokens["a"][:3] == [0.5, 2.5, 4.5] and tokens["a"][-2:] == [samples - 1.5] * 2


def test_lines_against_mice_load_and_error(tmp_path: Path) -> None:
    plot.elephant({"justitia": [(100, 300.0), (50, 290.0)], "srjf": [(50, 400.0), (100, 700.0)]}, tmp_path / "mice.png")
    plot.against_load(
        {"justitia": [(1, 20.0), (3, 40.0)], "fcfs@memory": [(1, 25.0), (3, 900.0)]}, tmp_path / "load.png"
    )
    plot.against_error(
        {"justitia": [(0, 43.0, 43.0, 43.0), (1, 50.0, 45.0, 60.0)], "a policy of its own": [(0, 120.0), (1, 120.0)]},
        tmp_path / "error.png",
    )
    plot.against_error({"justitia": [(0.5, 43.0)]}, tmp_path / "point.png")
    assert all(is_picture(path) for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4


def test_labels_are_near_their_lines_and_never_on_top_of_each_other() -> None:
    assert plot._apart([1.0, 5.0, 9.0], 10) == [1, 5, 9]
    assert plot._apart([5.0, 5.0], 10) == [4.5, 5.5]
    assert plot._apart([9.8, 10.0, 9.9], 10) == [8, 10, 9]
    assert plot._apart([0.0, 0.1, 1.2], 10) == [0, 1, 2]
    for wanted in itertools.product([0.0, 0.4, 3.0, 3.2, 9.9], repeat=4):
        places = sorted(plot._apart(wanted, 10))
        assert places[0] >= 0 and places[-1] <= 10
        assert all(later - earlier > 1 - 1e-9 for earlier, later in itertools.pairwise(places))
