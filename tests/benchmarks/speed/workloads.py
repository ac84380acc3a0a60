"""What is asked of the engine, directly and through each relay in turn: a function for each row, which gives its figures.

Figures are medians over the rounds, of what each round gave. Where a share of the bare relay is told, it is one of the same
round.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial

from gateway.replay.figures import percentile
from tests.benchmarks.speed.bench import (
    PATIENCE_S,
    SHARES,
    SHORT_WORDS,
    Bench,
    Figures,
    Spent,
    bodies,
    median,
    ms,
    open_streams,
    open_wire,
    percentiles,
)
from tests.benchmarks.speed.client import Stream, Wire, request
from tests.benchmarks.speed.relays import BARE, DIRECT, GATEWAY, Relay

LONG_WORDS = 1500  # in tokens: about 2,000
# Of an agent, one after the other; then the connection is the next one's.
TASKS = 8
# What a client that leaves is given to be noticed.
NOTICED_S = 1.0
THOUGHT_S = 0.02  # that a request is at the engine before its client leaves


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
    async with contextlib.AsyncExitStack() as stack:
        wires = {way.name: await stack.enter_async_context(open_wire(way.url)) for way in bench.ways.values()}

        async def ask(way: Relay, count: int) -> float:
            body = asked[count % len(asked)]
            timed = await wires[way.name].ask(request(way.url, body, _agent(0, count)))
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
    figures = percentiles({DIRECT: [without for each in rounds.values() for without, _ in each]}, "p50", "p99")
    for name, added in figures.items():
        for relay_name, each in rounds.items():
            share = SHARES[name]
            added[relay_name] = ms(
                median([percentile(through, share) - percentile(without, share) for without, through in each])
            )
    return figures


def _agent(connection: int, count: int) -> dict[str, str]:
    return {"X-Agent-ID": f"agent-{connection}-{count // TASKS}"}


async def throughput(bench: Bench) -> Figures:
    """Requests a second, with so many connections that each carry one after the other."""
    asked = bodies("whole", SHORT_WORDS)
    spent = Spent()

    async def measure(way: Relay) -> float:
        async with contextlib.AsyncExitStack() as stack:
            # New ones: a server closes what has been idle during the other measurements.
            count = bench.settings.concurrency
            wires = [await stack.enter_async_context(open_wire(way.url)) for _ in range(count)]
            begin = time.perf_counter()
            end = begin + bench.settings.throughput_s

            async def ask_on(number: int, wire: Wire) -> int:
                for count in itertools.count():
                    if time.perf_counter() >= end:
                        return count
                    await wire.ask(request(way.url, asked[count % len(asked)], _agent(number, count)))
                raise AssertionError

            with spent.by(way) as on:
                on.count = sum(await asyncio.gather(*(ask_on(*each) for each in enumerate(wires))))
            return on.count / (time.perf_counter() - begin)

    return _rates(await bench.in_turns(measure)) | spent.figures()


async def flood(bench: Bench) -> Figures:
    """Events a second over all streams, each written as soon as the way takes it. A relay that lags finds many at a time, and
    passes them on at once: `per_read` says how many a read of the client brought."""
    together: dict[str, list[float]] = {name: [] for name in bench.ways}
    spent = Spent()

    async def measure(way: Relay) -> float:
        async with open_streams(bench, way, ["flood"] * bench.settings.streams) as streams:
            with bench.engine.flooding():
                await asyncio.sleep(bench.settings.settle_s)
                with spent.by(way) as on:
                    rate, reads = await _counted(streams, bench.settings.flood_s)
                    on.count = rate * bench.settings.flood_s
        together[way.name].append(rate / reads)
        return rate

    figures = _rates(await bench.in_turns(measure))
    return figures | {"per_read": {name: round(median(each), 1) for name, each in together.items()}} | spent.figures()


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
    figures = percentiles(delays, "p50", "p99", "worst") | spent.figures()
    return figures | {"events_per_s": {way: round(median(each)) for way, each in rates.items()}}


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
    return percentiles(rounds, "p50", "worst")


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


async def _counted(streams: Sequence[Stream], seconds: float) -> tuple[float, float]:
    """Events and reads, a second."""

    def counts() -> tuple[float, int, int]:
        return time.perf_counter(), sum(stream.events for stream in streams), sum(stream.reads for stream in streams)

    begin, *before = counts()
    await asyncio.sleep(seconds)
    end, *after = counts()
    events, reads = (new - old for new, old in zip(after, before, strict=True))
    return events / (end - begin), reads / (end - begin)


def _rates(rounds: Mapping[str, Sequence[float]]) -> Figures:
    """A second, of each way; and the gateway's share of the bare relay's, where there is one."""
    figures: Figures = {name: round(median(each)) for name, each in rounds.items()}
    if BARE in rounds and GATEWAY in rounds:
        shares = [ours / bare for ours, bare in zip(rounds[GATEWAY], rounds[BARE], strict=True)]
        figures["of_bare"] = round(median(shares), 3)
    return figures | {"rounds": {name: [round(rate) for rate in each] for name, each in rounds.items()}}
