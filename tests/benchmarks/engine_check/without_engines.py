"""What `--gpu` runs before any engine: the tests that need none, and the cost of a step. And which GPUs there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

STEPS = 600


def run_tests(console: Console) -> dict[str, Any]:
    """Those that need no engine, but vLLM's classes: the contracts with it first of all."""
    root = Path(__file__).resolve().parents[3]
    places = [place for place in ("tests/contracts", "tests/engine") if (root / place).is_dir()]
    if not places:
        return {"places": [], "exit_code": 1, "summary": "there are no tests here: run this in a checkout"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not engine", *places]
    console.print(" ".join(["pytest", *command[3:]]))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        console.print(done.stdout[-4000:] + done.stderr[-2000:], markup=False)
    return {"places": places, "exit_code": done.returncode, "summary": lines[-1].strip("= ") if lines else "no output"}


def step_cost(console: Console) -> dict[str, Any]:
    """The line of `tests.benchmarks.step_cost`, or `exit_code` and `error`."""
    command = [sys.executable, "-m", "tests.benchmarks.step_cost", "--steps", str(STEPS)]
    console.print(" ".join(["python", *command[1:]]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stderr[-2000:], markup=False)
        said = done.stderr.strip().splitlines() or ["no output"]
        return {"exit_code": done.returncode, "error": said[-1]}
    # vLLM may log to the same stream, but not after the last line.
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def accelerators() -> list[dict[str, str]]:
    """The NVIDIA GPUs and their driver, as `nvidia-smi` names them; none where it is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "driver", "memory", "compute_capability")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=False)) for line in out.splitlines() if line.strip()]
