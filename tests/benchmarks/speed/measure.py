"""A run: which processes a row needs, and what is recorded."""

from __future__ import annotations

import contextlib
import datetime
import gc
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.replay import environment
from tests.benchmarks.speed.bench import Bench, Figures
from tests.benchmarks.speed.engine import Engine, serving
from tests.benchmarks.speed.lines import lines_of
from tests.benchmarks.speed.memory import memory
from tests.benchmarks.speed.relays import BARE, DIRECT, GATEWAY, Cores, Relay, bare_relay, gateway
from tests.benchmarks.speed.settings import ROWS, SpeedSettings
from tests.benchmarks.speed.waiting import waiting
from tests.benchmarks.speed.workloads import flood, latency, leaving, paced, single, throughput

IN_TURNS = {
    "latency": latency,
    "throughput": throughput,
    "flood": flood,
    "single": single,
    "paced": paced,
    "leaving": leaving,
}
# With the state in SQLite too.
STORED = ("latency", "throughput")


class TooFewFiles(Exception):
    """The system lets us open fewer connections than are to be measured."""


async def measure(settings: SpeedSettings, directory: Path, measured: Callable[[str, Figures], None]) -> dict[str, Any]:
    """The record. directory: for logs and state. measured: told of each row. Raises `ServerFailed`, `Stuck`, `Refused`,
    `TooFewFiles` and `ConnectionError`."""
    _let_open(settings)
    machine = environment.machine()  # before we keep to one core of it
    rows: dict[str, Figures] = {}

    def add(name: str, figures: Figures) -> None:
        rows[name] = figures
        measured(name, figures)

    cores = Cores(pin=settings.pin)
    engine = Engine()
    async with serving(engine) as url:
        with cores.ours(), _collecting_seldom():
            bench = Bench(settings, engine, {})
            direct = Relay(DIRECT, url)
            wanted, stored = ([row for row in of if row in settings.rows] for of in (IN_TURNS, STORED))
            if wanted or "memory" in settings.rows:
                async with _both(url, cores, directory / "memory", sqlite=False) as relays:
                    bench.ways = {DIRECT: direct, **relays}
                    if "memory" in settings.rows:  # the first, while they are new
                        add("memory", {name: await memory(bench, relay) for name, relay in relays.items()})
                    for row in wanted:
                        add(row, await IN_TURNS[row](bench))
            if stored:
                async with _both(url, cores, directory / "sqlite", sqlite=True) as relays:
                    bench.ways = {DIRECT: direct, **relays}
                    for row in stored:
                        add(f"{row}_sqlite", await IN_TURNS[row](bench))
            if "waiting" in settings.rows:
                async with gateway(url, cores, _made(directory / "waiting"), max_in_flight=settings.in_flight) as relay:
                    add("waiting", await waiting(bench, relay))
    told = asdict(settings)
    rows = {name: rows[name] for row in ROWS for name in (row, f"{row}_sqlite") if name in rows}
    targets = [
        {"what": line.what, "value": line.value, "target": str(line.target), "met": line.met}
        for name, figures in rows.items()
        for line in lines_of(name, figures, told)
        if line.target is not None
    ]
    return {
        "benchmark": "gateway-speed",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": told,
        "rows": rows,
        "targets": targets,
        "versions": environment.versions(),
        "machine": machine,
    }


@contextlib.asynccontextmanager
async def _both(url: str, cores: Cores, directory: Path, *, sqlite: bool) -> AsyncIterator[dict[str, Relay]]:
    async with (
        bare_relay(url, cores, _made(directory)) as bare,
        gateway(url, cores, directory, sqlite=sqlite) as ours,
    ):
        yield {BARE: bare, GATEWAY: ours}


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


@contextlib.contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Our own garbage collector would be measured along: what is here already is let be, and the rest seldom looked at."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _let_open(settings: SpeedSettings) -> None:
    """As many files as both ends of all connections take, here and in the processes that we start."""
    clients = max(settings.open_streams, settings.streams, settings.agents_waiting + settings.in_flight)
    needed = 2 * clients + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TooFewFiles(f"{needed} open files are needed, and {hard} allowed (ulimit -n)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
