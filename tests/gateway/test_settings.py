from __future__ import annotations

from pathlib import Path

import pytest

from gateway.fairness import POLICIES
from gateway.learning.command import ExportSettings, PromoteSettings
from gateway.learning.trainer import TrainSettings
from gateway.settings import GatewaySettings, ServeSettings, StateSettings
from gateway.sources import load


def settings(*arguments: str) -> GatewaySettings:
    return load(GatewaySettings, list(arguments), program="justitia gateway")


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "justitia.toml"
    file.write_text('port = 1\nbeta = 2.0\npolicy = "fcfs"\n')
    monkeypatch.setenv("JUSTITIA_PORT", "2")
    monkeypatch.setenv("JUSTITIA_BETA", "3")
    given = settings("--config", str(file), "--port", "3")
    assert (given.port, given.beta, given.policy, given.max_waiting) == (3, 3.0, "fcfs", 10_000)


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "justitia.toml"
    file.write_text("port = 1\n")
    monkeypatch.setenv("JUSTITIA_CONFIG", str(file))
    assert settings().port == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["--policy", "luck"], "invalid choice|policy"),
        (["--engine", "ftp://x"], "must begin with http"),
        (["--state", "mysql://x"], "must be sqlite"),
        (["--beta", "nan"], "beta"),
        (["--no-such-thing", "1"], "no-such-thing"),
        (["--config", "/nowhere/justitia.toml"], "no such file"),
    ],
)
def test_what_is_wrong_is_said_and_the_exit_code_is_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    with pytest.raises(SystemExit) as exit_:
        settings(*arguments)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_unknown_name_in_the_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUSTITIA_POTR", "8000")
    with pytest.raises(SystemExit):
        settings()
    assert "JUSTITIA_POTR is not a setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        (ExportSettings, [], "JUSTITIA_TEXT"),
        (ExportSettings, [], "JUSTITIA_SINCE"),
        (PromoteSettings, ["2"], "JUSTITIA_VERSION"),
        (PromoteSettings, [], "JUSTITIA_VERSION"),
        (TrainSettings, [], "JUSTITIA_SEED"),
    ],
)
def test_what_only_one_command_takes_is_a_flag_alone(
    command: type[StateSettings],
    arguments: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "3")
    for settings_of in (command, GatewaySettings):
        with pytest.raises(SystemExit) as exit_:
            load(settings_of, arguments, program="justitia")
        assert exit_.value.code == 2
        assert f"{name} is not a setting" in capsys.readouterr().err


def test_the_environment_is_for_what_commands_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTITIA_STATE", "redis://r")
    monkeypatch.setenv("JUSTITIA_PORT", "1")
    given = load(ExportSettings, ["--text"], program="justitia export")
    assert (given.state, given.text) == ("redis://r", True)
    monkeypatch.setenv("justitia_text", "1")  # as good as the name in capitals, where it is one
    assert not load(ExportSettings, [], program="justitia export").text


def test_an_unknown_name_in_the_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "justitia.toml"
    file.write_text("potr = 8000\n")
    with pytest.raises(SystemExit):
        settings("--config", str(file))
    assert "potr" in capsys.readouterr().err


def test_engine_arguments_are_split_as_a_shell_would() -> None:
    given = load(
        ServeSettings, ["--engine-args", "--dtype float16 --chat-template 'my file'"], program="justitia serve"
    )
    assert given.engine_args == ("--dtype", "float16", "--chat-template", "my file")


def test_every_setting_has_its_sentence_of_help() -> None:
    for name, field in ServeSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("policy", ["justitia", "fcfs", "agent-fcfs", "vtc", "las", "sjf", "srjf"])
def test_every_policy_can_be_chosen(policy: str) -> None:
    assert settings("--policy", policy).policy == policy
    assert policy in POLICIES
    assert len(POLICIES) == 7


@pytest.mark.parametrize("policy", ["luck", "Justitia", "vtc@memory", ""])
def test_any_other_policy_is_refused(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        settings("--policy", policy)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert all(known in told for known in POLICIES)
