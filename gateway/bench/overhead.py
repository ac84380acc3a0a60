"""What the gateway itself costs: `python -m gateway.bench.overhead --out FILE`.

A stand-in engine answers at once, and the same client asks it directly and through the gateway, in turns, so that
whatever else the machine does falls on both. Three figures: the latency that is added to a request that has the gateway
to itself, the same for the first chunk of a stream, and the requests a second with 64 at a time. One JSON line is
appended to the file for each run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from gateway.bench import environment, stand_in, wire
from gateway.bench.processes import ServerFailed, free_port, server, tail
from gateway.bench.report import percentile

PATH = "/v1/chat/completions"
# Far more than 64 requests can be predicted to need: this measures what a decision costs, not waiting for memory.
KV_BLOCKS = 1_000_000
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
PROMPT = "You are a helpful assistant. " * 30  # about a kilobyte


@dataclass(frozen=True, slots=True)
class OverheadSettings:
    """Bounds of one run: it takes about a minute with these."""

    rounds: int = 5
    requests: int = 400  # of each way and kind in a round, one at a time
    warm_up: int = 200
    concurrency: int = 64
    throughput_s: float = 4.0  # for each way in a round
    output_tokens: int = 16
    pin: bool = True  # client and engine on one core, the gateway on another, where there are two


class Way:
    """A URL, and a connection to it."""

    def __init__(self, url: str, connection: wire.Wire) -> None:
        self._url = url
        self._wire = connection

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[Way]:
        connection = await wire.Wire.connect(url)
        try:
            yield cls(url, connection)
        finally:
            connection.close()

    async def ask(self, body: bytes) -> wire.Timed:
        """Raises `RuntimeError` on any answer but 200: then what is measured is not what was meant."""
        timed = await self._wire.ask(wire.request(self._url, PATH, body))
        if timed.status != 200:
            raise RuntimeError(f"{self._url} answered {timed.status}")
        return timed


async def measure(settings: OverheadSettings, log_directory: Path) -> dict[str, Any]:
    """One run, as the record that is written. Raises `ServerFailed` and `RuntimeError`."""
    async with contextlib.AsyncExitStack() as stack:
        urls = await stack.enter_async_context(_servers(settings, log_directory))
        ways = {name: await stack.enter_async_context(Way.to(url)) for name, url in urls.items()}
        whole, streamed = _body(stream=False), _body(stream=True)
        for way in ways.values():
            for body in (whole, streamed):
                for _ in range(settings.warm_up):
                    await way.ask(body)
        latency: list[dict[str, list[float]]] = []
        first_chunk: list[dict[str, list[float]]] = []
        throughput: list[dict[str, float]] = []
        for _ in range(settings.rounds):
            latency.append(await _in_turns(ways, whole, settings.requests, first=False))
            first_chunk.append(await _in_turns(ways, streamed, settings.requests, first=True))
            throughput.append({name: await _throughput(url, whole, settings) for name, url in urls.items()})
    return {
        "benchmark": "gateway-overhead",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "latency_ms": _spread(latency),
        "first_chunk_ms": _spread(first_chunk),
        "requests_per_s": {name: round(percentile([each[name] for each in throughput], 0.5)) for name in ways}
        | {"rounds": [{name: round(rate) for name, rate in each.items()} for each in throughput]},
        "versions": environment.versions(),
        "machine": environment.machine(),
    }


@contextlib.asynccontextmanager
async def _servers(settings: OverheadSettings, log_directory: Path) -> AsyncIterator[dict[str, str]]:
    """The stand-in's URL, and that of a gateway in front of it."""
    engine_port, port = free_port(), free_port()
    engine_url, url = f"http://127.0.0.1:{engine_port}", f"http://127.0.0.1:{port}"
    engine = [sys.executable, "-m", "gateway.bench.stand_in", "--port", str(engine_port)]
    engine += ["--output-tokens", str(settings.output_tokens), "--kv-blocks", str(KV_BLOCKS)]
    gateway = [sys.executable, "-m", "gateway.cli", "gateway", "--engine", engine_url, "--port", str(port)]
    gateway += ["--state", "memory:", "--log-level", "warning"]
    async with (
        server("the stand-in", engine, ready_url=f"{engine_url}/health", log=log_directory / "stand-in.log") as first,
        server("the gateway", gateway, ready_url=f"{url}/ready", log=log_directory / "gateway.log") as second,
    ):
        if settings.pin:
            _pin({os.getpid(): 0, first.pid: 0, second.pid: 1})
        yield {"direct": engine_url, "through": url}


def _pin(cores: dict[int, int]) -> None:
    """Process to the number of its core, among those that we may use. Does nothing where there is one, or no say."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        for pid, core in cores.items():
            os.sched_setaffinity(pid, {allowed[core]})


def _body(*, stream: bool) -> bytes:
    body = {"model": stand_in.MODEL, "messages": [{"role": "user", "content": PROMPT}], "stream": stream}
    return msgspec.json.encode(body)


async def _in_turns(ways: dict[str, Way], body: bytes, count: int, *, first: bool) -> dict[str, list[float]]:
    """Seconds to the first byte of the body or to the last, one request at a time, one way after the other."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, way in ways.items():
            timed = await way.ask(body)
            taken[name].append(timed.first_s if first else timed.last_s)
    return taken


async def _throughput(url: str, body: bytes, settings: OverheadSettings) -> float:
    """Requests a second, with so many connections that each carry one after the other."""
    async with contextlib.AsyncExitStack() as stack:
        # New ones: a server closes what has been idle during the other measurements.
        ways = [await stack.enter_async_context(Way.to(url)) for _ in range(settings.concurrency)]
        start = time.perf_counter()
        end = start + settings.throughput_s

        async def ask_on(way: Way) -> int:
            count = 0
            while time.perf_counter() < end:
                await way.ask(body)
                count += 1
            return count

        counts = await asyncio.gather(*(ask_on(way) for way in ways))
        return sum(counts) / (time.perf_counter() - start)


def _spread(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Percentiles in milliseconds: of all rounds together, what is added at each, and what each round added at p50."""
    spread: dict[str, Any] = {
        name: _percentiles(value for each in rounds for value in each[name]) for name in ("direct", "through")
    }
    spread["added"] = {share: round(spread["through"][share] - spread["direct"][share], 4) for share in SHARES}
    spread["added_p50_by_round"] = [
        round(1000 * (percentile(each["through"], 0.5) - percentile(each["direct"], 0.5)), 4) for each in rounds
    ]
    return spread


def _percentiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: round(1000 * percentile(ordered, share), 4) for name, share in SHARES.items()}


def table(record: dict[str, Any]) -> Table:
    drawn = Table(title="What the gateway adds", title_justify="left")
    for heading in ("", "direct", "through", "added"):
        drawn.add_column(heading, justify="left" if not heading else "right")
    for title, key in (("one at a time", "latency_ms"), ("first chunk of a stream", "first_chunk_ms")):
        for share in SHARES:
            cells = (f"{record[key][way][share]:.2f} ms" for way in ("direct", "through", "added"))
            drawn.add_row(f"{title}, {share}", *cells)
    rates = record["requests_per_s"]
    title = f"requests a second, {record['settings']['concurrency']} at a time"
    drawn.add_row(title, f"{rates['direct']:,}", f"{rates['through']:,}", "")
    return drawn


def main() -> None:
    defaults = OverheadSettings()
    parser = argparse.ArgumentParser(
        prog="python -m gateway.bench.overhead", description="What the gateway itself costs."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-results/overhead.jsonl"), help="file that one JSON line is appended to"
    )
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument(
        "--requests", type=int, default=defaults.requests, help="of each kind in a round, one at a time"
    )
    parser.add_argument("--concurrency", type=int, default=defaults.concurrency)
    parser.add_argument(
        "--throughput-s", type=float, default=defaults.throughput_s, help="seconds for each way in a round"
    )
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="leave the choice of cores to the system")
    options = vars(parser.parse_args())
    out: Path = options.pop("out")
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="justitia-overhead-") as logs,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        try:
            record = runner.run(measure(OverheadSettings(**options), Path(logs)))
        except (ServerFailed, RuntimeError, ConnectionError) as error:
            sys.exit(f"overhead: {error}\n{tail(Path(logs) / 'gateway.log')}".rstrip())
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")
    console.print(table(record))
    console.print(f"one line appended to {out}")


if __name__ == "__main__":
    main()
