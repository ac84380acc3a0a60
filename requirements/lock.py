"""Writes the full pinned lists in this folder: `python requirements/lock.py cpu|gpu|gateway|dev`.

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
EXTRAS = {
    "cpu": "cpu,train,otel,demo",
    "gpu": "gpu,train,otel,demo",
    "gateway": "train,otel",
    "dev": "cpu,train,otel,demo,dev",
}
# vLLM's CPU build asks for these three. Their published builds are for CUDA, break `import transformers` beside a CPU
# torch, and serve images, sound and video, which text models do not need.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

# Those that have builds for some machines only, and are done without elsewhere.
ONLY_ON = {"atheris": "; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'"}


def resolve(kind: str) -> list[str]:
    """`name==version` of all that the project and its extras for this kind need."""
    target = f"{ROOT}[{EXTRAS[kind]}]" if EXTRAS[kind] else str(ROOT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    environment = dict(os.environ)
    if kind == "gpu":
        # Without this machine's own wheels, among which a CPU build of torch would be taken for the official one.
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run([*pip, "--report", report.name, target], check=True, env=environment)
        installs = json.loads(Path(report.name).read_text())["install"]
    pins = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in installs}
    left_out = {"justitia"} | (set() if kind == "gpu" else LEFT_OUT)
    return [
        f"{name}=={version}{ONLY_ON.get(name, '')}"
        for name, version in sorted(pins.items(), key=lambda pin: pin[0].lower())
        if name not in left_out
    ]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        raise SystemExit(f"usage: {sys.argv[0]} {'|'.join(EXTRAS)}")
    kind = sys.argv[1]
    pins = resolve(kind)
    if kind == "dev":  # only what comes on top of a machine's own list
        runtime = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        pins = [pin for pin in pins if pin not in runtime]
    lines = [f"# Made by requirements/lock.py {kind}; install with --no-deps.", *pins]
    (ROOT / "requirements" / f"{kind}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
