"""What a user installs: the wheel, without extras, in a clean environment, from its help to an answer through the gateway.

    python -m tests.deploy.smoke_wheel      (make test-wheel)

The engine is a stand-in, in this process. Prints one line for each check, and ends with 1 at the first that fails.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.wire.scripted_engine import ScriptedEngine

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 150  # of the environment without pip
COMMANDS = (
    *("", "serve", "gateway", "check", "demo", "replay", "export"),
    *("predictor", *(f"predictor {name}" for name in ("list", "show", "promote", "rollback", "train", "evaluate"))),
    *("keys", "keys add", "keys list", "keys revoke"),
)
# What needs more than is installed names the extra that brings it.
LACKING = {
    "demo": "justitia[demo,",
    "replay paper:0:3": "justitia[cpu]",
    "replay paper:0:3 --predictor xgboost": "justitia[train]",
    "predictor train": "justitia[train]",
    "predictor evaluate paper:0:3": "justitia[train]",
}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def main() -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="justitia-wheel-") as temporary:
        place = Path(temporary)
        installed = install(place)
        check_size(place / "venv")
        check_commands(installed, place)
        asyncio.run(check_gateway(installed, place))
    print(f"the wheel is what it should be ({time.monotonic() - begun:.0f} s)")


def install(place: Path) -> Path:
    """Returns the command `justitia` of a new environment, which has nothing but the wheel and what that needs."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", place, ROOT], check=True)
    (wheel,) = place.glob("justitia-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", wheel], check=True)
    print(f"{wheel.name} is installed")
    return place / "venv/bin/justitia"


def check_size(venv: Path) -> None:
    megabytes = int(subprocess.run(["du", "-sm", venv], check=True, capture_output=True, text=True).stdout.split()[0])
    print(f"{megabytes} MB on disk, of at most {MOST_MB}")
    if megabytes > MOST_MB:
        raise SystemExit("the installation is too large")
    for module in ("xgboost", "scipy", "torch", "vllm"):
        if list(venv.glob(f"lib/python*/site-packages/{module}")):
            raise SystemExit(f"{module} belongs to an extra")


def environment(place: Path) -> dict[str, str]:
    """Of a user who has set nothing."""
    ours = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {**ours, "HOME": str(place), "XDG_STATE_HOME": str(place / "state"), "XDG_CACHE_HOME": str(place / "cache")}


def check_commands(justitia: Path, place: Path) -> None:
    def run(words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [justitia, *words.split()], cwd=place, env=environment(place), capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(os.cpu_count()) as several:
        helps = list(several.map(lambda command: run(f"{command} --help"), COMMANDS))
        lacking = list(several.map(run, LACKING))
    for command, found in zip(COMMANDS, helps, strict=True):
        if found.returncode or not found.stdout.startswith("usage: justitia"):
            raise SystemExit(f"justitia {command} --help: {found.returncode}\n{found.stdout}{found.stderr}")
    print(f"{len(COMMANDS)} commands have their help")
    found = run("check")
    if found.returncode:
        raise SystemExit(f"justitia check: {found.stdout}{found.stderr}")
    for (command, extra), found in zip(LACKING.items(), lacking, strict=True):
        if found.returncode != 2 or extra not in found.stderr or "Traceback" in found.stderr:
            raise SystemExit(f"justitia {command} does not name {extra}]:\n{found.stderr}")
    print(f"{len(LACKING)} commands name the extra that they need")


async def check_gateway(justitia: Path, place: Path) -> None:
    async with ScriptedEngine().serving() as engine:
        process = await asyncio.create_subprocess_exec(
            *(justitia, "gateway", "--engine", engine.url, "--host", "127.0.0.1", "--port", "0"),
            cwd=place,
            env=environment(place),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(60):
                said = await until_said(process.stderr, r"listens on (http://[\d.:]+)", r"justitia\[train\]")
                await ask(re.findall(r"listens on (http://[\d.:]+)", said)[0])
                process.terminate()
                await process.stderr.read()
                if await process.wait():
                    raise SystemExit(f"the gateway ended with {process.returncode}")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    print("a chat completion went through the gateway, which measured it and ended as asked")


async def until_said(stream: asyncio.StreamReader, *patterns: str) -> str:
    said = ""
    while not all(re.search(pattern, said) for pattern in patterns):
        line = await stream.readline()
        if not line:
            raise SystemExit(f"the gateway ended before it reported {patterns}:\n{said}")
        said += line.decode()
    return said


async def ask(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        while (await client.get("/ready")).status_code != 200:  # it has yet to see the engine
            await asyncio.sleep(0.05)
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={"X-Agent-ID": "a"})
        answer.raise_for_status()
        if not answer.json()["choices"]:
            raise SystemExit(f"no answer: {answer.text}")
        metrics = (await client.get("/metrics")).text
    if not re.search(r'justitia_requests_total\{[^}]*outcome="completed"[^}]*\} 1\.0', metrics):
        raise SystemExit(f"the request is not in /metrics:\n{metrics}")


if __name__ == "__main__":
    main()
