"""`justitia check`: all that is wrong at once, each where it stands; and the schema, which agrees with the code."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from gateway.check import check, run_check, schema
from gateway.config.problems import Wrong
from gateway.config.settings import GatewaySettings, ServeSettings
from gateway.tenancy.keys import add_key

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write(text: str) -> None:
    Path("justitia.yaml").write_text(text)


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> list[str]:
    assert run_check(list(arguments)) == code
    said = capsys.readouterr()
    assert bool(said.out) == (code == 0) and bool(said.err) == (code != 0)
    return (said.out or said.err).splitlines()


def test_what_is_right_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, code=0) == ["no settings file: right; policy justitia, 0 tenants"]
    write("policy: vtc\nmodel: m\n")
    assert told(capsys, code=0) == ["justitia.yaml: right; policy vtc, 0 tenants"]
    assert told(capsys, "--policy", "las", code=0) == ["justitia.yaml: right; policy las, 0 tenants"]


def test_all_that_is_wrong_is_said_at_once_each_where_it_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("JUSTITIA_PORT", "70000")
    monkeypatch.setenv("JUSTITIA_POTR", "8000")
    monkeypatch.setenv("JUSTITIA_TENANTS", '{"red": {"weight": "much"}}')
    write("polcy: vtc\nmax-queue-s: 3\nport: x\ntenants:\n  red:\n    weight: -1\n    wieght: 1\n    weight: 2\n")
    assert told(capsys, "--beta", "0") == [
        "--beta: must be greater than 0, not 0",
        "JUSTITIA_POTR: is not a setting; did you mean JUSTITIA_PORT?",
        "JUSTITIA_PORT: must be less than or equal to 65535, not 70000",
        "JUSTITIA_TENANTS: red.weight: must be a number, not much",
        "justitia.yaml:1:1: polcy: is not a setting; did you mean policy?",
        "justitia.yaml:2:1: max-queue-s: is not a setting; did you mean max_queue_s?",
        "justitia.yaml:3:1: port: must be a whole number, not x",
        "justitia.yaml:6:5: tenants.red.weight: must be greater than 0, not -1",
        "justitia.yaml:7:5: tenants.red.wieght: is not a setting; did you mean weight?",
        "justitia.yaml:8:5: tenants.red.weight: is there twice, and first in line 6",
        f"state: {tmp_path}/state/justitia/state.db cannot be made: {tmp_path}/state: Not a directory",
        f"keys: {tmp_path}/state/justitia/keys.json: the file of keys cannot be read: Not a directory",
    ]


def test_what_another_goes_over_is_wrong_too(capsys: pytest.CaptureFixture[str]) -> None:
    write("port: 70000\n")
    assert told(capsys, "--port", "80") == ["justitia.yaml:1:1: port: must be less than or equal to 65535, not 70000"]


@pytest.mark.parametrize("text", ["[1, 2", '{"red": ', "[" * 100_000])
def test_what_is_no_json_in_the_environment(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUSTITIA_TENANTS", text)
    (line,) = told(capsys)
    assert line.startswith("JUSTITIA_TENANTS: is not JSON: ")


def test_a_setting_of_serve_is_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    write('kv_blocks: 1\nengine_args: "--x \'y"\n')
    assert told(capsys) == [
        "justitia.yaml:1:1: kv_blocks: must be greater than or equal to 2, not 1",
        "justitia.yaml:2:1: engine_args: No closing quotation",
    ]


@pytest.mark.parametrize("place", ["/proc/justitia/state.db", "/dev/null/state.db", "/proc"])
def test_a_state_that_cannot_be_written(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"port: 1\nstate: sqlite:///{place}\n")
    first, *_ = told(capsys)  # nor can there be keys beside it
    assert first.startswith(f"justitia.yaml:2:1: state: {place} ")


# Keys


def keys_of(*tenants: str) -> None:
    for tenant in tenants:
        add_key(Path("k"), tenant, "", datetime.now(UTC))


def test_keys_and_entries_that_have_no_counterpart_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    write("keys: k\ntenants:\n  red:\n  blue: {max_tasks: 3}\n")
    said = "justitia.yaml: right; policy justitia, 2 tenants"
    everybody = "note: justitia.yaml:2:1: tenants: there are no keys, so that everybody is the tenant default"
    assert told(capsys, code=0) == [everybody, said]
    keys_of("red", "green")
    assert told(capsys, code=0) == [
        "note: justitia.yaml:4:3: tenants.blue: has no key",
        "note: justitia.yaml:2:1: tenants.green: has a key and no entry, and so no limits",
        said,
    ]


def test_keys_that_cannot_be_read_are_wrong_beside_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    Path("k").write_text("broken")
    write("port: -1\nkeys: k\n")
    first, second = told(capsys)
    assert first == "justitia.yaml:1:1: port: must be greater than or equal to 0, not -1"
    assert second.startswith("justitia.yaml:2:1: keys: k")


def test_a_start_is_given_the_keys() -> None:
    keys_of("red")
    assert check(GatewaySettings, ["--keys", "k"], program="justitia gateway").keys.tenants == {"red"}


# The schema


EXAMPLES = [ROOT / "deploy" / "gateway" / "justitia.yaml"]


@pytest.mark.wire
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.name)
def test_example_files_are_right_by_the_code_and_by_the_published_schema(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "--config", str(file), code=0)[-1].startswith(f"{file}: right")
    published = str(ROOT / "docs" / "reference" / "justitia.schema.json")
    checker = [sys.executable, "-m", "check_jsonschema", "--schemafile", published, str(file)]
    result = subprocess.run(checker, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_is_one_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(["--schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed["properties"].keys() == ServeSettings.model_fields.keys() - {"config"}
    assert printed["properties"]["policy"]["reload"] is True and "reload" not in printed["properties"]["port"]
    for each in (*printed["properties"].values(), *printed["$defs"]["TenantSettings"]["properties"].values()):
        assert each["description"].endswith(".")


RIGHT = [
    "{}",
    "port: 0",
    "max_in_flight: null",
    "beta: 2",
    "engine_args: --x y",
    "engine_args: [--x, 2, y]",
    "keys: /etc/keys.json",
    "engine_key: sesame",
    "tenants:",
    "tenants: {red: , blue: {}, 7: {weight: 0.5, max_tasks: null}}",
    "tenants: {a: {kv_per_day: 5e9, tokens_per_minute: 100000, max_queue_s: 1, admin: true, max_waiting_mib: 0.5}}",
]
WRONG = [
    "port: 70000",
    "port: 1.5",
    "port: true",
    "port: x",
    "potr: 1",
    "config: x",
    "policy: luck",
    "policy: null",
    "max_queue_s: 0",
    "train: 7",
    "engine_args: [[a]]",
    "engine_args: {a: b}",
    "tenants: []",
    "tenants: {a b: {}}",
    "tenants: {'': {}}",
    f"tenants: {{{'x' * 65}: {{}}}}",
    "tenants: {a: 1}",
    "tenants: {a: {wieght: 1}}",
    "tenants: {a: {weight: 0}}",
    "tenants: {a: {weight: null}}",
    "tenants: {a: {max_tasks: 1.5}}",
    "tenants: {a: {admin: 7}}",
]


@pytest.mark.parametrize("text", [*RIGHT, *WRONG])
def test_the_schema_and_the_code_agree(text: str) -> None:
    write(text)
    try:
        check(ServeSettings, [], program="justitia serve")
    except Wrong:
        by_code = False
    else:
        by_code = True
    # A file in which all names are text, as an editor has it.
    by_schema = jsonschema.Draft202012Validator(schema()).is_valid(named_by_text(YAML(typ="safe").load(text)))
    assert by_code is by_schema is (text in RIGHT)


def named_by_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): named_by_text(inner) for name, inner in value.items()}
    return value
