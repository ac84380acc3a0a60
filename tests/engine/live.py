"""One real engine for the whole session: vLLM with our scheduler and the tiny model, in 128 blocks of 32 tokens.

It is started by the first test that asks for the fixture `engine` (20 to 40 s) and shared by all. Tests that kill it wait until
it is ready again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from engine import compat
from engine.launcher import EngineProcess, EngineSpec, EngineState
from tests.loop_thread import LoopThread

START_TIMEOUT_S = 240.0
MODEL_NAME = "tiny"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if compat.distribution() is None:
        for item in items:
            if item.get_closest_marker("engine") or item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


class LiveEngine:
    """The session's engine. Its model is served under the name `tiny`."""

    model = MODEL_NAME

    def __init__(self, spec: EngineSpec, loop: LoopThread) -> None:
        assert spec.forced_lengths is not None
        self.spec = spec
        self._loop = loop
        self._lengths: dict[str, int] = {}
        self._write_lengths()
        self._changed = threading.Condition()
        self.process = EngineProcess(spec, self._state_changed, backoff_first_s=0.1)
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
        with self._changed:
            assert self._changed.wait_for(lambda: self.process.state is state, timeout_s), self.process.progress()

    def kill(self) -> None:
        """SIGKILL to the server. Returns when the engine that takes its place is ready."""
        group = self.process.pid
        assert group is not None
        os.kill(group, signal.SIGKILL)
        self.wait_for_state(EngineState.STARTING)
        assert not group_runs(group), "vLLM's other processes outlived their server"
        self.wait_ready()

    def stop(self) -> None:
        group = self.process.pid
        self._loop.call(self.process.stop())
        assert group is None or not group_runs(group), "the engine left a process behind"
        self._run.result(5)

    def _state_changed(self, state: EngineState, detail: str) -> None:
        with self._changed:
            self._changed.notify_all()

    def _write_lengths(self) -> None:
        assert self.spec.forced_lengths is not None
        new = self.spec.forced_lengths.with_suffix(".new")
        new.write_text(json.dumps(self._lengths))
        new.replace(self.spec.forced_lengths)


def group_runs(group: int) -> bool:
    """Whether a process of this group runs. Zombies, which wait for their parent, do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent group …", and the name may hold anything
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


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
