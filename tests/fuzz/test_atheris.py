"""A short run of each harness, the same one each time. CONTRIBUTING.md says how to let them run longer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.bounds import TIMES

pytestmark = pytest.mark.wire

pytest.importorskip("atheris", reason="atheris has no build for this machine")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("harness", "runs"), [("bodies", 20_000), ("answers", 20_000), ("metrics", 20_000)])
def test_nothing_is_found(harness: str, runs: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"tests.fuzz.atheris_{harness}", f"-runs={runs * TIMES}", "-max_len=1000"]
    command += ["-seed=1"] if TIMES == 1 else []
    # What it counts as its own peak begins with ours, who start it.
    command += [f"-rss_limit_mb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 1024}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Done {runs * TIMES} runs" in run.stderr
