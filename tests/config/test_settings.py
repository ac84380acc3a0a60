from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.cli.predictor import ExportSettings, PromoteSettings
from gateway.config.settings import GatewaySettings, ServeSettings, StateSettings, TenantSettings
from gateway.config.sources import load
from gateway.flowcontrol.fairqueue import POLICIES
from gateway.learning.trainer import TrainSettings


def settings(*arguments: str) -> GatewaySettings:
    return load(GatewaySettings, list(arguments), program="justitia gateway")


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text("port: 1\nbeta: 2.0\npolicy: fcfs\n")
    monkeypatch.setenv("JUSTITIA_PORT", "2")
    monkeypatch.setenv("JUSTITIA_BETA", "3")
    given = settings("--config", str(file), "--port", "3")
    assert (given.port, given.beta, given.policy, given.max_waiting) == (3, 3.0, "fcfs", 10_000)


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text("port: 1\n")
    monkeypatch.setenv("JUSTITIA_CONFIG", str(file))
    assert settings().port == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port: must be less than or equal to 65535, not 70000"),
        (["--policy", "luck"], "invalid choice|policy"),
        (["--engine", "ftp://x"], "must begin with http"),
        (["--state", "mysql://x"], "must be sqlite"),
        (["--beta", "nan"], "beta"),
        (["--no-such-thing", "1"], "no-such-thing"),
        (["--config", "/nowhere/justitia.yaml"], "/nowhere/justitia.yaml: cannot be read: No such file"),
        (["--engine-key", "x"], "--engine-key: is no flag: set JUSTITIA_ENGINE_KEY, or engine_key in a file"),
        (["--tenants={}"], "--tenants: is no flag: set JUSTITIA_TENANTS, or tenants in a file"),
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
    assert "JUSTITIA_POTR: is not a setting; did you mean JUSTITIA_PORT?" in capsys.readouterr().err


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
        assert f"{name}: is not a setting" in capsys.readouterr().err


def test_the_environment_is_for_what_commands_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTITIA_STATE", "redis://r")
    monkeypatch.setenv("JUSTITIA_PORT", "1")
    given = load(ExportSettings, ["--text"], program="justitia export")
    assert (given.state, given.text) == ("redis://r", True)
    monkeypatch.setenv("justitia_text", "1")  # as good as the name in capitals, where it is one
    assert not load(ExportSettings, [], program="justitia export").text


def test_engine_arguments_are_split_as_a_shell_would() -> None:
    given = load(
        ServeSettings, ["--engine-args", "--dtype float16 --chat-template 'my file'"], program="justitia serve"
    )
    assert given.engine_args == ("--dtype", "float16", "--chat-template", "my file")
    assert ServeSettings(engine_args=["--tensor-parallel-size", 2]).engine_args == ("--tensor-parallel-size", "2")


def test_every_setting_has_its_sentence_of_help() -> None:
    for name, field in (ServeSettings.model_fields | TenantSettings.model_fields).items():
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


# Where they come from


def test_a_file_in_the_working_directory_is_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings().port == 8000
    assert capsys.readouterr().err == ""
    (tmp_path / "justitia.yaml").write_text("port: 1\n")
    assert settings().port == 1
    assert capsys.readouterr().err == "justitia gateway: settings from justitia.yaml\n"
    assert settings("--config", os.devnull).port == 8000
    (tmp_path / "other.yaml").write_text("port: 2\n")
    monkeypatch.setenv("JUSTITIA_CONFIG", "other.yaml")
    assert settings().port == 2
    assert capsys.readouterr().err == "", "it was named"


def test_one_file_serves_all_commands_and_holds_what_they_share(tmp_path: Path) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text("model: m\nstate: 'memory:'\nport: 7\n")
    assert load(ExportSettings, ["--config", str(file)], program="justitia export").state == "memory:"
    assert load(ServeSettings, ["--config", str(file)], program="justitia serve").model == "m"


@pytest.mark.parametrize("name", ["text", "since", "config", "seed"])
def test_what_only_one_command_takes_is_not_for_the_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text(f"{name}: true\n")
    for command in (ExportSettings, GatewaySettings):
        with pytest.raises(SystemExit):
            load(command, ["--config", str(file)], program="justitia")
        assert f"justitia.yaml:1:1: {name}: is not a setting" in capsys.readouterr().err


def test_tenants_come_from_the_file_and_the_environment_goes_over_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text("tenants:\n  red:\n    weight: 2\n    max_queue_s: null\n  no:\n  7:\n    max_tasks: 3\n")
    given = settings("--config", str(file)).tenants
    assert given == {"red": TenantSettings(weight=2), "no": TenantSettings(), "7": TenantSettings(max_tasks=3)}
    monkeypatch.setenv("JUSTITIA_TENANTS", '{"blue": {"kv_per_day": 5e9}}')
    assert settings("--config", str(file)).tenants == {"blue": TenantSettings(kv_per_day=5e9)}


def test_the_engines_key_is_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUSTITIA_ENGINE_KEY", "sesame-7")
    given = settings()
    assert given.engine_key is not None and given.engine_key.get_secret_value() == "sesame-7"
    assert "sesame-7" not in f"{given} {given!r} {given.model_dump()} {given.model_dump_json()}"
    monkeypatch.delenv("JUSTITIA_ENGINE_KEY")
    file = tmp_path / "justitia.yaml"
    for wrong in ("[sesame-7]", "{sesame-7: 1}", "'sesame-7 x'", "77777", "''"):
        file.write_text(f"engine_key: {wrong}\n")
        with pytest.raises(SystemExit):
            settings("--config", str(file))
        told = capsys.readouterr().err
        assert "justitia.yaml:1:1: engine_key: must " in told
        assert "sesame" not in told and "7777" not in told


def test_what_a_url_may_hold_is_not_shown_either(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--state", "mysql://u:sesame@h"], ["--engine", "http://u:sesame@:x"]):
        with pytest.raises(SystemExit):
            settings(*wrong)
        assert "sesame" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://x", "must begin with"),
        ("localhost:8000", "must begin with"),
        ("http://", "must begin with"),
        ("http://:8000", "must be http://host:port"),
        ("http://h:port", "is no URL"),
        ("http://h:0", "must be http"),
        ("http://h:70000", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://h:1?x", "must be http"),
        ("http://a b", "must be http"),
        ("http://h:1/v1", "must end before /v1"),
        ("http://h:1/v1/", "must end before /v1"),
        ("unix:relative", "must begin with"),
        ("unix:/" + 107 * "x", "at most 107 bytes"),
    ],
)
def test_where_no_engine_can_be(url: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--engine", url)
    told = capsys.readouterr().err
    assert told.startswith("--engine: ") and why in told


@pytest.mark.parametrize("url", ["http://h", "http://h:8000/", "https://[::1]:1/vllm", "unix:/run/engine.sock", ""])
def test_where_an_engine_can_be(url: str) -> None:
    assert settings("--engine", url).engine == url.rstrip("/")


@pytest.mark.parametrize(
    ("state", "keys", "file"),
    [
        ("sqlite:////data/state.db", None, "/data/keys.json"),
        ("redis://r", None, "/home/justitia/keys.json"),
        ("memory:", None, "/home/justitia/keys.json"),
        ("memory:", "/etc/keys", "/etc/keys"),
    ],
)
def test_where_the_keys_are(state: str, keys: str | None, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/home")
    assert GatewaySettings(state=state, keys=keys).keys_file == Path(file)


def test_a_truth_is_no_number_and_a_number_no_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "justitia.yaml"
    file.write_text("port: true\nbeta: false\nmax_in_flight: true\ntrain: 7\ntenants: {a: {max_tasks: true}}\n")
    with pytest.raises(SystemExit):
        settings("--config", str(file))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        "port: must be a number, not true",
        "beta: must be a number, not false",
        "max_in_flight: must be a number, not true",
        "train: must be true or false, not 7",
        "tenants.a.max_tasks: must be a number, not true",
    ]


@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_no_number_is_infinite(name: str) -> None:
    for setting in ("--max-queue-s", "--max-body-mib", "--max-waiting-mib", "--agent-idle-s"):
        with pytest.raises(SystemExit):
            settings(setting, name)
