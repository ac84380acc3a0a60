"""New models, trained while the gateway serves.

A training is the command `justitia predictor train`, in a process of its own: nothing of it is in the way of requests, and
however it ends, the gateway goes on. It is due when enough agents have finished since the last one, or when the model that
serves has become much worse than it was. What the last training came to is noted beside the models, by the command itself,
so that neither a restart nor another gateway trains on the same agents again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from gateway.config.settings import GatewaySettings, Live
from gateway.extras import can_train, how_to_get
from gateway.learning.accuracy import Accuracy
from gateway.learning.serving import Learning
from gateway.state import StateError, Store
from gateway.telemetry.metrics import Metrics, TrainingOutcome
from predictor.files import write_atomically

logger = logging.getLogger(__name__)

POLL_S = 5.0
# Agents for the first training, unless `train_every` is less.
FIRST = 100
# Drift: on so many agents that the model predicted, its error is twice what it was on those held out, and not small.
DRIFT_AGENTS, DRIFT_ERROR = 50, 0.25
# A training that failed is tried again after this long, doubled each time.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 60.0, 3600.0
# The trainer ends itself at its limit. It is killed if it has not so long after.
GRACE_S = 10.0

TOO_FEW_AGENTS, BUSY = 3, 4  # exit codes of the command; the others are as of all commands
NOTE = "training.json"


class Note(msgspec.Struct, frozen=True):
    """What the last training came to. added: agents that the store had ever been given by then. at: seconds since 1970.
    version: of the model that was made, if one was."""

    added: int
    at: float
    seconds: float
    outcome: TrainingOutcome
    version: int | None = None


def read_note(models: Path) -> Note | None:
    """None if there is none that can be read: then it is as if nothing had been trained."""
    try:
        return msgspec.json.decode((models / NOTE).read_bytes(), type=Note)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def write_note(models: Path, note: Note) -> None:
    """Raises `OSError`."""
    write_atomically(models / NOTE, [msgspec.json.encode(note)])


class Training:
    """command: for tests. clock: seconds, monotonic."""

    def __init__(
        self,
        live: Live,
        models: Path,
        store: Store,
        learning: Learning,
        accuracy: Accuracy,
        metrics: Metrics,
        *,
        command: Sequence[str] | None = None,
        grace_s: float = GRACE_S,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._models = live, models
        self._store, self._learning, self._accuracy, self._metrics = store, learning, accuracy, metrics
        self._command = list(command or (sys.executable, "-P", "-m", "gateway.cli", "predictor", "train"))
        self._grace_s, self._poll_s, self._clock = grace_s, poll_s, clock
        self._failures, self._not_before_s = 0, 0.0
        self._store_failed = False

    async def watch(self) -> None:
        told = False
        while True:
            if self._settings.train and not can_train():
                if not told:
                    logger.warning("no models are trained, and what serves goes on: training %s", how_to_get("xgboost"))
                told = True
            elif self._settings.train and self._clock() >= self._not_before_s and await self._is_due():
                await self.train()
            await asyncio.sleep(self._poll_s)

    async def train(self) -> TrainingOutcome:
        """Train once, whether it is due or not. What comes of it is in the metrics, and the next is put off if it failed."""
        begun_s, before = self._clock(), read_note(self._models)
        logger.info("training a new model")
        try:
            code = await run(self._command, self._environment(), self._settings.train_limit_s + self._grace_s)
        except OSError as error:
            logger.warning("the trainer cannot be started: %s", error)
            code = 1
        outcome = self._outcome(code, before)
        self._metrics.learning.trained(outcome, self._clock() - begun_s)
        if outcome in (TrainingOutcome.PROMOTED, TrainingOutcome.UNCHANGED, TrainingOutcome.TOO_FEW):
            logger.info("training took %.1f s: %s", self._clock() - begun_s, outcome)
            self._failures = 0
            await self._learning.look()
            return outcome
        if outcome is TrainingOutcome.BUSY:
            # What comes of the other one is noted when it ends, and then none may be due.
            self._not_before_s = self._clock() + BACKOFF_FIRST_S
            logger.info("another training is at work on these models; looked at again in %g s", BACKOFF_FIRST_S)
            return outcome
        wait_s = min(BACKOFF_FIRST_S * 2**self._failures, BACKOFF_MAX_S)
        self._failures += 1
        self._not_before_s = self._clock() + wait_s
        logger.warning("training failed after %.1f s (%s); again in %g s", self._clock() - begun_s, outcome, wait_s)
        return outcome

    @property
    def _settings(self) -> GatewaySettings:
        return self._live.settings

    async def _is_due(self) -> bool:
        try:
            added = await self._store.added()
        except StateError as error:
            if not self._store_failed:
                logger.warning("the state store does not say whether a training is due: %s", error)
                self._metrics.state.failed()
            self._store_failed = True
            return False
        self._store_failed = False
        note = await asyncio.to_thread(read_note, self._models)
        if note is None:
            return added >= min(FIRST, self._settings.train_every)
        # A store that has been given fewer is another one.
        new = added - note.added if added >= note.added else added
        return new >= self._settings.train_every or (new >= DRIFT_AGENTS and self._has_drifted())

    def _has_drifted(self) -> bool:
        serves = self._learning.serves
        if serves is None or math.isnan(serves.error):
            return False
        agents, error = self._accuracy.error(serves.name)
        # A model that predicts far too little has an error of 1, however much too little: half way there is too far, too.
        if agents < DRIFT_AGENTS or error < max(DRIFT_ERROR, min(2 * serves.error, (1 + serves.error) / 2)):
            return False
        logger.info("the model %s has drifted: its error is %.2f, and was %.2f", serves.name, error, serves.error)
        return True

    def _outcome(self, code: int | None, before: Note | None) -> TrainingOutcome:
        if code is None or code == -signal.SIGALRM:
            return TrainingOutcome.LATE
        if code < 0:
            return TrainingOutcome.KILLED
        if code == TOO_FEW_AGENTS:
            return TrainingOutcome.TOO_FEW
        if code == BUSY:
            return TrainingOutcome.BUSY
        note = read_note(self._models)
        if code == 0 and note is not None and note != before:
            return note.outcome
        return TrainingOutcome.FAILED

    def _environment(self) -> dict[str, str]:
        """Ours, without the settings that are not the trainer's. The state's URL may hold a password, so it is no argument."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JUSTITIA_")}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        settings = self._settings
        return environment | {
            "JUSTITIA_CONFIG": os.devnull,  # what it needs is here
            "JUSTITIA_STATE": settings.state,
            "JUSTITIA_MODELS": str(self._models),
            "JUSTITIA_TRAIN_LIMIT_S": str(settings.train_limit_s),
            "JUSTITIA_TRAIN_MEMORY_MIB": str(settings.train_memory_mib),
            "OMP_NUM_THREADS": str(threads()),
        }


def threads() -> int:
    """For a training: half of the machine at most, as it is not urgent. OpenMP's wait for each other at full speed."""
    return max(1, (os.cpu_count() or 1) // 2)


async def run(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> int | None:
    """Its exit code, negative for a signal; None if it took longer than `limit_s`. What it says is logged. When this ends,
    however it does, no process is left. Raises `OSError`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(limit_s):
            await _log(process.stdout)
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it has started
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _log(lines: asyncio.StreamReader) -> None:
    while True:
        try:
            line = await lines.readline()
        except ValueError:  # longer than the reader holds; it has let go of it
            continue
        if not line:
            return
        logger.info("trainer: %s", line.decode(errors="replace").rstrip())
