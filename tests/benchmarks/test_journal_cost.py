"""The benchmark of the journal runs, and says what it says it does."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.journal_cost import run


async def test_it_times_each_part_and_leaves_nothing(tmp_path: Path) -> None:
    few, many = await run(tmp_path, 1000)
    assert (few["in_flight"], many["in_flight"]) == (1, 200)
    for found in (few["microseconds"], many["microseconds"]):
        assert found.keys() == {"stand", "pack", "write", "all"}
        assert 0 < found["pack"]["p50"] < found["all"]["p50"] <= found["all"]["p99"]
    assert left_in(tmp_path) == ["lock"]


def left_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*")]
