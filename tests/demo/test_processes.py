"""Servers of a benchmark: waited for, and gone afterwards whatever happened."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from gateway.demo.processes import ServerFailed, apart, free_port, own_environment, run_once, server

pytestmark = pytest.mark.wire


def stand_in(port: int) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.stand_in", "--port", str(port)]


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_server_runs_while_the_body_does(tmp_path: Path) -> None:
    port = free_port()
    async with server(
        "it", stand_in(port), ready_url=f"http://127.0.0.1:{port}/health", log=tmp_path / "log"
    ) as process:
        assert runs(process.pid)
    assert process.returncode is not None
    assert not runs(process.pid)


async def test_a_server_is_stopped_when_the_body_is_cancelled(tmp_path: Path) -> None:
    port = free_port()
    pids: list[int] = []

    async def use() -> None:
        async with server(
            "it", stand_in(port), ready_url=f"http://127.0.0.1:{port}/health", log=tmp_path / "log"
        ) as it:
            pids.append(it.pid)
            await asyncio.sleep(60)

    using = asyncio.create_task(use())
    while not pids:
        await asyncio.sleep(0.05)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert not runs(pids[0])


async def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    with pytest.raises(ServerFailed, match="it ended with 3:\nno such thing"):
        async with server("it", command, ready_url="http://127.0.0.1:9/", log=tmp_path / "log"):
            pass


async def test_a_server_that_is_never_ready_is_told_and_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(ServerFailed, match="not ready within 0 s"):
        async with server("it", command, ready_url="http://127.0.0.1:9/", log=tmp_path / "log", timeout_s=0.3):
            pass


async def test_what_runs_once_runs_to_its_end_or_is_told(tmp_path: Path) -> None:
    await run_once("it", [sys.executable, "-c", "print('done')"], log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "done\n"
    with pytest.raises(ServerFailed, match="it ended with 4:\noops"):
        await run_once("it", [sys.executable, "-c", "print('oops'); raise SystemExit(4)"], log=tmp_path / "log")


async def test_settings_of_the_user_do_not_reach_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUSTITIA_POLICY", "fcfs")
    assert not any(name.startswith("JUSTITIA_") for name in own_environment())
    assert own_environment()["PATH"] == os.environ["PATH"]


async def test_on_a_small_machine_descendants_and_the_rest_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import subprocess; subprocess.run(['sleep', '60'])"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, start_new_session=True)
    confined: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: confined.update({thread: cores}))
    try:
        children: list[int] = []
        while not children:
            await asyncio.sleep(0.05)
            text = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()  # noqa: ASYNC240
            children = [int(child) for child in text.split()]
        with apart(parent.pid):
            assert confined[children[0]] == {2}
            assert confined[parent.pid] == confined[os.getpid()] == {5}
        assert confined[os.getpid()] == {2, 5}
        confined.clear()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        with apart(parent.pid):
            assert not confined
    finally:
        os.killpg(parent.pid, 9)
        await parent.wait()
