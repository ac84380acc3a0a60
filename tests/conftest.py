"""One real engine for the whole session, and what starts it.

It is started by the first test that asks for it (20 to 40 s) and shared by all: real vLLM with our scheduler and the
tiny model, in 128 blocks of 32 tokens. Tests that kill it wait until it is ready again.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

from engine import compat
from engine.lab import tiny_model
from engine.launcher import EngineProcess, EngineSpec, EngineState, _group_runs
from tests.fuzz.bounds import TIMES

START_TIMEOUT_S = 240.0
MODEL_NAME = "tiny"

T = TypeVar("T")

# The same examples each time, unless more of them are asked for. No deadline: a busy machine is no defect of the code.
hypothesis.settings.register_profile("seeded", derandomize=TIMES == 1, deadline=None)
hypothesis.settings.load_profile("seeded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compat.distribution() is None:
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gateway of the user's own may have keys: no test is to ask for them, or to change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


class LoopThread:
    """An event loop of its own, so that synchronous and asynchronous tests share what lives in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = START_TIMEOUT_S) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


class LiveEngine:
    """The session's engine. Its model is served under the name `tiny`."""

    model = MODEL_NAME

    def __init__(self, spec: EngineSpec, loop: LoopThread) -> None:
        assert spec.forced_lengths is not None
        self.spec = spec
        self._loop = loop
        self._lengths: dict[str, int] = {}
        self._write_lengths()
        self.process = EngineProcess(spec, backoff_first_s=0.1)
        self._run = asyncio.run_coroutine_threadsafe(self.process.run(), loop.loop)
        self.wait_ready()

    @property
    def url(self) -> str:
        return self.spec.url

    @property
    def socket(self) -> str:
        """The path of the Unix socket, for HTTP clients."""
        return str(self.spec.socket)

    @property
    def link_address(self) -> str:
        return self.spec.link_address

    def lengths(self, lengths: Mapping[str, int]) -> None:
        """Adds keys to the table of forced lengths. They hold at once."""
        self._lengths.update(lengths)
        self._write_lengths()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        self._loop.call(self.process.wait_ready(timeout_s), timeout_s + 5)

    def wait_for_state(self, state: EngineState, timeout_s: float = 30.0) -> None:
        async def reached() -> None:
            while self.process.state is not state:
                await self.process._changed.wait()

        self._loop.call(reached(), timeout_s)

    def kill(self) -> None:
        """SIGKILL to the server. Returns when the engine that takes its place is ready."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        group = self.process.pid
        self.wait_for_state(EngineState.STARTING)
        assert not _group_runs(group), "vLLM's other processes outlived their server"
        self.wait_ready()

    def stop(self) -> None:
        group = self.process.pid
        self._loop.call(self.process.stop())
        assert group is None or not _group_runs(group), "the engine left a process behind"
        self._run.result(5)

    def _write_lengths(self) -> None:
        assert self.spec.forced_lengths is not None
        new = self.spec.forced_lengths.with_suffix(".new")
        new.write_text(json.dumps(self._lengths))
        new.replace(self.spec.forced_lengths)


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A short path: pytest's own are too long for Unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="justitia-", dir="/tmp"))
    yield directory
    if "JUSTITIA_KEEP" not in os.environ:  # set it to read the engine's log afterwards
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model_dir(session_dir: Path) -> Path:
    return tiny_model.make(session_dir / "model")


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def engine(session_dir: Path, tiny_model_dir: Path, loop_thread: LoopThread) -> Iterator[LiveEngine]:
    spec = EngineSpec(
        model=str(tiny_model_dir),
        runtime_dir=session_dir / "engine",
        kv_blocks=128,
        block_size=32,
        max_num_seqs=64,
        max_model_len=2048,
        forced_lengths=session_dir / "lengths.json",
        extra_args=("--served-model-name", MODEL_NAME),
    )
    with pytest.MonkeyPatch.context() as environment:
        # Else vLLM keeps no response that could be fetched, cancelled or gone on from.
        environment.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        live = LiveEngine(spec, loop_thread)
        yield live
        live.stop()
