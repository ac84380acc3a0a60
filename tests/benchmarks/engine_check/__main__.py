"""The command: all of the check, and the one line that is written of it."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console

from engine.launcher import EngineFailed, on_cpu
from engine.link import LinkError
from gateway.demo.processes import ServerFailed
from gateway.replay import environment
from tests.benchmarks.engine_check.answers import CheckFailed
from tests.benchmarks.engine_check.engines import Stage, setups
from tests.benchmarks.engine_check.equality import compare
from tests.benchmarks.engine_check.models import make_all
from tests.benchmarks.engine_check.settings import CheckSettings, parse, settings_of
from tests.benchmarks.engine_check.tables import equality_table, speed_table
from tests.benchmarks.engine_check.throughput import speed_figures, throughput
from tests.benchmarks.engine_check.without_engines import accelerators, run_tests, step_cost

NO_GPU = (
    "there is no NVIDIA GPU here that vLLM could use: this check is for a machine with one, with vLLM's own build "
    "installed. `--rehearse` runs all of it on the CPU, at a tiny size"
)

# What ends one setup, and not the run.
LOST = (EngineFailed, CheckFailed, LinkError, aiohttp.ClientError, TimeoutError)

# What ends the run, and not what it has found.
ENDING = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    options = parse()
    console = Console()
    if options.rehearse and not options.gpu:
        sys.exit("--rehearse goes with --gpu")
    if options.gpu and not options.rehearse and (on_cpu() or not accelerators()):
        sys.exit(f"gpu-check: {NO_GPU}")
    name = "gpu-check" if options.gpu else "engine-check"
    out: Path = options.out or Path("bench-results") / f"{name}.jsonl"
    # What is measured are the defaults, and not what a user's own engine is told.
    for variable in [variable for variable in os.environ if variable.startswith("JUSTITIA_")]:
        del os.environ[variable]
    try:
        record = asyncio.run(check(settings_of(options), console, gpu=options.gpu, rehearsal=options.rehearse))
    except (*LOST, ServerFailed) as error:
        sys.exit(f"{name}: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")
    for what, why in record["not_exercised"].items():
        console.print(f"not exercised: {what}: {why}", markup=False)
    for failure in record["failures"]:
        console.print(f"failed: {failure}", style="bold red", markup=False)
    console.print(f"{'passed' if record['passed'] else 'failed'}; one line appended to {out}")
    sys.exit(0 if record["passed"] else 1)


async def check(settings: CheckSettings, console: Console, *, gpu: bool, rehearsal: bool) -> dict[str, Any]:
    """One run, as the record that is written. SIGTERM and Ctrl-C end it where it is, and what was found is in it.

    Raises `EngineFailed`, `CheckFailed`, `ServerFailed` and `LinkError`.
    """
    record: dict[str, Any] = {
        "benchmark": "gpu-check" if gpu else "engine-check",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "passed": False,
        "failures": [],
        "rehearsal": rehearsal,
        "settings": asdict(settings),
        "tests": None,
        "step_cost": None,
        "equality": [],
        "not_exercised": {},
        "throughput": None,
        "versions": environment.versions(),
        "machine": environment.machine(),
        "accelerators": accelerators(),
    }
    rounds: list[dict[str, float]] = []
    work = asyncio.ensure_future(_work(record, rounds, settings, console))
    loop = asyncio.get_running_loop()
    for number in ENDING:
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        record["failures"].append("the run was ended from outside, before its end")
        if record["throughput"] is None and rounds:
            record["throughput"] = speed_figures(settings, rounds)
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)
    record["passed"] = not record["failures"]
    return record


async def _work(
    record: dict[str, Any], rounds: list[dict[str, float]], settings: CheckSettings, console: Console
) -> None:
    """What is found goes into `record` at once, and each round of throughput into `rounds`."""
    gpu = record["benchmark"] == "gpu-check"
    failures: list[str] = record["failures"]
    unexercised: dict[str, str] = record["not_exercised"]
    if gpu and settings.tests:
        record["tests"] = tests = run_tests(console)
        if tests["exit_code"]:
            failures.append(f"the tests without an engine: {tests['summary']}")
    if gpu and settings.step_cost:
        record["step_cost"] = step = step_cost(console)
        if "error" in step:
            failures.append(f"the cost of a step: {step['error']}")
        else:
            console.print_json(data=step)
    # Sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="justitia-check-", dir="/tmp") as temporary:
        directory = Path(temporary)
        stage = Stage(settings, directory, await make_all(directory), console)
        if settings.tokens:
            there = setups(stage.models["adapter"], stage.models["another adapter"])
            unknown = set(settings.only) - {setup.name for setup in there}
            failures += [f"there is no setup of this name: {name}" for name in sorted(unknown)]
            for setup in there:
                if settings.only and setup.name not in settings.only:
                    continue
                try:
                    figures = await compare(stage, setup)
                except LOST as error:  # the other setups are compared all the same
                    unexercised[setup.name] = str(error).partition("\n")[0] or type(error).__name__
                    failures.append(f"{setup.name}: {error}")
                    continue
                record["equality"].append(figures)
                failures += [f"{setup.name}: {failure}" for failure in figures["failures"]]
                console.print(equality_table(figures))
        if on_cpu():
            unexercised["async scheduling as shipped"] = "vLLM turns it off on a CPU; a plugin turned it on here"
            mixed = "vLLM's CPU build applies the adapter to both"
            unexercised["requests with and without an adapter in one step"] = mixed
            unexercised["CUDA graphs, bfloat16, attention on a GPU"] = "there is no GPU"
        if settings.speed:
            try:
                record["throughput"] = speed = await throughput(stage, rounds)
            except LOST as error:
                unexercised["throughput"] = str(error).partition("\n")[0] or type(error).__name__
                failures.append(f"throughput: {error}")
            else:
                console.print(speed_table(speed))
                if speed["verdict"] == "missed":
                    failures.append(f"throughput is {speed['ratio']['median']:.3f} of the stock engine's")


if __name__ == "__main__":
    main()
