"""The map of the folder, `engine.__doc__`, against the folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parent
MODULES = {
    ".".join(("engine", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
}
# `  name   what it is`, with a star where it imports vLLM; `name/` begins a package.
LINE = re.compile(r"^(?P<indent> *)(?P<name>\w+)(?P<package>/?)(?P<star>\*?)  +\S")

IMPORTS = """
import importlib, json, sys
sys.modules["vllm"] = None  # so that importing it raises ImportError
failed = []
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert error.name and error.name.startswith("vllm"), (name, error)
        failed.append(name)
print(json.dumps(failed))
"""


def on_the_map() -> dict[str, bool]:
    """By module: whether it says that vLLM is imported."""
    found, package = {}, ""
    for line in (engine.__doc__ or "").splitlines():
        if (match := LINE.match(line)) is None:
            continue
        if match["package"]:
            package = f"{match['name']}."
            continue
        inside = package if match["indent"] else ""
        found[f"engine.{inside}{match['name']}"] = bool(match["star"])
    return found


def test_every_module_is_on_the_map() -> None:
    assert set(on_the_map()) == MODULES


@pytest.mark.wire
def test_those_with_a_star_import_vllm_and_no_others() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(sorted(MODULES))], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout)) == {name for name, star in on_the_map().items() if star}
