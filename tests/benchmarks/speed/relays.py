"""What stands between client and engine: nothing, the bare relay, or the gateway; each a process on the other core."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.cores import confine
from gateway.demo.processes import free_port, server

DIRECT, BARE, GATEWAY = "direct", "bare", "gateway"
# Tasks in flight at the gateway: nothing waits but where that is what is measured.
MANY = 4096
_KIB = re.compile(r"^(VmRSS|Private_\w+):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Relay:
    """pid: of its process; None for the engine itself."""

    name: str
    url: str
    pid: int | None = None

    def cpu_s(self) -> float:
        """CPU time so far, of all its threads; NaN where the system does not tell."""
        try:
            threads = [Path(thread, "schedstat").read_text() for thread in Path(f"/proc/{self.pid}/task").iterdir()]
        except OSError:
            return math.nan
        return sum(int(told.split()[0]) for told in threads) / 1e9

    def memory_mib(self) -> dict[str, float | None]:
        """RSS, and of it what no other process shares (USS). None where the system does not tell."""
        found: dict[str, float] = {}
        for file in ("status", "smaps_rollup"):
            with contextlib.suppress(OSError):
                for name, kib in _KIB.findall(Path(f"/proc/{self.pid}/{file}").read_text()):
                    kind = "rss" if name == "VmRSS" else "uss"
                    found[kind] = found.get(kind, 0.0) + int(kib) / 1024
        return {kind: round(found[kind], 1) if kind in found else None for kind in ("rss", "uss")}


class Cores:
    """One for the engine and the clients, which are us, and one for the relay; None where there is but one, or no say."""

    def __init__(self, *, pin: bool) -> None:
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._own: set[int] | None = None
        self._relay: set[int] | None = None
        if pin and len(allowed) > 1:
            self._own, self._relay = {allowed[0]}, {allowed[1]}

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """We keep to our core meanwhile."""
        if self._own is None:
            yield
            return
        before = os.sched_getaffinity(0)
        confine(os.getpid(), self._own)
        try:
            yield
        finally:
            confine(os.getpid(), before)

    def keep(self, pid: int) -> None:
        if self._relay is not None:
            confine(pid, self._relay)


@contextlib.asynccontextmanager
async def bare_relay(engine_url: str, cores: Cores, directory: Path) -> AsyncIterator[Relay]:
    argv = [sys.executable, "-m", "tests.benchmarks.speed.bare_relay", "--engine", engine_url]
    async with _process(BARE, argv, "/health", cores, directory) as relay:
        yield relay


@contextlib.asynccontextmanager
async def gateway(
    engine_url: str, cores: Cores, directory: Path, *, sqlite: bool = False, max_in_flight: int = MANY
) -> AsyncIterator[Relay]:
    """sqlite: the state is in a file, as by default, and not in memory. Nothing is trained: that is a process of its own, which
    comes when it likes."""
    state = f"sqlite:///{directory / 'state.db'}" if sqlite else "memory:"
    argv = [sys.executable, "-m", "gateway.cli", "gateway", "--engine", engine_url, "--state", state, "--no-train"]
    argv += ["--max-in-flight", str(max_in_flight), "--log-level", "warning"]
    async with _process(GATEWAY, argv, "/ready", cores, directory) as relay:
        yield relay


@contextlib.asynccontextmanager
async def _process(name: str, argv: list[str], ready: str, cores: Cores, directory: Path) -> AsyncIterator[Relay]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # Nothing of the user's: neither keys nor models.
    homes = {"XDG_STATE_HOME": str(directory / "state"), "XDG_CACHE_HOME": str(directory / "cache")}
    log = directory / f"{name}.log"
    async with server(name, [*argv, "--port", str(port)], ready_url=url + ready, log=log, environment=homes) as process:
        cores.keep(process.pid)
        yield Relay(name, url, process.pid)
