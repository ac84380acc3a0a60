"""What to install is named for what an installation lacks."""

from __future__ import annotations

import sys

import pytest

from gateway.cli.main import main
from gateway.extras import can_train, missing


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("xgboost", "'justitia[train]'"),
        ("torch.nn", "'justitia[gpu]' or pip install 'justitia[cpu]'"),
        ("aiohttp", "'justitia[demo,gpu]' or"),
        ("matplotlib.axes", "'justitia[demo]'"),
    ],
)
def test_the_extra_that_brings_it(module: str, extra: str) -> None:
    needs = missing(ModuleNotFoundError(name=module))
    assert needs is not None and extra in needs


def test_of_what_no_extra_brings_nothing_is_claimed() -> None:
    assert missing(ModuleNotFoundError(name="gateway.nothing")) is None
    assert missing(ModuleNotFoundError()) is None


def test_a_command_without_its_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    monkeypatch.setattr(sys, "argv", ["justitia", "replay", "paper:0:3", "--predictor", "xgboost"])
    assert not can_train()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "justitia[train]" in capsys.readouterr().err
