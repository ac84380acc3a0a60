"""Everything that the gateway's own document says can be asked, and much that it says cannot: by Schemathesis.

In a process of its own: as a plugin of pytest it would hide what other properties failed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.fuzz.bounds import TIMES
from tests.fuzz.conftest import Fuzzed
from tests.fuzz.documented import DOCUMENT

pytestmark = pytest.mark.wire

HERE = Path(__file__).resolve().parent
EXAMPLES = 15


def test_the_gateway_does_as_its_document_says(fuzzed: Fuzzed) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    command += [f"{fuzzed.url}/openapi.json", "--no-color", "--phases", "examples,coverage,fuzzing"]
    command += ["--continue-on-failure", "--max-examples", str(EXAMPLES * TIMES)]
    if TIMES == 1:
        command += ["--generation-deterministic", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    run = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_document_is_told(fuzzed: Fuzzed) -> None:
    assert httpx.get(f"{fuzzed.url}/openapi.json").json() == DOCUMENT
