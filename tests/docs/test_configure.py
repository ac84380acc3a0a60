"""docs/how-to/configure.md does what it says: its files are written, and its commands answer as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from gateway.check import schema
from gateway.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```(yaml|console)\n(.*?)^```$", (ROOT / "docs/how-to/configure.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_what_it_shows_is_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    answered = 0
    for kind, text in BLOCKS:
        if kind == "yaml":
            (tmp_path / "justitia.yaml").write_text(text)
            continue
        command, _, answer = text.removeprefix("$ ").partition("\n")
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert printed.out + printed.err == answer
        assert ended.value.code == (0 if printed.out else 2)
        answered += 1
    assert answered == 2


@pytest.mark.parametrize(("block", "right"), [(0, True), (1, False)])
def test_an_editor_says_the_same(block: int, right: bool) -> None:
    files = [text for kind, text in BLOCKS if kind == "yaml"]
    reader = YAML(typ="safe")
    reader.allow_duplicate_keys = True
    assert jsonschema.Draft202012Validator(schema()).is_valid(reader.load(files[block])) is right
