"""A run as lines of a table, and what is asked of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.speed.relays import BARE, DIRECT, GATEWAY

Row = Mapping[str, Any]
STORED = {"": "", "_sqlite": ", state in SQLite"}


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure may be at most, or must be at least."""

    bound: float
    unit: str = ""
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:,g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Line:
    """what: with the unit. None: not measured, or not asked for. judged: what the target is for, if that is not the gateway's
    figure."""

    what: str
    gateway: float
    bare: float | None = None
    direct: float | None = None
    digits: int = 2
    target: Target | None = None
    judged: float | None = None

    @property
    def value(self) -> float:
        return self.gateway if self.judged is None else self.judged

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.is_met(self.value)

    def cells(self) -> tuple[str, ...]:
        """What, direct, bare, gateway, target, and whether it is met."""
        figures = (self.direct, self.bare, self.gateway)
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        texts = ("" if figure is None else f"{figure:,.{self.digits}f}" for figure in figures)
        return (self.what, *texts, "" if self.target is None else str(self.target), verdict)


def lines_of(row: str, figures: Row, settings: Row) -> Iterator[Line]:
    """row: as `measure` names it."""
    name, _, stored = row.partition("_")
    said = STORED[f"_{stored}" if stored else ""]
    match name:
        case "latency":
            yield from _latency(figures, said)
        case "throughput":
            yield _ways(f"requests a second, {settings['concurrency']} at a time{said}", figures, 0, _at_least(2500))
            yield Line(f"the same, of the bare relay's{said}", figures["of_bare"], target=_at_least(0.6))
            yield _ways(f"CPU time of a request, µs{said}", figures["cpu_us"], 0)
        case "flood":
            yield _ways(f"chunks a second, {settings['streams']} streams flat out", figures, 0, _at_least(60_000))
            yield Line("the same, of the bare relay's", figures["of_bare"], target=_at_least(0.75))
            yield _ways("events that a read of the client brings", figures["per_read"], 1)
        case "single":
            yield _ways(f"chunks a second, {settings['streams']} streams, each by itself", figures, 0)
            yield Line("the same, of the bare relay's", figures["of_bare"])
            yield _ways("CPU time of a chunk, µs", figures["cpu_us"], 1)
        case "paced":
            what = f"chunk delay, {settings['streams']} streams, an event each {settings['interval_ms']} ms"
            yield _ways(f"{what}, P50, ms", figures["p50"])
            yield _ways(f"{what}, P99, ms", figures["p99"], target=Target(3, " ms"))
        case "leaving":
            kinds = {"whole": "no stream", "stream": "before the first event", "mid_stream": "amid a stream"}
            for kind, when in kinds.items():
                yield _ways(f"client leaves, {when}, worst, ms", figures[kind]["worst"], target=Target(10, " ms"))
        case "waiting":
            yield from _waiting(figures, settings)
        case "memory":
            yield from _memory(figures, f"memory, {settings['open_streams']:,} open streams")


def _ways(what: str, ways: Row, digits: int = 2, target: Target | None = None) -> Line:
    return Line(what, ways[GATEWAY], ways.get(BARE), ways.get(DIRECT), digits, target)


def _at_least(bound: float) -> Target:
    return Target(bound, at_least=True)


def _latency(figures: Row, said: str) -> Iterator[Line]:
    kinds = {"short": "10 tokens", "long": "2,000 tokens", "first_chunk": "10 tokens, first chunk of a stream"}
    for kind, asked in kinds.items():
        target = None if kind == "first_chunk" else Target(0.6, " ms")
        yield _ways(f"added latency, {asked}, P50, ms{said}", figures[kind]["p50"], target=target)
        yield _ways(f"added latency, {asked}, P99, ms{said}", figures[kind]["p99"])


def _waiting(figures: Row, settings: Row) -> Iterator[Line]:
    crowd = f"{settings['agents_waiting']:,} agents wait, {settings['in_flight']} tasks in flight"
    yield Line("overhead of a request, nobody waits, P99, ms", figures["p99"]["empty"])
    above = Target(1, " ms above")
    yield Line(
        f"overhead of a request, {crowd}, P99, ms", figures["p99"]["full"], target=above, judged=figures["above_p99"]
    )
    yield Line("a freed slot stands empty, P50, ms", figures["slot_empty"]["p50"])


def _memory(figures: Row, what: str) -> Iterator[Line]:
    for kind, said in (("rss", "RSS"), ("uss", "USS")):
        ways = {name: of["open"][kind] for name, of in figures.items()}
        if ways[GATEWAY] is not None:
            yield _ways(f"{what}, {said}, MiB", ways, 0, Target(150, " MiB") if kind == "rss" else None)
