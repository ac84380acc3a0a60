"""The maps of the packages name every file, and no other; and the rooms of the map are those of the import rules."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(
    path.parent.relative_to(ROOT)
    for top in ("gateway", "predictor")  # that of `engine` says more: tests/engine/test_map.py
    for path in (ROOT / top).rglob("__init__.py")
)


def names_on_the_map(package: Path) -> set[str]:
    """The first words of the indented lines in the docstring of a package; several, where commas divide them."""
    documented = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()), clean=False) or ""
    entries = re.findall(r"^ {0,4}([a-z_]+(?:, [a-z_]+)*)  ", documented, re.MULTILINE)
    return {name for entry in entries for name in entry.split(", ")} | set(re.findall(r"`([a-z_]+)`", documented))


def rooms_of(package: Path) -> set[str]:
    folder = ROOT / package
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_every_file_is_on_the_map_of_its_package(package: Path) -> None:
    missing = rooms_of(package) - names_on_the_map(package)
    assert not missing, f"{package}/__init__.py does not name {sorted(missing)}"


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_map_names_no_file_that_is_gone(package: Path) -> None:
    documented = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()), clean=False) or ""
    entries = re.findall(r"^ {0,4}([a-z_]+(?:, [a-z_]+)*)  ", documented, re.MULTILINE)
    named = {name for entry in entries for name in entry.split(", ")}
    gone = named - rooms_of(package)
    assert not gone, f"{package}/__init__.py names {sorted(gone)}"


def test_every_room_of_the_gateway_has_its_place_in_the_import_rules() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (rooms,) = [rule for rule in rules if rule.get("containers") == ["gateway"]]
    assert rooms["exhaustive"]
    placed = {name.strip() for layer in rooms["layers"] for name in layer.split("|")}
    assert placed == rooms_of(Path("gateway"))


def test_the_files_that_the_map_sends_to_are_there() -> None:
    text = (ROOT / "gateway" / "__init__.py").read_text()
    for path in re.findall(r"`((?:api|relay|http|telemetry|flowcontrol|protocol|config)/[a-z_/]+)`", text):
        assert (ROOT / "gateway" / f"{path}.py").exists() or (ROOT / "gateway" / path).is_dir(), path
