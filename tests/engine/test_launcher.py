"""The launcher: over a fake engine where only the process matters, over vLLM where vLLM's behaviour does."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from engine import compat, launcher
from engine.launcher import EngineFailed, EngineProcess, EngineSpec, EngineState, _group_runs

pytestmark = pytest.mark.wire

FAKE = Path(__file__).with_name("fake_engine.py")
READY_S = 20.0


class FakeSpec(EngineSpec):
    """Starts the fake engine; extra_args say how it behaves."""

    def command(self) -> list[str]:
        return [sys.executable, str(FAKE), str(self.socket), *self.extra_args]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[EngineState, str]] = []

    def __call__(self, state: EngineState, detail: str) -> None:
        self.seen.append((state, detail))

    def states(self) -> list[EngineState]:
        """Without repetitions."""
        states = [state for state, _ in self.seen]
        return [state for i, state in enumerate(states) if i == 0 or states[i - 1] is not state]


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="justitia-", dir="/tmp") as directory:
        yield Path(directory)


Make = Callable[..., EngineProcess]


@pytest.fixture
async def make(runtime_dir: Path, recorder: Recorder) -> AsyncIterator[Make]:
    made: list[EngineProcess] = []

    def one(*how: str, failures_before_ready: int = 3) -> EngineProcess:
        spec = FakeSpec("nothing", runtime_dir, extra_args=how)
        process = EngineProcess(spec, recorder, failures_before_ready=failures_before_ready, backoff_first_s=0.01)
        made.append(process)
        return process

    yield one
    for process in made:
        await process.stop(grace_s=0.2)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# The command line


def test_the_command_line(runtime_dir: Path) -> None:
    spec = EngineSpec(
        "org/name",
        runtime_dir,
        kv_blocks=128,
        block_size=32,
        max_num_seqs=64,
        max_model_len=2048,
        forced_lengths=runtime_dir / "lengths.json",
        extra_args=("--served-model-name", "x"),
    )
    command = spec.command()
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = " ".join(command[3:])
    for expected in (
        "--model org/name",
        f"--uds {runtime_dir}/engine.sock",
        "--scheduling-policy priority",
        "--scheduler-cls engine.scheduler.JustitiaScheduler",
        "--enable-prompt-tokens-details",
        "--logits-processors engine.lab.forced_length:ForcedLength",
        "--num-gpu-blocks-override 128",
        "--block-size 32",
        "--max-num-seqs 64",
        "--max-model-len 2048",
    ):
        assert expected in options
    assert command[-2:] == ["--served-model-name", "x"]  # the last one counts
    # What the fair queue needs, and vLLM does by itself, is not turned off.
    assert not re.search("--no-|--disable-(?!uvicorn-access-log)", options)
    additional = json.loads(command[command.index("--additional-config") + 1])
    assert additional == {"justitia": {"link": spec.link_address, "forced_lengths": str(runtime_dir / "lengths.json")}}
    assert spec.url == f"unix:{runtime_dir}/engine.sock"
    assert spec.link_address == f"ipc://{runtime_dir}/link.sock"
    assert spec.environment()["JUSTITIA_FORCED_LENGTHS"] == str(runtime_dir / "lengths.json")
    assert str(Path(launcher.__file__).parent.parent) in spec.environment()["PYTHONPATH"].split(os.pathsep)


def test_a_stock_engine_has_nothing_of_ours(runtime_dir: Path) -> None:
    command = EngineSpec("org/name", runtime_dir, scheduler="stock").command()
    assert not any("justitia" in argument or "engine." in argument for argument in command if "sock" not in argument)
    assert "--scheduling-policy" in command  # so that priorities still hold


def test_a_model_directory_is_meant_from_here(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runtime_dir / "model").mkdir()
    monkeypatch.chdir(runtime_dir)
    assert str(runtime_dir / "model") in EngineSpec("model", Path("run")).command()
    assert EngineSpec("model", Path("run")).runtime_dir == runtime_dir / "run"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_only_a_cpu_needs(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(launcher, "on_cpu", lambda: on_cpu)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    spec = EngineSpec("m", runtime_dir, kv_cache_gib=1.5)
    assert ("--enforce-eager" in spec.command()) == on_cpu
    assert ("--kv-cache-memory-bytes" in spec.command()) == (not on_cpu)
    assert spec.environment().get("VLLM_CPU_KVCACHE_SPACE") == ("2" if on_cpu else None)
    if on_cpu:
        with pytest.raises(ValueError, match="multiples of 32"):
            EngineSpec("m", runtime_dir, block_size=16)
    else:
        EngineSpec("m", runtime_dir, block_size=16)


def test_a_path_too_long_for_a_socket() -> None:
    with pytest.raises(
        ValueError, match=r"has 1\d\d bytes, and a Unix socket's may have 107: choose a shorter runtime"
    ):
        EngineSpec("m", Path("/tmp") / ("x" * 100))


# The process


async def test_it_becomes_ready_and_says_how_far_it_is(make: Make, recorder: Recorder, runtime_dir: Path) -> None:
    process = make()
    assert process.progress() == "stopped: not started"
    await process.start()
    await process.start()  # once is enough
    await process.wait_ready(READY_S)
    group = process.pid
    assert group is not None
    assert recorder.states() == [EngineState.STARTING, EngineState.READY]
    details = [detail for _, detail in recorder.seen]
    assert details[0] == "spawning"
    assert details[1] == f"spawned, pid {group}"
    assert details[2:] == ["loading the model", "KV cache ready, 4,096 tokens", "serving"]
    assert process.progress() == "ready: serving"
    # The child finds our package, and nothing in its directory can hide a module.
    assert f"cwd={runtime_dir}" in process.spec.log.read_text()
    await process.stop()
    assert process.state is EngineState.STOPPED
    assert process.pid is None
    assert not _group_runs(group)
    assert not process.spec.socket.exists()


async def test_it_fails_with_its_last_words(make: Make, recorder: Recorder) -> None:
    process = make("fail-3")
    await process.start()
    with pytest.raises(EngineFailed) as caught:
        await process.wait_ready(READY_S)
    assert caught.value.exit_code == 3
    assert caught.value.log_tail[-1] == "the last words"
    assert "exit code 3 before it was ready" in str(caught.value)
    assert "the last words" in str(caught.value)
    assert recorder.states() == [EngineState.STARTING, EngineState.FAILED]
    await process.stop()
    assert process.state is EngineState.FAILED


async def test_it_is_given_up_when_it_is_never_ready(make: Make, recorder: Recorder) -> None:
    process = make("fail-3", failures_before_ready=3)
    with pytest.raises(EngineFailed, match="given up after 3 starts"):
        await process.run()
    assert process.restarts == 2
    assert process.state is EngineState.FAILED
    with pytest.raises(EngineFailed, match="given up"):
        await process.wait_ready(READY_S)
    assert process.spec.log.with_suffix(".log.1").exists()


async def test_it_is_started_again_when_it_is_killed(make: Make, recorder: Recorder) -> None:
    process = make()
    run = asyncio.create_task(process.run())
    await asyncio.sleep(0)
    for restarts in range(3):
        await process.wait_ready(READY_S)
        assert process.restarts == restarts
        assert process.pid is not None
        recorder.seen.clear()
        os.kill(process.pid, signal.SIGKILL)
        while process.state is EngineState.READY:
            await process._changed.wait()
    await process.wait_ready(READY_S)
    assert recorder.states() == [EngineState.RESTARTING, EngineState.STARTING, EngineState.READY]
    assert "signal SIGKILL" in recorder.seen[0][1]
    await process.stop()
    await run


async def test_no_process_is_left(make: Make) -> None:
    """Neither the server nor its child listens to SIGTERM."""
    process = make("stubborn")
    await process.start()
    await process.wait_ready(READY_S)
    assert process.pid is not None
    group = process.pid
    await process.stop(grace_s=0.2)
    assert not _group_runs(group)


async def test_what_a_killed_server_leaves_is_ended(make: Make) -> None:
    process = make("stubborn")
    await process.start()
    await process.wait_ready(READY_S)
    assert process.pid is not None
    group = process.pid
    os.kill(group, signal.SIGKILL)
    while process.state is EngineState.READY:
        await process._changed.wait()
    assert not _group_runs(group)


async def test_waiting_has_an_end(make: Make) -> None:
    process = make("mute")
    await process.start()
    with pytest.raises(EngineFailed, match="not ready after 0 s") as caught:
        await process.wait_ready(0.3)
    assert caught.value.exit_code is None
    assert process.state is EngineState.STARTING


async def test_stopping_while_it_starts_and_while_it_pauses(make: Make) -> None:
    starting = make("mute")
    run = asyncio.create_task(starting.run())
    await asyncio.sleep(0)  # it spawns
    await starting.stop(grace_s=0.2)
    await run
    assert starting.pid is None
    pausing = make("fail-3", failures_before_ready=100)
    pausing._backoff_first_s = 600
    run = asyncio.create_task(pausing.run())
    while pausing.state is not EngineState.RESTARTING:
        await pausing._changed.wait()
    await pausing.stop()
    await asyncio.wait_for(run, 1)
    with pytest.raises(EngineFailed, match="stopped"):
        await pausing.wait_ready(1)


async def test_it_dies_with_us(runtime_dir: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from tests.engine.test_launcher import *\n"
        "async def main():\n"
        "    process = EngineProcess(FakeSpec('nothing', Path(sys.argv[1])))\n"
        "    await process.start(); await process.wait_ready(20); print(process.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(  # noqa: ASYNC220  # it is to be killed, and not waited for
        [sys.executable, "-c", script, str(runtime_dir)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as parent:
        assert parent.stdout is not None
        group = int(await asyncio.to_thread(parent.stdout.readline))
        assert _group_runs(group)
        parent.kill()
    async with asyncio.timeout(READY_S):
        while _group_runs(group):  # nobody tells us of another's children
            await asyncio.sleep(0.01)


async def test_a_wrong_vllm_is_told_before_the_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "distribution", lambda: ("vllm", "0.26.1"))
    process = make()
    with pytest.raises(EngineFailed, match=r"vllm 0\.26\.1 is installed, and >=0\.27,<0\.34 is supported"):
        await process.start()
    assert process.state is EngineState.FAILED


# vLLM


@pytest.mark.engine
async def test_an_unknown_model(runtime_dir: Path) -> None:
    process = EngineProcess(EngineSpec(str(runtime_dir / "nowhere"), runtime_dir))
    await process.start()
    try:
        with pytest.raises(EngineFailed) as caught:
            await process.wait_ready(120)
    finally:
        await process.stop()
    assert caught.value.exit_code == 1
    assert any("nowhere" in line for line in caught.value.log_tail)
