"""`justitia serve` and `justitia gateway` as users start them: processes, a ready line, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest

from gateway.demo.processes import free_port
from tests.engine.live import LiveEngine
from tests.wire.scripted_engine import ScriptedEngine, wait_for_word


class Command:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def until_said(self, text: str) -> None:
        assert self.process.stderr is not None
        async with asyncio.timeout(240):
            while text not in self.said:
                line = await self.process.stderr.readline()
                assert line, f"it ended before it said {text!r}:\n{self.said}"
                self.said += line.decode()

    async def end(self, signal_number: int) -> int:
        """Returns the exit code."""
        self.process.send_signal(signal_number)
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            self.said += (await self.process.stderr.read()).decode()
            return await self.process.wait()


@asynccontextmanager
async def justitia(*arguments: str, **environment: str) -> AsyncIterator[Command]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway.cli",
        *arguments,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        yield Command(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def group_members(leader: int) -> list[int]:
    """Living processes of a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


@pytest.mark.engine
async def test_serve_says_when_it_is_ready_answers_the_sdk_and_leaves_no_process(session_dir: Path) -> None:
    port = free_port()
    runtime = session_dir / "serve"
    arguments = (
        "--port",
        str(port),
        "--max-model-len",
        "2048",
        "--kv-blocks",
        "64",
        "--runtime-dir",
        str(runtime),
        "--state",
        "memory:",
    )
    async with justitia("serve", *arguments, XDG_CACHE_HOME=str(session_dir / "cache")) as serve:
        await serve.until_said("spawned, pid ")
        engine_pid = int(serve.said.rpartition("spawned, pid ")[2].split()[0])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            early = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert early.status_code == 503
        await serve.until_said("stop: Ctrl-C")
        assert f"ready at http://127.0.0.1:{port}" in serve.said
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in serve.said
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            assert answer.choices
        assert len(group_members(engine_pid)) >= 2, "vLLM's server and its core"
        assert await serve.end(signal.SIGINT) == 0
        assert group_members(engine_pid) == []
        assert not (runtime / "engine.sock").exists()


@pytest.mark.engine
async def test_serve_that_is_killed_takes_its_engine_with_it(session_dir: Path) -> None:
    runtime = session_dir / "killed"
    async with justitia("serve", "--port", "0", "--runtime-dir", str(runtime), "--state", "memory:") as serve:
        await serve.until_said("spawned, pid ")
        engine_pid = int(serve.said.rpartition("spawned, pid ")[2].split()[0])
        serve.process.kill()
        await serve.process.wait()
        async with asyncio.timeout(60):
            while group_members(engine_pid):
                await asyncio.sleep(0.1)


@pytest.mark.engine
async def test_gateway_alone_before_the_real_engine(engine: LiveEngine, tmp_path: Path) -> None:
    """It learns, and what it learned is there again after a restart."""
    engine.wait_ready()
    port, state = free_port(), f"sqlite:///{tmp_path}/state.db"
    arguments = ("--engine", engine.url, "--link", engine.link_address, "--port", str(port), "--state", state)
    for learned in (0, 1):
        async with justitia("gateway", *arguments) as command:
            await command.until_said(f"learned from {learned} agents")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(httpx.TransportError):
                            if (await client.get("/ready")).status_code == 200:
                                break
                        await asyncio.sleep(0.05)
                body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
                headers = {"X-Agent-ID": "a", "X-Agent-Class": "c", "X-Agent-Final": "true"}
                assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            assert await command.end(signal.SIGTERM) == 0


async def test_gateway_drains_on_sigterm_and_the_second_signal_cuts_off() -> None:
    async with ScriptedEngine(default=wait_for_word).serving() as engine:
        port = free_port()
        async with justitia("gateway", "--engine", engine.url, "--port", str(port), "--state", "memory:") as command:
            await command.until_said("the engine is up")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                request = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
                await engine.until(lambda engine: len(engine.bodies) == 1)
                command.process.send_signal(signal.SIGTERM)
                await command.until_said("shutting down: 0 waiting, 1 in flight")
                assert await command.end(signal.SIGTERM) == 0
                assert "1 tasks in flight are cut off" in command.said
                assert (await request).status_code == 503


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gateway"], 2, "--engine is needed"),
        (["gateway", "--engine", "nonsense"], 2, "must begin with http://"),
        (["fly"], 2, "no command 'fly'"),
        (["gateway", "--engine", "http://127.0.0.1:1", "--host", "256.0.0.1"], 1, "cannot listen on 256.0.0.1"),
    ],
)
async def test_what_cannot_be_is_said_in_a_line(arguments: list[str], code: int, message: str) -> None:
    async with justitia(*arguments) as command:
        assert command.process.stderr is not None
        said = (await command.process.stderr.read()).decode()
        assert await command.process.wait() == code
        assert message in said
        assert "Traceback" not in said


@pytest.mark.engine
async def test_a_model_that_does_not_exist_ends_serve_with_the_engines_words(session_dir: Path) -> None:
    runtime = session_dir / "nomodel"
    async with justitia(
        "serve",
        "--model",
        str(session_dir / "no-such-model"),
        "--port",
        "0",
        "--runtime-dir",
        str(runtime),
        "--state",
        "memory:",
    ) as serve:
        assert serve.process.stderr is not None
        async with asyncio.timeout(240):
            said = (await serve.process.stderr.read()).decode()
            assert await serve.process.wait() == 1
        assert "no-such-model" in said
