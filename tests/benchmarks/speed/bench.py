"""What all rows are measured with: the ways in turn, clients, and figures from rounds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from gateway.replay.figures import percentile
from gateway.replay.texts.english import document, topic
from tests.benchmarks.speed.client import Stream, Wire, request
from tests.benchmarks.speed.engine import Engine
from tests.benchmarks.speed.relays import Relay
from tests.benchmarks.speed.settings import SpeedSettings

Figures = dict[str, Any]

SHARES = {"p50": 0.5, "p99": 0.99, "worst": 1.0}
SHORT_WORDS = 8  # in tokens: about 10
PROMPTS = 50  # no two alike, so that nothing is gained by remembering the last one
PATIENCE_S = 20.0


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


def percentiles(rounds: Mapping[str, Sequence[Sequence[float]]], *names: str) -> dict[str, dict[str, float]]:
    """Of seconds, by way or whatever else: the median over the rounds of each percentile, in milliseconds. By name, then by
    way."""
    return {
        name: {way: ms(median([percentile(each, SHARES[name]) for each in taken])) for way, taken in rounds.items()}
        for name in names
    }


def ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
