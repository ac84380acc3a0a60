"""Fits a step-time profile to the demo's engine: `python -m tests.benchmarks.fit --out engine/lab/profiles/cpu-tiny.toml`.

The engine tells on its link, after every iteration, what each task holds. Two reports that follow each other say what the
iteration between them computed, and the time between their arrivals is what it took. On a CPU vLLM plans no iteration
ahead, so that time holds everything: scheduling, the model, and whatever else the engine does between two steps.

The load is the demo's mix at three widths, through a gateway, so that engine, gateway and client share the machine as they
do in the demo. Whatever else runs there slows the engine down: iterations during which other processes had more than a
little of a core are left out, and the profile says how many were used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import zmq
from rich.console import Console

from engine.lab.profile import ProfileError, StepProfile, load_profile
from engine.launcher import EngineFailed
from engine.link import Hello, LinkError, Report, parse
from gateway.agent_trace import AgentTrace
from gateway.config.settings import cache_home
from gateway.demo import demo
from gateway.demo.client import TaskResult
from gateway.demo.demo import BASELINE, Stage
from gateway.demo.processes import ServerFailed, run_once
from gateway.demo.settings import DemoSettings
from gateway.demo.workload import demo_mix, length_table
from gateway.replay import environment
from gateway.replay.figures import percentile

if TYPE_CHECKING:
    import numpy.typing as npt

    Numbers = npt.NDArray[np.float64]

NAME = "cpu-tiny"
OUT = Path("engine/profiles") / f"{NAME}.toml"
# What vLLM's server takes on one CPU when it is not told (`EngineArgs.get_batch_defaults`).
MAX_NUM_BATCHED_TOKENS = 2048
# Cores that others may have; more slows the engine by more than it is to be wrong.
OTHERS_ALLOWED = 0.15
OTHERS_EVERY_S = 0.5
# In so many there are light loads and heavy ones.
MIN_SAMPLES = 3000
# Iterations whose total time a held-out stretch compares.
STRETCH = 100
# An iteration farther from the line than so many robust standard deviations was held up by something else.
OUTLIER = 5.0
ROUNDS = 30


class Mix(NamedTuple):
    """Arguments of `demo_mix`."""

    seed: int
    agents: int
    window_s: float
    scale: float


# Few tasks at once, some, and more than the memory holds.
LOADS = (Mix(3001, 45, 12.0, 0.15), Mix(3002, 45, 12.0, 0.4), Mix(3003, 45, 6.0, 1.0))


class Heard(NamedTuple):
    """A report, and when it came, on a monotonic clock."""

    at_s: float
    report: Report


class Iteration(NamedTuple):
    """One iteration: when it ended, how long it took, and what it did. Counted as `engine.lab.virtual` counts."""

    end_s: float
    seconds: float
    prefill_tokens: int
    decodes: int
    kv_tokens: int


class Others(NamedTuple):
    """Cores that processes other than ours had, between two times of a monotonic clock."""

    start_s: float
    end_s: float
    cores: float


class TooFewSamples(ValueError):
    """There is not enough to fit a line to."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The line, and how far it is from what was measured.

    outliers: share of the samples that were held up. step_error: median of a step's relative error. stretch_error and
    stretch_error_worst: of the total time of held-out stretches, everything counted, median and largest. r2: of the
    samples that were not held up. total_error: of all the time there is, predicted over measured, minus one.
    """

    constant_s: float
    per_prefill_token_s: float
    per_decode_s: float
    per_kv_token_s: float
    samples: int
    outliers: float
    step_error: float
    stretch_error: float
    stretch_error_worst: float
    total_error: float
    r2: float


@dataclass(frozen=True, slots=True)
class Recording:
    """light_tasks: those of the first load, which had ended by `light_end_s`."""

    hello: Hello
    heard: list[Heard]
    others: list[Others]
    light_tasks: list[TaskResult]
    light_end_s: float

    @property
    def task_latency_s(self) -> float:
        return task_latency_s(self.light_tasks, [each for each in self.heard if each.at_s <= self.light_end_s])


def iterations(heard: Sequence[Heard]) -> list[Iteration]:
    """What can be told from reports that follow each other.

    Left out: iterations after a lost report or an idle engine, those of another engine, and those in which a task was
    preempted, which looks like one that ended.
    """
    told = []
    for before, after in itertools.pairwise(_states(heard)):
        follows = after.report.iteration == before.report.iteration + 1
        same_life = after.report.engine_id == before.report.engine_id
        if follows and same_life and before.report.running and after.report.preempted == before.report.preempted:
            told.append(_iteration(before, after))
    return told


def _states(heard: Sequence[Heard]) -> list[Heard]:
    """One for each iteration: the arrival of its first report, and the state of its last, which an abort may have changed."""
    states: list[Heard] = []
    for each in heard:
        last = states[-1] if states else None
        if last is not None and _life_and_iteration(last.report) == _life_and_iteration(each.report):
            states[-1] = Heard(last.at_s, each.report)
        else:
            states.append(each)
    return states


def _life_and_iteration(report: Report) -> tuple[str, int]:
    return report.engine_id, report.iteration


def _iteration(before: Heard, after: Heard) -> Iteration:
    prefill_tokens = decodes = kv_tokens = 0
    for task, holding in after.report.held.items():
        earlier = before.report.held.get(task)
        computed = holding.kv_tokens - (earlier.kv_tokens if earlier else 0)
        if computed <= 0:
            continue
        kv_tokens += holding.kv_tokens
        if earlier is not None and earlier.output_tokens and computed == 1:
            decodes += 1
        else:
            prefill_tokens += computed
    for task, holding in before.report.held.items():
        if task not in after.report.held:  # it had its last token
            decodes += 1
            kv_tokens += holding.kv_tokens + 1
    return Iteration(after.at_s, after.at_s - before.at_s, prefill_tokens, decodes, kv_tokens)


def undisturbed(samples: Sequence[Iteration], others: Sequence[Others]) -> list[Iteration]:
    """Those that began and ended while other processes had hardly any of the machine."""
    quiet = [each for each in others if each.cores <= OTHERS_ALLOWED]
    found, places = [], iter(quiet)
    place = next(places, None)
    for sample in sorted(samples):
        while place is not None and place.end_s < sample.end_s:
            place = next(places, None)
        if place is not None and place.start_s <= sample.end_s - sample.seconds:
            found.append(sample)
    return found


def fit(samples: Sequence[Iteration]) -> Fit:
    """Least squares with coefficients of at least zero, again and again without the outliers of the time before.

    Held out are every other stretch of iterations; the line they are compared with is fitted to the rest, and the line
    that is returned to all. Raises `TooFewSamples`.
    """
    if len(samples) < MIN_SAMPLES:
        raise TooFewSamples(
            f"{len(samples)} iterations can be used, and {MIN_SAMPLES} are needed: is the machine busy with something else?"
        )
    work = np.array([(1, each.prefill_tokens, each.decodes, each.kv_tokens) for each in samples], dtype=np.float64)
    seconds = np.array([each.seconds for each in samples])
    stretch = np.arange(len(samples)) // STRETCH
    trained = stretch % 2 == 0
    held_out = _robust(work[trained], seconds[trained])[0]
    whole = [index for index in np.unique(stretch[~trained]) if np.sum(stretch == index) == STRETCH]
    errors = [
        float((work[stretch == i] @ held_out).sum() / seconds[stretch == i].sum() - 1)
        for i in whole or [int(stretch[-1])]
    ]
    line, kept = _robust(work, seconds)
    predicted = work @ line
    around = seconds[kept] - seconds[kept].mean()
    return Fit(
        constant_s=float(line[0]),
        per_prefill_token_s=float(line[1]),
        per_decode_s=float(line[2]),
        per_kv_token_s=float(line[3]),
        samples=len(samples),
        outliers=float(1 - kept.mean()),
        step_error=float(np.median(np.abs(predicted / seconds - 1))),
        stretch_error=percentile([abs(error) for error in errors], 0.5),
        stretch_error_worst=max(abs(error) for error in errors),
        total_error=float(predicted.sum() / seconds.sum() - 1),
        r2=float(1 - np.square(seconds[kept] - predicted[kept]).sum() / max(np.square(around).sum(), 1e-300)),
    )


def task_latency_s(tasks: Sequence[TaskResult], heard: Sequence[Heard]) -> float:
    """Mean seconds of a task that are neither the gateway's queue nor the engine's scheduler: HTTP, three times over, and
    processes that wait for a core. By Little's law: the tasks' time, less that of all whom the engine had at a time.

    heard: all reports while these tasks were there, and no others. Under a light load only: tasks that are sent by the
    hundred wait for each other in the gateway's socket, and would be counted though they could not have been served.
    """
    at_engine = sum(
        (after.at_s - before.at_s) * (len(before.report.held.keys() | after.report.held.keys()) + after.report.waiting)
        for before, after in itertools.pairwise(_states(heard))
        if before.report.running
    )
    released = sum(task.end_s - task.submit_s - (task.queue_s or 0.0) for task in tasks)
    return (released - at_engine) / len(tasks)


def _robust(work: Numbers, seconds: Numbers) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """The line, and which samples it was fitted to in the end."""
    kept = np.ones(len(seconds), dtype=np.bool_)
    line = np.zeros(work.shape[1])
    for _ in range(ROUNDS):
        line = _non_negative(work[kept], seconds[kept])
        off = np.abs(seconds - work @ line)
        # The median of all deviations, so that the circle cannot close in on a few.
        now = off <= max(OUTLIER * 1.4826 * float(np.median(off)), 1e-9)
        if np.array_equal(now, kept):
            break
        kept = now
    return line, kept


def _non_negative(work: Numbers, seconds: Numbers) -> Numbers:
    """Least squares with no coefficient below zero: the best of those over some of the columns. There are 15 choices."""
    scale = np.maximum(np.abs(work).max(axis=0), 1e-300)
    best, least = np.zeros(work.shape[1]), float("inf")
    for size in range(1, work.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(work.shape[1]), size)):
            part = np.linalg.lstsq(work[:, columns] / scale[columns], seconds, rcond=None)[0]
            if part.min() < 0:
                continue
            off = float(np.square(seconds - (work[:, columns] / scale[columns]) @ part).sum())
            if off < least:
                least, best = off, np.zeros(work.shape[1])
                best[columns] = part / scale[columns]
    return best


class OtherWork:
    """What the machine does beside this process and those that it started. Linux only."""

    def __init__(self) -> None:
        self._tick_s = 1 / os.sysconf("SC_CLK_TCK")
        self._last = self._now()

    def since(self) -> Others:
        """From the last call, or the making of this."""
        before, now = self._last, self._now()
        self._last = now
        other = (now[1] - now[2]) - (before[1] - before[2])
        return Others(before[0], now[0], max(0.0, other) / max(now[0] - before[0], 1e-9))

    def _now(self) -> tuple[float, float, float]:
        """The time, and the processor time of the machine and of ours."""
        ours = sum(_ticks(pid) for pid in _family(os.getpid()))
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        machine = user + nice + system + irq + softirq + steal
        return time.monotonic(), machine * self._tick_s, ours * self._tick_s


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                yield from _family(child)


def _ticks(pid: int) -> int:
    """Its own, and those of its children that have ended."""
    with contextlib.suppress(OSError):
        # "pid (name) state …": the 14th to the 17th field, and the name may hold anything
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return 0


@contextlib.asynccontextmanager
async def watching_others(into: list[Others]) -> AsyncIterator[None]:
    """Notes twice a second what others have of the machine, while the body runs."""

    async def watch() -> None:
        work = OtherWork()
        while True:
            await asyncio.sleep(OTHERS_EVERY_S)
            into.append(work.since())

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


def _listen(address: str, pipe: Connection) -> None:
    """In a process that does nothing else, so that a message is stamped when it comes. Ends when told anything."""
    socket = zmq.Context().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(address)
    came: list[tuple[float, bytes]] = []
    pipe.send(None)
    while not pipe.poll():
        if socket.poll(200):
            message = socket.recv()
            came.append((time.monotonic(), message))
    pipe.send(came)


@contextlib.asynccontextmanager
async def listening(address: str, hellos: list[Hello], heard: list[Heard]) -> AsyncIterator[None]:
    """Every message of the link while the body runs, each with the time of its arrival. Raises `LinkError`."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    listener = spawn.Process(target=_listen, args=(address, theirs), daemon=True)
    listener.start()
    try:
        await asyncio.to_thread(ours.recv)
        yield
        ours.send(None)
        for at_s, message in await asyncio.to_thread(ours.recv):
            told = parse(message)
            if isinstance(told, Hello):
                hellos.append(told)
            elif isinstance(told, Report):
                heard.append(Heard(at_s, told))
        await asyncio.to_thread(listener.join)
    finally:
        listener.kill()


@contextlib.asynccontextmanager
async def stage(
    settings: DemoSettings, mixes: Sequence[Mix], console: Console
) -> AsyncIterator[tuple[Stage, list[list[AgentTrace]]]]:
    """The demo's engine, ready, and the agents of each mix. Raises `EngineFailed`, `ServerFailed`."""
    (settings.out / "logs").mkdir(parents=True, exist_ok=True)
    model = cache_home() / "tiny-model"
    command = [sys.executable, "-m", "engine.lab.tiny_model", str(model)]
    await run_once("making the tiny model", command, log=settings.out / "logs" / "model.log")
    count = demo.token_counter(model)
    traces = [demo_mix(*mix, count) for mix in mixes]
    with tempfile.TemporaryDirectory(prefix="justitia-") as temporary:
        lengths = Path(temporary) / "lengths.json"
        lengths.write_text(json.dumps(length_table(traces, demo.length_salt(settings))))
        async with demo.started_engine(
            settings, model, lengths, Path(temporary), console, link_interval_s=0.0
        ) as engine:
            yield Stage(settings, engine, Path(temporary), console), traces


async def record(logs: Path, console: Console) -> Recording:
    """Runs the loads before an engine of their own. Raises `EngineFailed`, `ServerFailed`, `LinkError`."""
    hellos: list[Hello] = []
    heard: list[Heard] = []
    others: list[Others] = []
    light_tasks: list[TaskResult] = []
    light_end_s = 0.0
    settings = DemoSettings(out=logs)
    async with (
        stage(settings, LOADS, console) as (engine_stage, traces),
        listening(engine_stage.engine.link_address, hellos, heard),
        watching_others(others),
    ):
        for trace in traces:
            # One state for all: the later gateways have learned from the earlier ones.
            result, _ = await engine_stage.replay("fit", BASELINE, trace)
            if not light_tasks:
                light_tasks, light_end_s = result.tasks, time.monotonic()
    return Recording(hellos[0], heard, others, light_tasks, light_end_s)


def profile(fitted: Fit, hello: Hello, latency_s: float) -> StepProfile:
    """Coefficients to three digits: there is no more in them. latency_s: `task_latency_s`."""
    return StepProfile(
        name=NAME,
        description=_description(hello),
        constant_s=_rounded(fitted.constant_s),
        per_prefill_token_s=_rounded(fitted.per_prefill_token_s),
        per_decode_s=_rounded(fitted.per_decode_s),
        per_kv_token_s=_rounded(fitted.per_kv_token_s),
        kv_blocks=hello.total_blocks,
        block_size=hello.block_size,
        max_num_seqs=hello.max_num_seqs,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        fit={
            "samples": fitted.samples,
            "outlier_share": _rounded(fitted.outliers),
            "step_error_median": _rounded(fitted.step_error),
            "stretch_iterations": STRETCH,
            "stretch_error_median": _rounded(fitted.stretch_error),
            "stretch_error_worst": _rounded(fitted.stretch_error_worst),
            "total_error": _rounded(fitted.total_error),
            "r2": _rounded(fitted.r2),
            "task_latency_s": _rounded(latency_s),
        },
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _description(hello: Hello) -> str:
    machine = environment.machine()
    return f"""\
The demo's engine: vLLM {hello.engine_version} (CPU build) with the demo's tiny Llama (2 layers, hidden size 64) in
float32, fitted by tests/benchmarks/fit.py. {machine["cores"]} cores ({machine["cpu"]}), the engine alone
on the first; API server, gateway and client on the other.
The constant holds what vLLM itself does for a step; so small a model hardly shows.
[fit]: errors are relative. A step's is the median over the samples; a stretch is {STRETCH} iterations that the line was not
fitted to, compared by their total time, median and worst; total_error is signed, over all samples. outlier_share of the
samples are farther than {OUTLIER:g} robust standard deviations from the line and were not fitted; they count in every error.
task_latency_s is no part of a step: what a task spends between client, gateway and engine under a light load, mean.
"""


def toml(shown: StepProfile) -> str:
    """A profile as `engine.lab.profile` reads it."""
    seconds = ("constant_s", "per_prefill_token_s", "per_decode_s", "per_kv_token_s")
    sizes = ("kv_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
    lines = [
        f'name = "{shown.name}"',
        f'description = """\n{shown.description}"""',
        *(f"{key} = {getattr(shown, key)!r}" for key in seconds),
        "",
        *(f"{key} = {getattr(shown, key)}" for key in sizes),
        "",
        "[fit]",
        *(f"{key} = {value!r}" for key, value in shown.fit.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.fit", description="Fits a step-time profile to the demo's engine."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="profile to write")
    parser.add_argument("--logs", type=Path, default=Path("bench-results/fit"), help="directory for the logs")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    try:
        recording = asyncio.run(record(options.logs, console))
        told = iterations(recording.heard)
        usable = undisturbed(told, recording.others)
        console.print(
            f"{len(recording.heard):,} reports, {len(told):,} iterations, {len(usable):,} of them undisturbed"
        )
        fitted = fit(usable)
        shown = profile(fitted, recording.hello, recording.task_latency_s)
        options.out.write_text(toml(shown), encoding="utf-8")
        load_profile(str(options.out))
    except (EngineFailed, ServerFailed, LinkError, TooFewSamples, ProfileError, OSError) as error:
        sys.exit(f"fit: {error}")
    console.print(fitted)
    console.print(f"profile  {options.out}")


if __name__ == "__main__":
    main()
