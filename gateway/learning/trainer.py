"""`justitia predictor train`: one training, by a user or by the gateway (`training`), which runs the same command.

It is made to be run beside a gateway: it steps back for everybody else's work, and has bounds in time and memory that the
kernel holds it to. Two at once there are not, whoever started them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from gateway.config.settings import StateSettings
from gateway.extras import can_train, how_to_get
from gateway.learning.serving import created_at
from gateway.learning.store import console, kept_store
from gateway.learning.training import BUSY, TOO_FEW_AGENTS, Note, threads, write_note
from gateway.state import StateError, Store, without_texts
from gateway.telemetry.metrics import TrainingOutcome
from predictor.model import Boosted, ModelError, load
from predictor.registry import Registry, RegistryError
from predictor.types import FinishedAgent

NICE = 10
# Of the kernel's choice when memory runs out, at most 1000: rather this than the engine.
FIRST_TO_GO = 1000
LOCK = "training.lock"


class TrainSettings(StateSettings):
    """`justitia predictor train`: a new model from the agents that are kept; it takes over if it is better."""

    seed: int = Field(0, ge=0, description="Seed of the training.")


@dataclass(frozen=True, slots=True)
class Kept:
    """Of the store, at a time in seconds since 1970. added: how many it had ever been given."""

    at: float
    added: int
    agents: list[FinishedAgent]


def step_back(limit_s: float, memory_mib: int) -> None:
    """Of this process, for good: last in line for the processors, first to go when memory runs out, and ended by the kernel
    after `limit_s`, whatever it is doing then."""
    os.nice(NICE)
    with contextlib.suppress(OSError):  # not everybody is let
        Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))
    # Data, not addresses: XGBoost and BLAS reserve far more of those than they come to use.
    wanted, (_, hard) = memory_mib * 2**20, resource.getrlimit(resource.RLIMIT_DATA)
    # A hard limit that is set already cannot be raised.
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    # Without a handler the alarm ends the process, also in the midst of native code.
    signal.setitimer(signal.ITIMER_REAL, limit_s)


@contextlib.contextmanager
def alone(models: Path) -> Iterator[bool]:
    """Whether no other training is at work on these models. Raises `OSError`."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True  # the lock goes with the file, and so with the process


def run_train(settings: TrainSettings) -> int:
    """0; 1 when it failed; 2 when there is no such state, or no library to train with; `TOO_FEW_AGENTS`; `BUSY` when another
    is at work."""
    if not can_train():
        _say(how_to_get("xgboost"))
        return 2
    models = settings.models_directory
    store = kept_store("predictor train", settings)
    if store is None or models is None:
        return 2
    step_back(settings.train_limit_s, settings.train_memory_mib)
    try:
        with alone(models) as is_alone:
            if is_alone:
                return _train(settings, models, asyncio.run(_read(store)))
            _say("another training is at work on these models")
            return BUSY
    except MemoryError:
        _say(
            f"{settings.train_memory_mib} MiB of memory are not enough (--train-memory-mib, --kept-agents of the gateway)"
        )
    except (StateError, RegistryError, OSError) as error:
        _say(str(error))
    return 1


def _train(settings: TrainSettings, models: Path, kept: Kept) -> int:
    """Raises `RegistryError`, `OSError` and `MemoryError`."""
    # In no other process, and in this one after it has stepped back.
    from xgboost.core import XGBoostError

    from predictor.train import TooFewAgents, train

    begun_s = time.monotonic()
    registry = Registry(models)
    champion = _champion(registry)
    version: int | None = None

    def note(outcome: TrainingOutcome) -> None:
        write_note(models, Note(kept.added, kept.at, time.monotonic() - begun_s, outcome, version))

    try:
        trained = train(
            kept.agents,
            champion,
            unseen=None if champion is None else unseen(kept.agents, created_at(champion.told)),
            seed=settings.seed,
            nthread=threads(),
            created=datetime.fromtimestamp(kept.at, UTC).isoformat(timespec="milliseconds"),
        )
    except TooFewAgents as error:
        note(TrainingOutcome.TOO_FEW)
        _say(str(error))
        return TOO_FEW_AGENTS
    except XGBoostError as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        _say(f"xgboost: {error}")
        return 1
    report = trained.report
    if report.promote:
        version = registry.add(trained.model.encoded())
        registry.promote(version)
    note(TrainingOutcome.UNCHANGED if version is None else TrainingOutcome.PROMOTED)
    _say(
        f"{report.agents} agents, of which the newest {report.held_out} were held out; {report.rows} rows,"
        f" {report.left_out} left out; {time.monotonic() - begun_s:.1f} s"
    )
    _say(f"{'the model before stays' if version is None else f'{version:06} serves'}: {report.reason}")
    return 0


async def _read(store: Store) -> Kept:
    """Raises `StateError`."""
    try:
        return Kept(time.time(), await store.added(), [without_texts(agent) async for agent in store.read()])
    finally:
        await store.close()


def _champion(registry: Registry) -> Boosted | None:
    """The model that a new one must beat: none, if the current one cannot be used. Raises `RegistryError`."""
    version = registry.current()
    try:
        return None if version is None else load(registry.path(version))
    except ModelError as error:
        _say(f"the current model is passed over: {error}")
        return None


def unseen(agents: Sequence[FinishedAgent], made_at: float) -> int | None:
    """How many of them have finished since a model was made (seconds since 1970); None if that is not known."""
    if not made_at:
        return None
    return sum(
        agent.arrived_at + max((task.ended_s for task in agent.tasks), default=0.0) > made_at for agent in agents
    )


def _say(text: str) -> None:
    console.print(f"justitia predictor train: {text}", markup=False)
