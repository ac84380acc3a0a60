"""What a decision of the fair queue costs: `python -m tests.benchmarks.queue_speed [--json OUT]`.

A queue in a steady state: so many tasks wait, 60 are at the engine, whose memory is full, and whenever one of them ends
there is room for exactly one more. One cycle is `observe` for all that are in flight, then a task that arrives, one that
ends, and the release of another; the three are timed one by one. The same cycles are run with 100, 10,000 and 100,000
waiting tasks, a few hundred cycles with each in turn, so that whatever else the machine does falls on all sizes. The
garbage collector is left on, as in service.

The lengths of all tasks are the same, so that memory has room for one more and never for two; costs and predictions are
not. With 600 iterations a task and 60 in flight, one ends every ten iterations, and what arrives is what the engine can do.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    Release,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)
from gateway.replay import environment
from gateway.replay.figures import percentile
from predictor.cost import task_cost

PROMPT_TOKENS, OUTPUT_TOKENS = 400, 600
# σ of the logarithms: of an agent's size, and of the error of a prediction.
SIZE_SIGMA, ERROR_SIGMA = 1.0, 0.3
SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}
VERBS = ("enqueue", "complete", "release", "decision", "observe", "evict")


@dataclass(frozen=True, slots=True)
class SpeedSettings:
    """Bounds of one run: it takes a few minutes with these."""

    policies: tuple[str, ...] = ("justitia", "vtc", "srjf", "fcfs")
    waiting: tuple[int, ...] = (100, 10_000, 100_000)
    in_flight: int = 60
    rounds: int = 10
    cycles: int = 400  # of each size in a round
    warm_up: int = 400
    tenants: int = 100  # in the variant with several
    target_us: float = 50.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    tasks_of_agent: int
    tenants: int


def variants(settings: SpeedSettings) -> tuple[Variant, ...]:
    return (
        Variant("agents of 10 tasks", 10, 1),
        Variant("agents of 1 task", 1, 1),
        Variant(f"agents of 10 tasks, {settings.tenants} tenants", 10, settings.tenants),
    )


class SteadyQueue:
    """A queue with so many waiting tasks, and an engine that is full. A new agent arrives when the tasks of the one before
    have; one whose tasks have all ended is evicted."""

    def __init__(self, policy: str, waiting: int, variant: Variant, settings: SpeedSettings) -> None:
        self.taken_ns: dict[str, list[int]] = {verb: [] for verb in VERBS}
        self._variant, self._every = variant, OUTPUT_TOKENS // settings.in_flight
        self._rng = Random(f"queue-speed:{settings.seed}")
        self._true_cost: dict[TaskId, KvTokenIterations] = {}
        self._arriving = self._arrivals()
        self._iteration = 0
        self._left: dict[AgentId, int] = {}  # tasks that have not ended
        self._predicted: dict[AgentId, KvTokenIterations] = {}
        self._at_engine: deque[tuple[int, Task]] = deque()  # with the iteration of their release
        self._queue = queue = FairQueue(POLICIES[policy]())
        queue.set_capacity(self._now, settings.in_flight * (PROMPT_TOKENS + OUTPUT_TOKENS / 2))
        for _ in range(waiting + settings.in_flight):
            task, predicted, tenant = next(self._arriving)
            queue.enqueue(self._now, task, predicted, tenant=tenant)
        # One every few iterations, as they will end.
        for count in range(1, settings.in_flight + 1):
            self._iteration += self._every
            queue.limits = ReleaseLimits(beta=math.inf, foresight=False, in_flight=count)
            self._take(queue.release(self._now))
        queue.limits = ReleaseLimits()
        queue.set_capacity(self._now, queue.peak_tokens * (1 + 0.5 / settings.in_flight) / queue.limits.beta)

    @property
    def waiting(self) -> int:
        return self._queue.waiting

    @property
    def in_flight(self) -> int:
        return self._queue.in_flight

    def cycle(self) -> None:
        """Raises `RuntimeError` when not exactly one task was released: then what is measured is not what was meant."""
        queue, taken_ns = self._queue, self.taken_ns
        self._iteration += self._every
        now = self._now
        reports = [
            (task.id, float(PROMPT_TOKENS + self._iteration - began), float(self._iteration - began))
            for began, task in self._at_engine
        ]
        start = time.perf_counter_ns()
        for task_id, kv_tokens, output_tokens in reports:
            queue.observe(now, task_id, kv_tokens, output_tokens)
        taken_ns["observe"].append(time.perf_counter_ns() - start)

        task, predicted, tenant = next(self._arriving)
        start = time.perf_counter_ns()
        queue.enqueue(now, task, predicted, tenant=tenant)
        enqueue_ns = time.perf_counter_ns() - start

        _, ended = self._at_engine.popleft()
        spent = Spent(self._true_cost.pop(ended.id), PROMPT_TOKENS, OUTPUT_TOKENS)
        predicted = self._predicted[ended.agent_id]
        start = time.perf_counter_ns()
        queue.complete(now, ended.id, spent, predicted)
        complete_ns = time.perf_counter_ns() - start

        start = time.perf_counter_ns()
        releases = queue.release(now)
        release_ns = time.perf_counter_ns() - start
        if len(releases) != 1:
            raise RuntimeError(f"{len(releases)} tasks were released in one cycle, not 1")
        self._take(releases)

        taken_ns["enqueue"].append(enqueue_ns)
        taken_ns["complete"].append(complete_ns)
        taken_ns["release"].append(release_ns)
        taken_ns["decision"].append(enqueue_ns + complete_ns + release_ns)
        self._left[ended.agent_id] -= 1
        if not self._left[ended.agent_id]:
            start = time.perf_counter_ns()
            queue.evict(now, ended.agent_id)
            taken_ns["evict"].append(time.perf_counter_ns() - start)
            del self._left[ended.agent_id], self._predicted[ended.agent_id]

    def forget_timings(self) -> None:
        for taken in self.taken_ns.values():
            taken.clear()

    def _take(self, releases: Sequence[Release]) -> None:
        self._at_engine += [(self._iteration, release.task) for release in releases]

    @property
    def _now(self) -> Iterations:
        return Iterations(float(self._iteration))

    def _arrivals(self) -> Iterator[tuple[Task, KvTokenIterations, TenantId]]:
        rng, count = self._rng, self._variant.tasks_of_agent
        task_ids = map(TaskId, itertools.count())
        for number in itertools.count():
            agent_id = AgentId(f"agent-{number}")
            tenant = (
                TenantId(f"tenant-{rng.randrange(self._variant.tenants)}")
                if self._variant.tenants > 1
                else TenantId("")
            )
            mean_cost = task_cost(PROMPT_TOKENS, OUTPUT_TOKENS) * rng.lognormvariate(-(SIZE_SIGMA**2) / 2, SIZE_SIGMA)
            predicted = KvTokenIterations(count * mean_cost * rng.lognormvariate(0.0, ERROR_SIGMA))
            self._left[agent_id], self._predicted[agent_id] = count, predicted
            for task_id in itertools.islice(task_ids, count):
                self._true_cost[task_id] = KvTokenIterations(mean_cost * rng.lognormvariate(0.0, ERROR_SIGMA))
                memory_tokens = float(PROMPT_TOKENS + OUTPUT_TOKENS)
                yield (
                    Task(task_id, agent_id, KvTokenIterations(mean_cost), memory_tokens, PROMPT_TOKENS),
                    predicted,
                    tenant,
                )


def measure(settings: SpeedSettings, progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """One run, as the record that is written. `progress` is told what comes next."""
    results, growth = [], []
    for policy, variant in itertools.product(settings.policies, variants(settings)):
        if variant.tenants > 1 and not POLICIES[policy].nested:
            continue  # to which tenants are all the same
        progress(f"{policy}, {variant.name}")
        queues = {waiting: SteadyQueue(policy, waiting, variant, settings) for waiting in settings.waiting}
        for queue in queues.values():
            _run(queue, settings.warm_up)
            queue.forget_timings()
        for _ in range(settings.rounds):
            for queue in queues.values():
                _run(queue, settings.cycles)
        spread = {waiting: _spread(queue) for waiting, queue in queues.items()}
        what = {"policy": policy, "variant": variant.name}
        results += [
            {**what, "waiting": waiting, "us": spread[waiting], "decision_us_p50_by_round": _by_round(queue, settings)}
            for waiting, queue in queues.items()
        ]
        fewest, most = spread[min(spread)], spread[max(spread)]
        both = [verb for verb in VERBS if verb in fewest and verb in most]
        growth.append({**what} | {verb: round(most[verb]["p50"] / fewest[verb]["p50"], 2) for verb in both})
    return {
        "benchmark": "queue-speed",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "results": results,
        "growth": {"log_ratio": round(_log_ratio(settings), 2), "of": growth},
        "target": _target(results, growth, settings),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }


def _run(queue: SteadyQueue, cycles: int) -> None:
    for _ in range(cycles):
        queue.cycle()


def _spread(queue: SteadyQueue) -> dict[str, dict[str, float]]:
    """Microseconds, by verb. Without `evict` where no agent came to its end."""
    return {
        verb: {name: round(percentile(taken, share) / 1000, 2) for name, share in SHARES.items()}
        for verb, taken in queue.taken_ns.items()
        if taken
    }


def _by_round(queue: SteadyQueue, settings: SpeedSettings) -> list[float]:
    """How quiet the machine was: the medians of the rounds are alike on one that does nothing else."""
    taken, cycles = queue.taken_ns["decision"], settings.cycles
    return [round(percentile(taken[i : i + cycles], 0.5) / 1000, 2) for i in range(0, len(taken), cycles)]


def _log_ratio(settings: SpeedSettings) -> float:
    return math.log(max(settings.waiting)) / math.log(min(settings.waiting))


def _target(
    results: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]], settings: SpeedSettings
) -> dict[str, Any]:
    """The slowest decision with most waiting, the largest growth of one, and whether they are what is asked for."""
    slowest = max(each["us"]["decision"]["p50"] for each in results if each["waiting"] == max(settings.waiting))
    largest = max(max(each["decision"], each["release"]) for each in growth)
    met = slowest < settings.target_us and largest <= _log_ratio(settings)
    return {"slowest_decision_p50_us": slowest, "largest_growth": largest, "met": met}


def table(record: dict[str, Any]) -> Table:
    drawn = Table(title="A decision of the queue, µs: p50 (p99)", title_justify="left")
    drawn.add_column("policy")
    drawn.add_column("variant")
    headings = ("waiting", "enqueue", "complete", "release", "all three", f"observe {record['settings']['in_flight']}")
    for heading in (*headings, "evict"):
        drawn.add_column(heading, justify="right")
    size = len(record["settings"]["waiting"])
    for start, growth in zip(range(0, len(record["results"]), size), record["growth"]["of"], strict=True):
        for each in record["results"][start : start + size]:
            cells = (_cell(each["us"].get(verb)) for verb in VERBS)
            drawn.add_row(each["policy"], each["variant"], f"{each['waiting']:,}", *cells)
        ratios = (f"× {growth[verb]:.2f}" if verb in growth else "" for verb in VERBS)
        drawn.add_row("", "", f"log × {record['growth']['log_ratio']:.2f}", *ratios, style="bold", end_section=True)
    return drawn


def _cell(us: dict[str, float] | None) -> str:
    return "" if us is None else f"{us['p50']:.1f} ({us['p99']:.1f})"


def main() -> None:
    defaults = SpeedSettings()
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.queue_speed", description="What a decision of the fair queue costs."
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the record")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--cycles", type=int, default=defaults.cycles, help="of each size in a round")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = vars(parser.parse_args())
    out: Path | None = options.pop("json")
    console = Console()
    with console.status("") as status:
        record = measure(SpeedSettings(**options), status.update)
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    console.print(table(record))
    target = record["target"]
    console.print(
        f"slowest decision {target['slowest_decision_p50_us']} µs, asked for {defaults.target_us:g}; "
        f"largest growth {target['largest_growth']}, of the logarithm {record['growth']['log_ratio']}: "
        + ("met" if target["met"] else "not met")
    )


if __name__ == "__main__":
    main()
