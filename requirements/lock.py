"""Writes the full pinned lists in this folder: `python requirements/lock.py cpu|gpu|gateway`.

pip resolves the project's own metadata (`--dry-run --report`, nothing is installed) and every distribution it would
install becomes one pinned line. The lists are installed with `--no-deps`, so what is left out here stays out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "cpu": "cpu,demo,dev",
    "gpu": "gpu,demo,dev",
    "gateway": "",
}
# vLLM's CPU build asks for these three. Their published builds are for CUDA, break `import transformers` beside a CPU
# torch, and serve images, sound and video, which text models do not need.
LEFT_OUT = {"cpu": {"torchvision", "torchaudio", "torchcodec"}}


def resolve(kind: str) -> list[str]:
    target = f"{ROOT}[{KINDS[kind]}]" if KINDS[kind] else str(ROOT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    environment = dict(os.environ)
    if kind == "gpu":
        # Without this machine's own wheels, among which a CPU build of torch would be taken for the official one.
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run([*pip, "--report", report.name, target], check=True, env=environment)
        installs = json.loads(Path(report.name).read_text())["install"]
    pins = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in installs}
    left_out = LEFT_OUT.get(kind, set()) | {"justitia"}
    return [
        f"{name}=={version}"
        for name, version in sorted(pins.items(), key=lambda pin: pin[0].lower())
        if name not in left_out
    ]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(KINDS)}")
    kind = sys.argv[1]
    lines = [f"# Made by requirements/lock.py {kind}; install with --no-deps.", *resolve(kind)]
    (ROOT / "requirements" / f"{kind}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
