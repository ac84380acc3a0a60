"""`justitia predictor …`: what is told, what is changed, and how it ends. Trainings are real, in processes of their own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from gateway.cli.predictor import run_predictor
from gateway.learning.trainer import LOCK, _read, unseen
from gateway.learning.training import BUSY, TOO_FEW_AGENTS, read_note
from gateway.state import open_store
from gateway.telemetry.metrics import TrainingOutcome
from predictor.model import Settings, Told
from predictor.registry import Registry
from predictor.train import train
from predictor.types import FinishedAgent, FinishedTask
from tests.learning.conftest import State
from tests.predictor.made import Gateway


@pytest.fixture(scope="module")
def model() -> bytes:
    settings = Settings(rounds=10)
    return train(
        Gateway().serve(120), settings=settings, nthread=1, created="2025-06-01T12:00:00+00:00"
    ).model.encoded()


@pytest.fixture(scope="module")
def agents() -> list[FinishedAgent]:
    """They finished a minute ago, one a millisecond."""
    begin = time.time() - 60
    served = Gateway().serve(150)
    return [msgspec.structs.replace(agent, arrived_at=begin + place / 1000) for place, agent in enumerate(served)]


@pytest.fixture
def registry(tmp_path: Path, model: bytes) -> Registry:
    """Two models; the second serves, and before it the first did."""
    made = Registry(tmp_path / "models")
    for _ in range(2):
        made.promote(made.add(model))
    return made


def command(state: State, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUSTITIA_")}
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", "predictor", *arguments, "--state", state.url],
        env=environment | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_models_are_listed_and_the_one_that_serves_is_marked(
    registry: Registry, model: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.add(model[:-10] + bytes(10))
    assert run_predictor(["list", "--models", str(registry.directory)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "2025-06-01 12:00" in lines["000001"]
    assert "serves" in lines["000002"]
    assert "serves" not in lines["000001"]
    assert "unusable" in lines["000003"]


def test_what_a_model_was_made_from_is_shown(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predictor(["show", "2", "--models", str(registry.directory)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip())
    assert shown["version"].startswith("000002, serves")
    assert shown["agents"].strip() == "120"
    assert {"median_error", "tau", "learning_rate", "cost_p90_first"} <= shown.keys()


def test_promote_and_rollback(registry: Registry) -> None:
    models = ("--models", str(registry.directory))
    assert run_predictor(["promote", "1", *models]) == 0
    assert registry.current() == 1
    assert run_predictor(["rollback", *models]) == 0
    assert registry.current() == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fly"], 2, "no command 'fly'"),
        (["show", "7"], 1, "there is no such version"),
        (["promote", "7"], 1, "000007.model"),
        (["promote", "3"], 1, "damaged"),
        (["promote", "0"], 2, "greater than or equal to 1"),
        (["list", "--models", "", "--state", "memory:"], 2, "models"),
        (["train", "--state", "sqlite:////nowhere/state.db"], 2, "there is no state /nowhere/state.db"),
        (["train", "--state", "memory:"], 2, "ends with its gateway"),
    ],
)
def test_what_cannot_be_is_said(
    registry: Registry,
    model: bytes,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.add(model[:-10] + bytes(10))
    if "--models" not in arguments:
        monkeypatch.setenv("JUSTITIA_MODELS", str(registry.directory))
    else:
        place = arguments.index("--models")
        arguments = arguments[:place] + arguments[place + 2 :]
    try:
        ended = run_predictor(arguments)
    except SystemExit as exit_:
        ended = int(exit_.code or 0)
    assert ended == code
    assert message in capsys.readouterr().err


def test_only_one_version_has_served(tmp_path: Path, model: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    made = Registry(tmp_path)
    made.promote(made.add(model))
    assert run_predictor(["rollback", "--models", str(tmp_path)]) == 1
    assert "no version has served before" in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predictor([]) == 0
    assert "rollback" in capsys.readouterr().out


async def test_the_first_training_makes_a_model_and_the_next_must_be_better(
    state: State, agents: list[FinishedAgent]
) -> None:
    await state.keep(agents)
    ended = command(state, "train")
    assert ended.returncode == 0, ended.stderr
    assert "000001 serves" in ended.stderr
    models = state.path.parent / "models"
    note = read_note(models)
    assert note is not None
    assert (note.added, note.outcome, note.version) == (150, TrainingOutcome.PROMOTED, 1)
    assert Registry(models).current() == 1
    again = command(state, "train")
    assert again.returncode == TOO_FEW_AGENTS, again.stderr
    assert "0 new agents to judge by" in again.stderr, "the model has learned from all that are there"
    note = read_note(models)
    assert note is not None
    assert note.outcome is TrainingOutcome.TOO_FEW
    assert Registry(models).versions() == [1]


async def test_too_few_agents_are_no_failure(state: State, agents: list[FinishedAgent]) -> None:
    await state.keep(agents[:20])
    ended = command(state, "train")
    assert ended.returncode == TOO_FEW_AGENTS
    assert "20 agents with rows of this version" in ended.stderr


async def test_a_model_that_cannot_be_used_is_nobody_to_beat(state: State, agents: list[FinishedAgent]) -> None:
    models = Registry(state.path.parent / "models")
    models.promote(models.add(b"damaged"))
    await state.keep(agents)
    ended = command(state, "train")
    assert ended.returncode == 0
    assert "the current model is passed over" in ended.stderr
    assert models.current() == 2


async def test_two_trainings_at_once_there_are_not(state: State, agents: list[FinishedAgent]) -> None:
    await state.keep(agents)
    models = state.path.parent / "models"
    models.mkdir()
    with (models / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = command(state, "train")
    assert ended.returncode == BUSY
    assert "another training is at work" in ended.stderr


@pytest.mark.parametrize("limit_s", ["0.2"])
async def test_the_kernel_ends_a_training_that_takes_too_long(
    state: State, agents: list[FinishedAgent], limit_s: str
) -> None:
    await state.keep(agents)
    ended = command(state, "train", "--train-limit-s", limit_s)
    assert ended.returncode == -signal.SIGALRM
    assert not Registry(state.path.parent / "models").versions()


async def test_where_models_cannot_be_written_it_is_said(state: State, agents: list[FinishedAgent]) -> None:
    await state.keep(agents)
    ended = command(state, "train", "--models", "/proc/models")
    assert ended.returncode == 1
    assert "/proc/models" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_who_has_finished_since_a_model_was_made() -> None:
    agents = [FinishedAgent(None, "t", [FinishedTask(4, 1, 0, 1, ended_s=5.0)], arrived_at=100.0 + n) for n in range(4)]
    assert unseen(agents, 107.0) == 1
    assert unseen(agents, 0.0) is None
    assert Told(1, 1).created == "", "a model need not say"


BOUNDS = """
import os, time
from gateway.learning.trainer import step_back
step_back(0.5, 64)
assert os.nice(0) >= 10
try:
    bytes(2**28)
except MemoryError:
    print("no more memory", flush=True)
while True:
    time.sleep(60)
"""


def test_a_trainer_asks_for_no_more_than_it_may_have() -> None:
    program = (
        "import resource; from gateway.learning.trainer import step_back;"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**30)); step_back(60, 2048);"
        "print(resource.getrlimit(resource.RLIMIT_DATA) == (2**30, 2**30))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout == "True\n", ended.stderr


async def test_a_trainer_lets_go_of_texts(state: State) -> None:
    task = FinishedTask(40, 10, 0, 7, row=b"row", prompt="private", system="too")
    await state.keep([FinishedAgent("kind", "t", [task])])
    (agent,) = (await _read(open_store(state.url))).agents
    assert agent.tasks == [FinishedTask(40, 10, 0, 7, row=b"row")]


def test_a_trainer_steps_back_and_is_bounded() -> None:
    ended = subprocess.run([sys.executable, "-c", BOUNDS], capture_output=True, text=True, check=False)
    assert "no more memory" in ended.stdout
    assert ended.returncode == -signal.SIGALRM
