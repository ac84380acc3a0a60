"""What it costs a task to be written down when it settles: `python -m tests.benchmarks.journal_cost [DIRECTORY]`.

Where its agent stands in the queue, a step packed, and one write to the journal's file: timed one by one and as a whole, for an
agent with one task in flight and for one with two hundred. DIRECTORY: on the disk to be measured; else a temporary one. Ends
in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from gateway.flowcontrol.fairqueue import POLICIES, AgentId, FairQueue, Iterations, KvTokenIterations, Task, TaskId
from gateway.flowcontrol.records import AgentRecord, Step, UsageRow
from gateway.replay import environment
from gateway.replay.figures import percentile
from gateway.state import Journal
from gateway.state.frames import frame
from gateway.state.memory import MemoryStore
from predictor.features import COLUMNS
from predictor.types import AgentPrediction, FinishedTask

IN_FLIGHT = (1, 200)
STEPS, ROUND = 20_000, 500
AGENT = AgentId("default/agent-17")


def queue_with(in_flight: int) -> FairQueue:
    queue = FairQueue(POLICIES["justitia"]())
    now, cost = Iterations(0), KvTokenIterations(100)
    for number in range(in_flight):
        queue.enqueue(now, Task(TaskId(number), AGENT, cost, 10, 5), KvTokenIterations(1e6))
    assert len(queue.release(now)) == in_flight
    return queue


async def measure(directory: Path, in_flight: int, steps: int) -> dict[str, Any]:
    """Microseconds."""
    journal = Journal(MemoryStore(1), directory)
    await journal.start()
    queue = queue_with(in_flight)
    prediction = AgentPrediction(1e6, 2e6, "xgboost-000001")
    record = AgentRecord(
        run=f"{journal.id}-1",
        journal=journal.id,
        id=AGENT,
        name="agent-17",
        tenant="default",
        source="x-agent-id",
        standing=None,
        arrived_at=1e9,
        last_end_at=1e9 + 9,
        settled=3,
        agent_class="kind",
    )
    record.prediction, record.judged, record.predicted = prediction, prediction, 1e6
    task = FinishedTask(4000, 1000, 200, 100, arrived_s=1.5, ended_s=3.25, row=bytes(range(256)) * (len(COLUMNS) // 64))
    usage = UsageRow("default", 3600, 1, 1000, 200, 100, 123456.75)

    def made() -> Step:
        record.standing = queue.standing(AGENT)
        return Step(record, False, task, 0, False, usage)

    step = made()
    parts: dict[str, Callable[[], object]] = {
        "stand": made,
        "pack": lambda: frame(step),
        "write": lambda: journal.write(step),
        "all": lambda: journal.write(made()),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(0, steps, ROUND):
        for name, part in parts.items():
            for _ in range(ROUND):
                begun = time.perf_counter_ns()
                part()
                times[name].append((time.perf_counter_ns() - begun) / 1000)
        await journal.flush()
    unwritten = journal.take_counts().unwritten
    assert not unwritten, f"the disk did not take {unwritten} steps"
    await journal.close()
    found = {name: {"p50": percentile(of, 0.5), "p99": percentile(of, 0.99)} for name, of in times.items()}
    return {"in_flight": in_flight, "bytes": len(frame(step)), "microseconds": found}


async def run(directory: Path, steps: int) -> list[dict[str, Any]]:
    return [await measure(directory, in_flight, steps) for in_flight in IN_FLIGHT]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.journal_cost")
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        runs = asyncio.run(run(Path(temporary), options.steps))
    report = {"runs": runs, "versions": environment.versions(), "machine": environment.machine()}
    print(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main()
