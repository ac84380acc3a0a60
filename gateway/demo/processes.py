"""Server processes of a benchmark: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp

from engine.cores import confine, keep_apart

STOP_TIMEOUT_S = 20.0
POLL_S = 0.05


class ServerFailed(Exception):
    """A process of ours failed, or was not ready in time. The message holds the end of its log."""


def own_environment() -> dict[str, str]:
    """Ours without the settings of `justitia`, so that a benchmark measures the defaults and what it sets itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("JUSTITIA_")}


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def server(
    name: str,
    argv: Sequence[str],
    *,
    ready_url: str,
    log: Path,
    timeout_s: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs `argv` while the body runs, from the moment that `ready_url` answers 200. environment: beyond our own. Raises
    `ServerFailed`.

    The process has a session of its own: Ctrl-C reaches us, and we end it in good order.
    """
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**own_environment(), **(environment or {})},
            start_new_session=True,
        )
    try:
        await _wait_ready(name, process, ready_url, log, timeout_s)
        yield process
    finally:
        await stop(process)


async def run_once(name: str, argv: Sequence[str], *, log: Path) -> None:
    """Runs `argv` to its end. Raises `ServerFailed` unless that is a good one."""
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        if await process.wait():
            raise ServerFailed(f"{name} ended with {process.returncode}:\n{tail(log)}")
    finally:
        await stop(process)


async def stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL for one that takes too long or when we are interrupted ourselves."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise


@contextlib.contextmanager
def apart(pid: int) -> Iterator[None]:
    """On a small machine: we, and what we start meanwhile, leave the core alone that `keep_apart` gives to the engine."""
    ours = os.sched_getaffinity(0)
    others = keep_apart(pid)
    if others is None:
        yield
        return
    confine(os.getpid(), others)
    try:
        yield
    finally:
        confine(os.getpid(), ours)


async def _wait_ready(name: str, process: asyncio.subprocess.Process, url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while True:
            if process.returncode is not None:
                raise ServerFailed(f"{name} ended with {process.returncode}:\n{tail(log)}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise ServerFailed(f"{name} was not ready within {timeout_s:.0f} s:\n{tail(log)}")
            await asyncio.sleep(POLL_S)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log; nothing when there is no such file."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
