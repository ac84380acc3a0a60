"""The demo: one trace of agents, one real engine, two policies, and what it made of their completion times.

A tiny model is made on the spot and served by vLLM with a KV cache so small that memory is what the agents compete for.
Three gateways follow one another before it: one that serves other agents first, so that the predictor knows the classes
as it would on a server that has been up for a while; then, both starting with what that one had learned, `fcfs` and
`justitia` with the same trace. How long each answer becomes is known to the engine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.launcher import EngineFailed, EngineProcess, EngineSpec, EngineState, on_cpu
from engine.link import LinkError
from gateway.agent_trace import AgentTrace, write_trace
from gateway.config.settings import cache_home
from gateway.demo import report
from gateway.demo.client import ReplayOptions, ReplayResult, replay
from gateway.demo.engine_watch import watching
from gateway.demo.processes import ServerFailed, apart, free_port, run_once, server
from gateway.demo.progress import ReplayProgress
from gateway.demo.settings import DemoSettings
from gateway.demo.workload import demo_mix, length_key, length_table
from gateway.replay import environment

MODEL = "tiny"
BLOCK_SIZE = 32  # tokens; the smallest that vLLM's CPU attention takes
MAX_MODEL_LEN = 1024
# An engine that is still loading does not heed SIGTERM, and has nothing to lose.
ENGINE_STOP_S = 5.0
BASELINE, POLICY = "fcfs", "justitia"
# Exit codes by custom: 128 and the signal's number.
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Stage:
    """What all replays of one demo have in common."""

    settings: DemoSettings
    engine: EngineSpec
    states: Path  # a directory for the gateways' state files
    console: Console

    async def replay(self, name: str, policy: str, agents: list[AgentTrace]) -> tuple[ReplayResult, report.Run]:
        """One trace through one gateway with the state file `name`. Raises `ServerFailed`."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "gateway.cli", "gateway", "--engine", self.engine.url]
        command += ["--link", self.engine.link_address, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--policy", policy, "--state", f"sqlite:///{self.state(name)}", "--no-train"]
        log = self.settings.out / "logs" / f"gateway-{name}.log"
        async with (
            watching(self.engine.link_address) as watch,
            server(f"the gateway ({policy})", command, ready_url=f"{url}/ready", log=log),
        ):
            progress = ReplayProgress(self.console, name, agents, watch.describe)
            watch.outstanding = lambda: progress.outstanding
            salt = length_salt(self.settings)
            options = ReplayOptions(url, MODEL, length_key=lambda *names: length_key(salt, *names), watcher=progress)
            with progress.shown():
                result = await replay(agents, options)
        return result, report.summarise(policy, agents, result, engine=watch.figures())

    def state(self, name: str) -> Path:
        return self.states / f"{name}.db"

    def copy_state(self, source: str, *names: str) -> None:
        """The gateway that wrote it has ended."""
        for name in names:
            with (
                contextlib.closing(sqlite3.connect(self.state(source))) as old,
                contextlib.closing(sqlite3.connect(self.state(name))) as new,
            ):
                old.backup(new)


async def run_demo(settings: DemoSettings, console: Console | None = None) -> int:
    """The exit code: 0 when every task was answered alike under both policies and the target is met, else 1.

    However it ends, no process is left.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    demo = asyncio.current_task()
    assert demo is not None
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        demo.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await _demo(settings, console)
    except (EngineFailed, ServerFailed, LinkError, OSError) as error:
        console.print(f"the demo failed: {error}", style="bold red", markup=False)
        return 1
    except asyncio.CancelledError:
        console.print("stopped")
        if not terminated:
            raise
        return TERMINATED
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


async def _demo(settings: DemoSettings, console: Console) -> int:
    (settings.out / "logs").mkdir(parents=True, exist_ok=True)
    with console.status("making the tiny model"):
        model = cache_home() / "tiny-model"
        # In a process of its own: this one is the client, and stays light without torch.
        command = [sys.executable, "-m", "engine.lab.tiny_model", str(model)]
        await run_once("making the tiny model", command, log=settings.out / "logs" / "model.log")
    count = token_counter(model)
    trace = demo_mix(settings.seed, settings.agents, settings.window_s, settings.scale, count)
    write_trace(trace, settings.out / "trace.jsonl")
    history: list[AgentTrace] = []
    if settings.history_agents:
        history = demo_mix(settings.history_seed, settings.history_agents, settings.window_s, settings.scale, count)
    # Sockets need a short path, and the state is of no use afterwards.
    with tempfile.TemporaryDirectory(prefix="justitia-demo-") as temporary:
        lengths = Path(temporary) / "lengths.json"
        lengths.write_text(json.dumps(length_table([history, trace], length_salt(settings))))
        async with started_engine(settings, model, lengths, Path(temporary), console) as engine:
            stage = Stage(settings, engine, Path(temporary), console)
            if history:
                console.print(f"{len(history)} other agents first, for the predictor to learn from")
                learned, _ = await stage.replay("history", BASELINE, history)
                _say_errors(console, "history", learned)
                stage.copy_state("history", BASELINE, POLICY)
            console.print(f"now {len(trace)} agents with {sum(len(agent.tasks) for agent in trace)} tasks, twice")
            before, baseline = await stage.replay(BASELINE, BASELINE, trace)
            after, run = await stage.replay(POLICY, POLICY, trace)
    return _conclude(settings, console, trace, (before, baseline), (after, run))


@contextlib.asynccontextmanager
async def started_engine(
    settings: DemoSettings,
    model: Path,
    lengths: Path,
    runtime_dir: Path,
    console: Console,
    link_interval_s: float | None = None,
) -> AsyncIterator[EngineSpec]:
    """A running engine. link_interval_s: see `JustitiaScheduler`. Raises `EngineFailed`."""
    spec = EngineSpec(
        model=str(model),
        runtime_dir=runtime_dir,
        kv_blocks=settings.kv_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        forced_lengths=lengths,
        link_interval_s=link_interval_s,
        # Without a prefix cache: the second replay would find beginnings of prompts that the first one left there.
        extra_args=("--served-model-name", MODEL, "--no-enable-prefix-caching"),
    )
    with console.status("starting the engine") as status:

        def show(state: EngineState, detail: str) -> None:
            status.update(f"engine {state}: {detail}")
            if not console.is_terminal:
                console.print(f"engine {state}: {detail}")

        process = EngineProcess(spec, show)
        try:
            await process.start()
            await process.wait_ready(settings.engine_start_s)
            status.stop()
            console.print(f"the engine serves: vLLM, {settings.kv_blocks * BLOCK_SIZE:,} tokens of KV cache")
            with apart(process.pid) if process.pid is not None and on_cpu() else contextlib.nullcontext():
                yield spec
        finally:
            status.update("stopping the engine")
            status.start()
            await process.stop(ENGINE_STOP_S)
            with contextlib.suppress(OSError):
                (settings.out / "logs" / "engine.log").write_bytes(spec.log.read_bytes())


def _conclude(
    settings: DemoSettings,
    console: Console,
    trace: list[AgentTrace],
    first: tuple[ReplayResult, report.Run],
    second: tuple[ReplayResult, report.Run],
) -> int:
    """Writes and shows the results, and judges them."""
    (before, baseline), (after, run) = first, second
    json_path, picture_path = settings.out / "results.json", settings.out / "jct.png"
    report.write_json(json_path, _config(settings), _trace_facts(settings, trace), [baseline, run])
    console.print()
    console.print(report.table(run, baseline))
    for each in (baseline, run):
        _say_engine(console, each)
    ratio = report.ratio(run, baseline)
    console.print(f"\n[bold]mean JCT of {POLICY} / {BASELINE}: {ratio:.2f}[/]  (target: at most {settings.target:g})")
    try:
        from gateway.demo import picture

        picture.draw(run, baseline, picture_path)
        console.print(f"picture  {picture_path}")
    except ImportError:
        console.print("no picture: matplotlib is not installed (the extra `demo`)", markup=False)
    except ValueError as error:
        console.print(f"no picture: {error}", markup=False)
    console.print(f"results  {json_path}")
    _say_errors(console, BASELINE, before)
    _say_errors(console, POLICY, after)
    differing = report.differing_tokens(before, after)
    if differing:
        console.print(f"{len(differing)} tasks have other token counts in the two runs: they cannot be compared")
    missed = not ratio <= settings.target
    if missed:
        console.print(f"the target is missed: {ratio:.2f} is above {settings.target:g}")
    return 1 if missed or before.errors or after.errors or differing else 0


def _say_engine(console: Console, run: report.Run) -> None:
    summary = run.summary
    if summary.iterations is None or summary.mean_kv_usage is None:
        return
    console.print(
        f"{run.policy:>9}: {summary.makespan_s:.1f} s, {summary.iterations:,} iterations, KV cache "
        f"{summary.mean_kv_usage:.0%} full while tasks waited, {summary.preemptions} preemptions, predicted costs off "
        f"by × {report.prediction_factor(run):.2f} (median)"
    )


def _say_errors(console: Console, name: str, result: ReplayResult) -> None:
    if not result.errors:
        return
    console.print(f"{name}: {len(result.errors)} of {len(result.tasks)} tasks failed", style="bold red")
    for error, count in Counter(task.error for task in result.errors).most_common(5):
        console.print(f"  {count} × {error}", markup=False)


def _config(settings: DemoSettings) -> dict[str, Any]:
    return {
        "benchmark": "demo",
        "settings": settings.model_dump(mode="json", exclude={"out"}),
        "block_size": BLOCK_SIZE,
        "versions": environment.versions(),
        "machine": environment.machine(),
    }


def _trace_facts(settings: DemoSettings, trace: list[AgentTrace]) -> dict[str, Any]:
    tasks = [task for agent in trace for task in agent.tasks]
    return {
        "name": f"demo:{settings.seed}",
        "agents": len(trace),
        "tasks": len(tasks),
        "prompt_tokens": sum(task.prompt_tokens for task in tasks),
        "output_tokens": sum(task.output_tokens for task in tasks),
        "cost": sum(task.cost for task in tasks),
    }


def length_salt(settings: DemoSettings) -> str:
    return f"{settings.seed}-{settings.history_seed}"


def token_counter(model: Path) -> Callable[[str], int]:
    """Tokens of a prompt as the engine will count them, its chat template included."""
    from tokenizers import Tokenizer  # comes with the engine

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda prompt: len(tokenizer.encode(f"<|user|>\n{prompt}\n<|assistant|>\n").ids)
