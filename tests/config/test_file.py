"""What a settings file says, and where: YAML 1.2's few types, and nothing that passes silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.file import SettingsFile

BEGINNING = "justitia.yaml"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes) -> SettingsFile:
        Path(BEGINNING).write_bytes(text if isinstance(text, bytes) else text.encode())
        return SettingsFile.read(Path(BEGINNING))

    return read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-17", -17),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("5.0e9", 5e9),
        ("5e9", 5e9),
        (".5", 0.5),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: {b: c}}", {"a": {"b": "c"}}),
        ("!!str 7", "7"),
    ],
)
def test_values_are_those_of_yaml_1_2(write: Any, text: str, value: object) -> None:
    file = write(f"name: {text}\n")
    assert (file.problems, file.values) == ([], {"name": value})
    assert type(file.values["name"]) is type(value)


def test_names_are_taken_as_they_are_written(write: Any) -> None:
    assert list(write("no: 1\n7: 2\ntrue: 3\n~: 4\n'a b': 5\n").values) == ["no", "7", "true", "~", "a b"]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}\n", "\ufeff"])
def test_an_empty_file_says_nothing(write: Any, text: str) -> None:
    file = write(text)
    assert (file.values, file.problems) == ({}, [])


def test_an_alias_is_what_it_stands_for(write: Any) -> None:
    assert write("a: &x {b: 1}\nc: *x\n").values == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2\n", "2:1: a: is there twice, and first in line 1"),
        ("t:\n  r:\n    w: 1\n    w: 1\n", "4:5: t.r.w: is there twice, and first in line 3"),
        ("t:\n\tr: 1\n", "2:1: this is not YAML: while scanning for the next token, found character '\\t' that cannot"),
        ("a: 1\n b: 2\n", "2:3: this is not YAML: mapping values are not allowed here"),
        ("a: [1, 2\nb: 3\n", "2:2: this is not YAML: while parsing a flow sequence"),
        ("a: 'x\n", "2:1: this is not YAML: while scanning a quoted scalar"),
        ("a: b: c\n", "1:5: this is not YAML: mapping values are not allowed here"),
        ("a: *x\n", "1:4: this is not YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 1\n", "2:1: this is not YAML: expected a single document"),
        ("a: 1\nb: \x00\n", "2:4: this is not YAML: special characters are not allowed"),
        ("a: !x 3\n", "1:1: a: no tags are taken: !x"),
        ("a: !!python/object:os.system {}\n", "1:1: a: no tags are taken: tag:yaml.org,2002:python/object:os.system"),
        ("a: !!set {b}\n", "1:1: a: no tags are taken: tag:yaml.org,2002:set"),
        ("a: !!int x\n", "1:1: a: cannot be read as int"),
        ("a: " + "9" * 5000, "1:1: a: cannot be read as int"),
        ("a: &x {b: *x}\n", "1:8: a.b.b.b: is nested deeper than any setting"),
        ("- a\n", "1:1: must be settings, one a line: `name: value`"),
        ("hello\n", "1:1: must be settings, one a line: `name: value`"),
        ("? [a]\n: 1\n", "1:3: a name must be plain text"),
        (b"a: 1\nb: \xff\n", "2:1: is not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(write: Any, text: str | bytes, told: str) -> None:
    first, *_ = write(text).problems
    assert str(first).startswith(f"{BEGINNING}:{told}")


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "a: " + "[" * 100_000])
def test_what_is_nested_without_end_ends(write: Any, text: str) -> None:
    assert "nested deeper" in str(write(text).problems[0])


def test_aliases_of_aliases_stay_small(write: Any) -> None:
    lines = ["a0: &a0 [x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    assert write("\n".join(lines)).problems


def test_a_file_that_cannot_be_read_is_no_traceback(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        assert str(SettingsFile.read(path).problems[0]).startswith(f"{path}: cannot be read: ")
    assert SettingsFile.read(Path("/dev/null")).problems == []


def test_a_name_is_found_where_it_stands_or_what_is_around_it(write: Any) -> None:
    file = write("a: 1\nt:\n  r: {w: 2}\nl:\n  - 1\n  - 2\n")
    places = {name: file.problem(name, "").place for name in [("t", "r", "w"), ("t", "r", "x"), ("l", 1), ("z",)]}
    assert places == {("t", "r", "w"): (3, 7), ("t", "r", "x"): (3, 3), ("l", 1): (6, 5), ("z",): ()}


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,? \n\t0.~<", max_size=60) | st.binary(max_size=60))
def test_whatever_is_written_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / BEGINNING
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    file = SettingsFile.read(path)
    assert isinstance(file.values, dict)
    assert all(str(problem).startswith(str(path)) for problem in file.problems)
