"""A real Redis on a port of its own, that can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest


def _port_to_come_back_to() -> int:
    """Not one that the system gives to whoever connects: while the server is away, somebody may be given it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # each has a hundred ports of its own
    for port in range(first - 1 - 100 * worker - os.getpid() % 10, 1024, -1):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class RedisServer:
    """persistent: what it has said that it has written survives a kill."""

    def __init__(self, directory: Path, *, persistent: bool) -> None:
        if shutil.which("redis-server") is None:
            if os.environ.get("CI"):
                pytest.fail("redis-server is not installed")
            pytest.skip("redis-server is not installed")
        directory.mkdir(exist_ok=True)
        port = _port_to_come_back_to()
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--dir", str(directory), "--appendonly", "yes" if persistent else "no"]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns when it can be used."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
        raise AssertionError("redis-server ended")

    def stop(self) -> None:
        """It is there, and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
