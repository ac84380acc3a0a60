"""`justitia predictor …` about models that there are: what it prints, what it changes, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli.predictor import run_predictor
from predictor.model import Settings
from predictor.registry import Registry
from predictor.train import train
from tests.predictor.made import Gateway


@pytest.fixture(scope="module")
def model() -> bytes:
    settings = Settings(rounds=10)
    return train(
        Gateway().serve(120), settings=settings, nthread=1, created="2025-06-01T12:00:00+00:00"
    ).model.encoded()


@pytest.fixture
def registry(tmp_path: Path, model: bytes) -> Registry:
    """Two models; the second serves, and before it the first did."""
    made = Registry(tmp_path / "models")
    for _ in range(2):
        made.promote(made.add(model))
    return made


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
