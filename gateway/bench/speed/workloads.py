"""What is asked of the engine, directly and through each relay in turn: a function for each row, which gives its figures.

Figures are medians over the rounds, of what each round gave. Where a share of the bare relay is told, it is one of the same
round.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import msgspec

from gateway.bench.report import percentile
from gateway.bench.speed.client import Stream, Wire, request
from gateway.bench.speed.engine import Engine
from gateway.bench.speed.relays import BARE, DIRECT, GATEWAY, Relay
from gateway.bench.speed.settings import SpeedSettings
from gateway.bench.text import document, topic

Figures = dict[str, Any]

SHORT_WORDS, LONG_WORDS = 8, 1500  # in tokens: about 10, and 2,000
PROMPTS = 50  # no two alike, so that nothing is gained by remembering the last one
PATIENCE_S = 20.0
# What a client that leaves is given to be noticed.
NOTICED_S = 1.0
THOUGHT_S = 0.02  # that a request is at the engine before its client leaves


class Stuck(Exception):
    """What must come before anything can be measured has not come."""


@dataclass
class Bench:
    """ways: the engine itself, and the relays before it, by name."""

    settings: SpeedSettings
    engine: Engine
    ways: dict[str, Relay]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def number(self) -> int:
        """For a request whose times are noted."""
        return next(self._numbers)

    async def in_turns(self, measure: Callable[[Relay], Awaitable[float]]) -> dict[str, list[float]]:
        """Of each way, a figure for each round."""
        figures: dict[str, list[float]] = {name: [] for name in self.ways}
        for _ in range(self.settings.rounds):
            for name, way in self.ways.items():
                figures[name].append(await measure(way))
        return figures


@dataclass
class Counted:
    count: float = 0


class Spent:
    """The CPU time of relays, for each thing that they have done. It shows less of what else the machine does than any rate."""

    def __init__(self) -> None:
        self._us: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def by(self, way: Relay) -> Iterator[Counted]:
        """How much was done is to be put into what is given."""
        before_s, done = way.cpu_s(), Counted()
        yield done
        if way.pid is not None and done.count:
            self._us.setdefault(way.name, []).append(1e6 * (way.cpu_s() - before_s) / done.count)

    def figures(self) -> Figures:
        return {"cpu_us": {name: round(median(each), 1) for name, each in self._us.items()}}


async def latency(bench: Bench) -> Figures:
    """Added to a request that has the relay to itself, in milliseconds: one after the other, the engine's turn before each."""
    kinds = {
        "short": (bodies("whole", SHORT_WORDS), False),
        "long": (bodies("whole", LONG_WORDS), False),
        "first_chunk": (bodies("stream", SHORT_WORDS, stream=True), True),
    }
    return {kind: await _added(bench, asked, first=first) for kind, (asked, first) in kinds.items()}


async def _added(bench: Bench, asked: Sequence[bytes], *, first: bool) -> Figures:
    """first: up to the first bytes of the answer, not to the last."""
    direct, *relays = bench.ways.values()
    figures: Figures = {}
    async with contextlib.AsyncExitStack() as stack:
        wires = {way.name: await stack.enter_async_context(open_wire(way.url)) for way in bench.ways.values()}

        async def ask(way: Relay, count: int) -> float:
            timed = await wires[way.name].ask(request(way.url, asked[count % len(asked)]))
            return timed.first_s if first else timed.last_s

        for way in bench.ways.values():
            for count in range(bench.settings.warm_up):
                await ask(way, count)
        rounds: dict[str, list[tuple[list[float], list[float]]]] = {relay.name: [] for relay in relays}
        for _ in range(bench.settings.rounds):
            for relay in relays:
                pairs = [(await ask(direct, n), await ask(relay, n)) for n in range(bench.settings.requests)]
                without, through = zip(*pairs, strict=True)
                rounds[relay.name].append((list(without), list(through)))
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        figures[name] = {
            relay: ms(median([percentile(through, share) - percentile(without, share) for without, through in each]))
            for relay, each in rounds.items()
        }
        figures[name][DIRECT] = ms(
            median([percentile(without, share) for each in rounds.values() for without, _ in each])
        )
    return figures


async def throughput(bench: Bench) -> Figures:
    """Requests a second, with so many connections that each carry one after the other."""
    asked = bodies("whole", SHORT_WORDS)
    spent = Spent()

    async def measure(way: Relay) -> float:
        requests = [request(way.url, body) for body in asked]
        async with contextlib.AsyncExitStack() as stack:
            # New ones: a server closes what has been idle during the other measurements.
            count = bench.settings.concurrency
            wires = [await stack.enter_async_context(open_wire(way.url)) for _ in range(count)]
            begin = time.perf_counter()
            end = begin + bench.settings.throughput_s

            async def ask_on(wire: Wire) -> int:
                for count in itertools.count():
                    if time.perf_counter() >= end:
                        return count
                    await wire.ask(requests[count % len(requests)])
                raise AssertionError

            with spent.by(way) as on:
                on.count = sum(await asyncio.gather(*map(ask_on, wires)))
            return on.count / (time.perf_counter() - begin)

    return _rates(await bench.in_turns(measure)) | spent.figures()


async def flood(bench: Bench) -> Figures:
    """Events a second over all streams, each written as soon as the way takes it. A relay that lags finds many at a time, and
    passes them on at once: `per_read` says how many a read of the client brought."""
    together: dict[str, list[float]] = {name: [] for name in bench.ways}

    async def measure(way: Relay) -> float:
        async with open_streams(bench, way, ["flood"] * bench.settings.streams) as streams:
            with bench.engine.flooding():
                await asyncio.sleep(bench.settings.settle_s)
                rate, reads = await _counted(streams, bench.settings.flood_s)
        together[way.name].append(rate / reads)
        return rate

    figures = _rates(await bench.in_turns(measure))
    return figures | {"per_read": {name: round(median(each), 1) for name, each in together.items()}}


async def single(bench: Bench) -> Figures:
    """Events a second over all streams, each written when the client has the last one of its stream: every event is read and
    passed on by itself, as with an engine that is slower than the relay."""

    spent = Spent()

    async def measure(way: Relay) -> float:
        numbers = [bench.number() for _ in range(bench.settings.streams)]
        async with open_streams(bench, way, [f"single:{number}" for number in numbers]) as streams:
            for stream, number in zip(streams, numbers, strict=True):
                stream.again = partial(bench.engine.again, number)
                stream.again()
            await asyncio.sleep(bench.settings.settle_s)
            with spent.by(way) as on:
                rate, _ = await _counted(streams, bench.settings.flood_s)
                on.count = rate * bench.settings.flood_s
            for stream in streams:
                stream.again = None
        return rate

    return _rates(await bench.in_turns(measure)) | spent.figures()


async def paced(bench: Bench) -> Figures:
    """How old events are when they arrive, in milliseconds, with one each `interval_ms` on every stream."""
    settings = bench.settings
    delays: dict[str, list[list[float]]] = {name: [] for name in bench.ways}
    spent = Spent()

    async def measure(way: Relay) -> float:
        async with open_streams(bench, way, [f"paced:{settings.interval_ms}"] * settings.streams) as streams:
            taken: list[float] = []
            await asyncio.sleep(bench.settings.settle_s)
            for stream in streams:
                stream.delays_s = taken
            with spent.by(way) as on:
                await asyncio.sleep(settings.paced_s)
                on.count = len(taken)
            delays[way.name].append(list(taken))
        return len(taken) / settings.paced_s

    rates = await bench.in_turns(measure)
    shares = (("p50", 0.5), ("p99", 0.99), ("worst", 1.0))
    figures: Figures = {
        name: {way: ms(median([percentile(each, share) for each in rounds])) for way, rounds in delays.items()}
        for name, share in shares
    }
    return figures | {"events_per_s": {way: round(median(each)) for way, each in rates.items()}} | spent.figures()


async def leaving(bench: Bench) -> Figures:
    """From a client's leaving to the engine's seeing its connection close, in milliseconds, while the engine is silent: before
    an answer with a length, before a stream's first event, and after it."""
    kinds = {"whole": ("silent", False), "stream": ("mute", True), "mid_stream": ("hushed", True)}
    return {kind: await _leaving(bench, model, stream=stream) for kind, (model, stream) in kinds.items()}


async def _leaving(bench: Bench, model: str, *, stream: bool) -> Figures:
    rounds: dict[str, list[list[float]]] = {name: [] for name in bench.ways}
    for _ in range(bench.settings.rounds):
        for name, way in bench.ways.items():
            taken = [await _leave(bench, way, model, stream=stream) for _ in range(bench.settings.clients_leaving)]
            rounds[name].append(taken)
    return {
        figure: {way: ms(median([percentile(each, share) for each in taken])) for way, taken in rounds.items()}
        for figure, share in (("p50", 0.5), ("worst", 1.0))
    }


async def _leave(bench: Bench, way: Relay, model: str, *, stream: bool) -> float:
    """`NOTICED_S` if it is not noticed until then."""
    number = bench.number()
    noted = bench.engine.note(number)
    (body,) = bodies(f"{model}:{number}", SHORT_WORDS, count=1, stream=stream)
    client = await Stream.open(way.url, request(way.url, body))
    async with asyncio.timeout(PATIENCE_S):
        await noted.came.wait()
    await asyncio.sleep(THOUGHT_S)
    left_s = time.monotonic()
    client.close()
    await asyncio.wait((noted.done,), timeout=NOTICED_S)
    return noted.done.result() - left_s if noted.done.done() else NOTICED_S


@contextlib.asynccontextmanager
async def open_wire(url: str) -> AsyncIterator[Wire]:
    wire = await Wire.connect(url)
    try:
        yield wire
    finally:
        wire.close()


@contextlib.asynccontextmanager
async def open_streams(bench: Bench, way: Relay, models: Sequence[str]) -> AsyncIterator[list[Stream]]:
    """One for each model, from when each has had an event. Returns when the engine is rid of them. Raises `Stuck`."""
    streams: list[Stream] = []
    what = f"{len(models)} streams, {way.name}"
    try:
        for place, model in enumerate(models):
            (body,) = bodies(model, SHORT_WORDS, count=1, seed=place, stream=True)
            streams.append(await Stream.open(way.url, request(way.url, body)))
        await until(lambda: all(stream.events for stream in streams), what)
        yield streams
        if any(stream.closed for stream in streams):
            raise Stuck(f"a stream broke off: {what}")
    finally:
        for stream in streams:
            stream.close()
    await until(lambda: bench.engine.streams == 0, f"the end of {what}")


async def _counted(streams: Sequence[Stream], seconds: float) -> tuple[float, float]:
    """Events and reads, a second."""

    def counts() -> tuple[float, int, int]:
        return time.perf_counter(), sum(stream.events for stream in streams), sum(stream.reads for stream in streams)

    begin, *before = counts()
    await asyncio.sleep(seconds)
    end, *after = counts()
    events, reads = (new - old for new, old in zip(after, before, strict=True))
    return events / (end - begin), reads / (end - begin)


async def until(true: Callable[[], bool], what: str) -> None:
    """Raises `Stuck`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline_s:
            raise Stuck(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(0.01)


def bodies(model: str, words: int, *, count: int = PROMPTS, seed: int = 0, stream: bool = False) -> list[bytes]:
    """Of requests with prompts of so many words of English."""
    rng = Random(seed)
    asked = []
    for _ in range(count):
        messages = [{"role": "user", "content": document(rng, topic(rng), words)}]
        asked.append(msgspec.json.encode({"model": model, "messages": messages, "stream": stream}))
    return asked


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rates(rounds: Mapping[str, Sequence[float]]) -> Figures:
    """A second, of each way; and the gateway's share of the bare relay's, where there is one."""
    figures: Figures = {name: round(median(each)) for name, each in rounds.items()}
    if BARE in rounds and GATEWAY in rounds:
        shares = [ours / bare for ours, bare in zip(rounds[GATEWAY], rounds[BARE], strict=True)]
        figures["of_bare"] = round(median(shares), 3)
    return figures | {"rounds": {name: [round(rate) for rate in each] for name, each in rounds.items()}}
