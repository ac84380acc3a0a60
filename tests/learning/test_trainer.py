"""`justitia predictor train`: real trainings. They run in this process, but for what they do to a process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from gateway.cli.predictor import run_predictor
from gateway.learning.trainer import LOCK, _read, unseen
from gateway.learning.training import BUSY, TOO_FEW_AGENTS, read_note
from gateway.state import open_store
from gateway.telemetry.metrics import TrainingOutcome
from predictor.model import Told
from predictor.registry import Registry
from predictor.types import FinishedAgent, FinishedTask
from tests.learning.conftest import State
from tests.predictor.made import Gateway

# What it does to a process cannot be undone. A whole training as a process is in `tests/wire/test_learning.py`.
as_a_process = pytest.mark.wire


@pytest.fixture(scope="module")
def agents() -> list[FinishedAgent]:
    """They finished a minute ago, one a millisecond."""
    begin = time.time() - 60
    served = Gateway().serve(150)
    return [msgspec.structs.replace(agent, arrived_at=begin + place / 1000) for place, agent in enumerate(served)]


@pytest.fixture
def models(state: State) -> Registry:
    return Registry(state.path.parent / "models")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its priority and its limits."""
    monkeypatch.setattr("gateway.learning.trainer.step_back", lambda limit_s, memory_mib: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def keep(state: State, agents: list[FinishedAgent]) -> None:
    asyncio.run(state.keep(agents))


def train(state: State, *arguments: str) -> int:
    return run_predictor(["train", *arguments, "--state", state.url])


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUSTITIA_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("in_this_process")
def test_the_first_training_makes_a_model_and_the_next_must_be_better(
    state: State, models: Registry, agents: list[FinishedAgent], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, agents)
    assert train(state) == 0
    assert "000001 serves" in capsys.readouterr().err
    note = read_note(models.directory)
    assert note is not None
    assert (note.added, note.outcome, note.version) == (150, TrainingOutcome.PROMOTED, 1)
    assert models.current() == 1
    assert train(state) == TOO_FEW_AGENTS
    assert "0 new agents to judge by" in capsys.readouterr().err, "the model has learned from all that are there"
    note = read_note(models.directory)
    assert note is not None
    assert note.outcome is TrainingOutcome.TOO_FEW
    assert models.versions() == [1]


@pytest.mark.usefixtures("in_this_process")
def test_too_few_agents_are_no_failure(
    state: State, agents: list[FinishedAgent], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, agents[:20])
    assert train(state) == TOO_FEW_AGENTS
    assert "20 agents with rows of this version" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_model_that_cannot_be_used_is_none_to_beat(
    state: State, models: Registry, agents: list[FinishedAgent], capsys: pytest.CaptureFixture[str]
) -> None:
    models.promote(models.add(b"damaged"))
    keep(state, agents)
    assert train(state) == 0
    assert "the current model is passed over" in capsys.readouterr().err
    assert models.current() == 2


@pytest.mark.usefixtures("in_this_process")
def test_two_trainings_at_once_there_are_not(
    state: State, models: Registry, agents: list[FinishedAgent], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, agents)
    models.directory.mkdir()
    with (models.directory / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(state) == BUSY
    assert "another training is at work" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_where_models_cannot_be_written_it_is_reported(
    state: State, agents: list[FinishedAgent], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(state, agents)
    assert train(state, "--models", "/proc/models") == 1
    assert "/proc/models" in capsys.readouterr().err


@as_a_process
def test_the_kernel_ends_a_training_that_takes_too_long(
    state: State, models: Registry, agents: list[FinishedAgent]
) -> None:
    keep(state, agents)
    ended = process("-m", "gateway.cli", "predictor", "train", "--state", state.url, "--train-limit-s", "0.2")
    assert ended.returncode == -signal.SIGALRM
    assert not models.versions()


def test_who_has_finished_since_a_model_was_made() -> None:
    agents = [FinishedAgent(None, "t", [FinishedTask(4, 1, 0, 1, ended_s=5.0)], arrived_at=100.0 + n) for n in range(4)]
    assert unseen(agents, 107.0) == 1
    assert unseen(agents, 0.0) is None
    assert Told(1, 1).created == "", "a model need not say"


async def test_a_trainer_lets_go_of_texts(state: State) -> None:
    task = FinishedTask(40, 10, 0, 7, row=b"row", prompt="private", system="too")
    await state.keep([FinishedAgent("kind", "t", [task])])
    (agent,) = (await _read(open_store(state.url))).agents
    assert agent.tasks == [FinishedTask(40, 10, 0, 7, row=b"row")]


BOUNDS = """
import os, signal
from gateway.learning.trainer import step_back
step_back(0.5, 64)
assert os.nice(0) >= 10
try:
    bytes(2**28)
except MemoryError:
    print("no more memory", flush=True)
while True:
    signal.pause()
"""


@as_a_process
def test_a_trainer_asks_for_no_more_than_it_may_have() -> None:
    program = (
        "import resource; from gateway.learning.trainer import step_back;"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**30)); step_back(60, 2048);"
        "print(resource.getrlimit(resource.RLIMIT_DATA) == (2**30, 2**30))"
    )
    ended = process("-c", program)
    assert ended.stdout == "True\n", ended.stderr


@as_a_process
def test_a_trainer_steps_back_and_is_bounded() -> None:
    ended = process("-c", BOUNDS)
    assert "no more memory" in ended.stdout
    assert ended.returncode == -signal.SIGALRM
