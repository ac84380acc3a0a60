"""When a training is due, and what can become of its process: stand-ins do what a trainer should not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import extras
from gateway.config.settings import GatewaySettings, Live
from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Serves
from gateway.learning.training import BACKOFF_MAX_S, NOTE, Note, Training, read_note, run, write_note
from gateway.state import Journal, StateError
from gateway.state.memory import MemoryStore
from gateway.telemetry.metrics import Metrics, TrainingOutcome
from predictor.types import FinishedAgent, FinishedTask

pytestmark = pytest.mark.wire

SAY = "import sys, os, time, signal, pathlib; "
HANG = SAY + "print('hanging', flush=True); time.sleep(3600)"
NOTED = (
    SAY + "pathlib.Path(os.environ['JUSTITIA_MODELS'], 'training.json').write_text("
    '\'{"added": 7, "at": %f, "seconds": 1, "outcome": "promoted"}\' % time.time())'
)


class Looks:
    """In place of what serves."""

    serves: Serves | None = None
    looked = 0

    async def look(self) -> None:
        self.looked += 1


class Scene:
    def __init__(self, models: Path, script: str = "", **settings: Any) -> None:
        self.now = 1000.0
        self.looked = 0  # at the clock
        self.models, self.store, self.accuracy, self.learning = models, MemoryStore(), Accuracy(), Looks()
        self.registry = CollectorRegistry()
        metrics = Metrics(self.registry)
        metrics.state.reads(Journal(self.store))
        self.live = Live(GatewaySettings(state="memory:", models=models, **settings))
        self.training = Training(
            self.live,
            models,
            self.store,
            self.learning,  # type: ignore[arg-type]
            self.accuracy,
            metrics,
            command=[sys.executable, "-c", script],
            grace_s=0.2,
            poll_s=0.01,
            clock=self._clock,
        )

    def _clock(self) -> float:
        self.looked += 1
        return self.now

    async def finish(self, count: int) -> None:
        for _ in range(count):
            await self.store.append(FinishedAgent("kind", "t", [FinishedTask(40, 10, 0, 5)]))

    async def is_due(self) -> bool:
        return await self.training._is_due()

    def trained(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("justitia_trainings_total", {"outcome": outcome})

    def note(self, added: int) -> None:
        write_note(self.models, Note(added, time.time(), 1.0, TrainingOutcome.UNCHANGED))


@pytest.mark.parametrize(("every", "first", "later"), [(200, 100, 200), (30, 30, 30)])
async def test_a_training_is_due_after_so_many_agents(tmp_path: Path, every: int, first: int, later: int) -> None:
    scene = Scene(tmp_path, train_every=every)
    await scene.finish(first - 1)
    assert not await scene.is_due()
    await scene.finish(1)
    assert await scene.is_due()
    scene.note(first)
    assert not await scene.is_due()
    await scene.finish(later - 1)
    assert not await scene.is_due()
    await scene.finish(1)
    assert await scene.is_due()


async def test_what_was_trained_is_remembered_over_a_restart_but_not_for_another_store(tmp_path: Path) -> None:
    scene = Scene(tmp_path, train_every=10)
    await scene.finish(10)
    scene.note(10)
    again = Scene(tmp_path, train_every=10)
    assert not await again.is_due()
    await again.finish(9)
    assert not await again.is_due(), "a new store, with fewer than had been seen"
    await again.finish(1)
    assert not await again.is_due(), "as many: nobody can tell"
    (tmp_path / NOTE).write_bytes(b"{")
    assert await again.is_due(), "a note that cannot be read is none"


@pytest.mark.parametrize(
    ("validated", "served", "agents", "new", "due"),
    [
        (0.3, 0.65, 50, 50, True),
        (0.3, 0.65, 49, 50, False),  # too few to judge by
        (0.3, 0.65, 50, 49, False),  # too few to learn from
        (0.3, 0.5, 50, 50, False),  # less than twice as bad
        (0.6, 0.85, 50, 50, True),  # nothing that is predicted too small can be twice as bad
        (0.05, 0.2, 50, 50, False),  # bad only for one that was very good
    ],
)
async def test_drift_makes_a_training_due(
    tmp_path: Path, validated: float, served: float, agents: int, new: int, due: bool
) -> None:
    scene = Scene(tmp_path)
    scene.note(0)
    await scene.finish(new)
    scene.learning.serves = Serves("xgboost-000004", 4, 1e9, validated)
    for _ in range(agents):
        scene.accuracy.judge("xgboost-000004", 100 * (1 - served), 200.0, 100.0)
        scene.accuracy.judge("ladder", 100.0, 200.0, 1e9)  # is not the model's fault
    assert await scene.is_due() is due


async def test_a_training_that_went_well_is_told_and_what_is_current_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, NOTED + "; print('so many trees')")
    with caplog.at_level(logging.INFO):
        assert await scene.training.train() is TrainingOutcome.PROMOTED
    assert scene.trained("promoted") == 1
    assert scene.learning.looked == 1
    assert "trainer: so many trees" in caplog.text


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("raise SystemExit(1)", TrainingOutcome.FAILED),
        ("raise SystemExit(3)", TrainingOutcome.TOO_FEW),
        ("raise SystemExit(4)", TrainingOutcome.BUSY),
        ("pass", TrainingOutcome.FAILED),  # a good end, but nothing was noted
        (SAY + "os.kill(os.getpid(), signal.SIGKILL)", TrainingOutcome.KILLED),  # as when memory runs out
        (SAY + "os.kill(os.getpid(), signal.SIGALRM)", TrainingOutcome.LATE),
        (SAY + "print('x' * 10**6); raise SystemExit(1)", TrainingOutcome.FAILED),
        (HANG, TrainingOutcome.LATE),
    ],
)
async def test_however_it_ends_the_gateway_goes_on(tmp_path: Path, script: str, outcome: TrainingOutcome) -> None:
    scene = Scene(tmp_path, script, train_limit_s=0.5)
    scene.note(0)
    assert await scene.training.train() is outcome
    assert scene.trained(outcome) == 1


async def test_a_trainer_that_cannot_be_started_is_a_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.training._command = [str(tmp_path / "nothing")]
    assert await scene.training.train() is TrainingOutcome.FAILED


async def test_failures_put_the_next_one_off_ever_longer_and_a_success_forgets_them(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "raise SystemExit(1)", train_every=1)
    waits = []
    for _ in range(9):
        await scene.training.train()
        waits.append(scene.training._not_before_s - scene.now)
    assert waits[:3] == [60, 120, 240]
    assert waits[-1] == BACKOFF_MAX_S
    scene.training._command[-1] = NOTED
    await scene.training.train()
    scene.training._command[-1] = "raise SystemExit(1)"
    await scene.training.train()
    assert scene.training._not_before_s - scene.now == 60


async def test_while_another_gateway_trains_this_one_waits_and_that_is_no_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "raise SystemExit(4)")
    for _ in range(4):
        assert await scene.training.train() is TrainingOutcome.BUSY
        assert scene.training._not_before_s - scene.now == 60
    scene.training._command[-1] = "raise SystemExit(1)"
    await scene.training.train()
    assert scene.training._not_before_s - scene.now == 60, "the first failure"
    assert (scene.trained("busy"), scene.trained("failed")) == (4, 1)


async def test_the_watch_trains_once_at_a_time_and_waits_after_a_failure(tmp_path: Path) -> None:
    """The stand-in says no when another runs."""
    alone = tmp_path / "running"
    script = (
        SAY + f"p = pathlib.Path({str(alone)!r}); p.touch(exist_ok=False); time.sleep(0.1); p.unlink(); sys.exit(1)"
    )
    scene = Scene(tmp_path, script, train_every=1)
    await scene.finish(1)
    watch = asyncio.create_task(scene.training.watch())
    for failures in (1, 2, 3):
        async with asyncio.timeout(20):
            while scene.trained("failed") != failures:
                await asyncio.sleep(0.01)
        looked = scene.looked
        async with asyncio.timeout(20):
            while scene.looked < looked + 10:
                await asyncio.sleep(0.01)
        assert scene.trained("failed") == failures
        scene.now += BACKOFF_MAX_S
    watch.cancel()
    await asyncio.wait((watch,))


async def test_it_can_be_turned_off_and_on_while_it_watches(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "raise SystemExit(1)", train_every=1, train=False)
    await scene.finish(1)
    assert await scene.is_due()
    watch = asyncio.create_task(scene.training.watch())
    await asyncio.sleep(0.1)  # ten looks
    assert scene.trained("failed") == 0
    scene.live.settings = scene.live.settings.model_copy(update={"train": True})
    async with asyncio.timeout(20):
        while scene.trained("failed") != 1:
            await asyncio.sleep(0.01)
    watch.cancel()
    await asyncio.wait((watch,))


async def test_at_shutdown_no_process_is_left_not_even_a_grandchild(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = SAY + f"c = os.fork(); open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(3600)"
    scene = Scene(tmp_path, script, train_every=1)
    await scene.finish(1)
    watch = asyncio.create_task(scene.training.watch())
    async with asyncio.timeout(20):
        while not pids.exists() or len(pids.read_text().split()) < 2:
            await asyncio.sleep(0.01)
    watch.cancel()
    await asyncio.wait((watch,))
    async with asyncio.timeout(20):
        while any(_runs(int(pid)) for pid in pids.read_text().split()):
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    """A zombie of somebody else's does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _zombies() -> list[Path]:
    """Children of ours that nobody has asked for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[:2] == ["Z", str(os.getpid())]:
                found.append(stat)
    return found


async def test_no_zombie_is_left(tmp_path: Path) -> None:
    assert await run([sys.executable, "-c", "raise SystemExit(5)"], os.environ, 60) == 5
    assert not _zombies()


async def test_a_store_that_fails_is_said_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path, train_every=1)

    async def fails() -> int:
        raise StateError("gone")

    await scene.finish(1)
    with monkeypatch.context() as patched:
        patched.setattr(scene.store, "added", fails)
        assert not await scene.is_due()
        assert not await scene.is_due()
    assert caplog.text.count("whether a training is due: gone") == 1
    assert scene.registry.get_sample_value("justitia_state_errors_total") == 1
    assert await scene.is_due()


async def test_the_trainer_is_told_its_settings_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTITIA_PORT", "1")
    monkeypatch.setenv("JUSTITIA_CONFIG", "/nowhere")
    told = Scene(tmp_path, train_memory_mib=777).training._environment()
    ours = {name: value for name, value in told.items() if name.startswith("JUSTITIA_")}
    assert ours == {
        "JUSTITIA_CONFIG": os.devnull,
        "JUSTITIA_STATE": "memory:",
        "JUSTITIA_MODELS": str(tmp_path),
        "JUSTITIA_TRAIN_LIMIT_S": "900.0",
        "JUSTITIA_TRAIN_MEMORY_MIB": "777",
    }
    assert int(told["OMP_NUM_THREADS"]) >= 1


def test_a_note_comes_back(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    note = Note(5, 1e9, 2.5, TrainingOutcome.TOO_FEW)
    write_note(tmp_path, note)
    assert read_note(tmp_path) == note
    for odd in (b'{"outcome":"\xff"}', b'{"new":' + b"[" * 100_000):  # no UTF-8; too deep
        (tmp_path / NOTE).write_bytes(odd)
        assert read_note(tmp_path) is None


async def test_without_the_library_that_trains_it_reports_so_once_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    scene = Scene(tmp_path, NOTED, train_every=1)
    await scene.finish(1)
    asked = asyncio.Semaphore(0)

    def can_train() -> bool:
        asked.release()
        return extras.can_train()

    monkeypatch.setattr("gateway.learning.training.can_train", can_train)
    watching = asyncio.create_task(scene.training.watch())
    async with asyncio.timeout(10):
        for _ in range(3):
            await asked.acquire()
    watching.cancel()
    assert caplog.text.count("pip install 'justitia[train]'") == 1
    assert read_note(tmp_path) is None
