"""Whether agents that wait are felt by a request that goes through.

A crowd of clients asks without pause, each time as another agent, and the engine answers one of the tasks that it holds at a
steady rate, the oldest first. So as many requests a second go through the gateway whether 2,000 agents wait before 200 tasks
in flight or nobody waits at all, and only the queue differs.

The overhead of a request is the time until its client has the answer, less the time in the queue (`X-Justitia-Queue-Ms`, told
to a tenth of a millisecond), less the time that the engine held it, by the engine's own clock: what is done on arrival and
after release. Requests of the full queue came when it was full already, and had their turn while it still was. What the
scheduler does between one task's end and another's release counts as time in the queue; so it is measured too how long a freed
slot stands empty until the next task is at the engine. The gateway's own histogram of its overhead, read before and after, is
recorded beside the clients' figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp

from gateway.replay.figures import percentile
from tests.benchmarks.speed.bench import (
    PATIENCE_S,
    SHORT_WORDS,
    Bench,
    Figures,
    Stuck,
    bodies,
    median,
    ms,
    percentiles,
    until,
)
from tests.benchmarks.speed.client import Wire, request
from tests.benchmarks.speed.relays import Relay

# Of the slots, in the state in which nobody waits.
OCCUPIED = 0.75
_BUCKET = re.compile(r'^justitia_gateway_overhead_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)
_WAITING = re.compile(r'^justitia_tasks\{state="waiting"\} (\S+)$', re.MULTILINE)


@dataclass
class Crowd:
    """Clients, each on a connection of its own. counted_from_s: requests that were sent before are not looked at."""

    bench: Bench
    gateway: Relay
    counted_from_s: float = float("inf")
    overheads_s: list[float] = field(default_factory=list)

    def has_passed(self) -> bool:
        return bool(self.overheads_s)

    async def ask(self, wire: Wire) -> None:
        """Without end."""
        engine = self.bench.engine
        while True:
            number = self.bench.number()
            (body,) = bodies(f"hold:{number}", SHORT_WORDS, count=1, seed=number)
            timed = await wire.ask(request(self.gateway.url, body))
            noted = engine.notes.pop(number)
            if timed.sent_s >= self.counted_from_s:
                queued_s = float(timed.header(b"x-justitia-queue-ms") or "nan") / 1000
                self.overheads_s.append(timed.last_s - queued_s - (noted.done.result() - noted.came_s))


async def waiting(bench: Bench, gateway: Relay) -> Figures:
    """gateway: one that has `in_flight` slots. Milliseconds."""
    settings = bench.settings
    sizes = {"empty": int(OCCUPIED * settings.in_flight), "full": settings.in_flight + settings.agents_waiting}
    overheads: dict[str, list[list[float]]] = {state: [] for state in sizes}
    own: dict[str, list[float]] = {state: [] for state in sizes}
    idle: list[list[float]] = []
    for _ in range(settings.rounds):
        for state, size in sizes.items():
            async with _crowd(bench, gateway, size) as crowd:
                before = await _exposed(gateway)
                crowd.counted_from_s = time.monotonic()
                bench.engine.free_slots(1 / settings.slots_per_s)
                await until(crowd.has_passed, "a request that came when the crowd was there")
                await asyncio.sleep(settings.waiting_s)
                overheads[state].append(list(crowd.overheads_s))
                own[state].append(_p99(before, await _exposed(gateway)))
                if state == "full":
                    idle.append(list(bench.engine.idle_s))
                bench.engine.free_slots(None)
    empty, full = ([percentile(each, 0.99) for each in overheads[state]] for state in sizes)
    return {
        **percentiles(overheads, "p50", "p99"),
        "above_p99": ms(median([with_all - without for with_all, without in zip(full, empty, strict=True)])),
        "own_p99": {state: ms(median(each)) for state, each in own.items()},
        "requests": {state: sum(map(len, rounds)) for state, rounds in overheads.items()},
        "slot_empty": {name: of["full"] for name, of in percentiles({"full": idle}, "p50", "p99").items()},
    }


@contextlib.asynccontextmanager
async def _crowd(bench: Bench, gateway: Relay, size: int) -> AsyncIterator[Crowd]:
    """From when all of them wait or are in flight. Returns when the gateway has nothing of them left."""
    in_flight = min(size, bench.settings.in_flight)
    crowd = Crowd(bench, gateway)
    wires = [await Wire.connect(gateway.url) for _ in range(size)]
    asking = [asyncio.create_task(crowd.ask(wire)) for wire in wires]
    try:
        await until(lambda: len(bench.engine.held) == in_flight, f"{in_flight} tasks in flight")
        await _waits(gateway, size - in_flight)
        await asyncio.sleep(bench.settings.settle_s)
        yield crowd
    finally:
        for task in asking:
            task.cancel()
        for wire in wires:
            wire.close()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):  # it was not cancelled: that is what went wrong
                raise end
    await _waits(gateway, 0)
    await until(lambda: not any(connection.open for connection, _ in bench.engine.held), "the end of the crowd")
    bench.engine.held.clear()
    bench.engine.notes.clear()


async def _waits(gateway: Relay, count: int) -> None:
    """Until so many tasks wait in the gateway's queue. Raises `Stuck`."""
    deadline_s = time.monotonic() + PATIENCE_S
    found = None
    while time.monotonic() < deadline_s:
        waits = _WAITING.search(await _exposed(gateway))
        found = None if waits is None else float(waits[1])
        if found == count:
            return
        await asyncio.sleep(0.1)
    raise Stuck(f"{found} tasks wait in the gateway's queue, not {count}")


async def _exposed(gateway: Relay) -> str:
    """The gateway's metrics."""
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/metrics") as answer:
        return await answer.text()


def _p99(before: str, after: str) -> float:
    """Of what a histogram took in between, in seconds: linear within its bucket. NaN of nothing."""
    earlier = {bound: float(count) for bound, count in _BUCKET.findall(before)}
    counts = [(float(bound), float(count) - earlier.get(bound, 0.0)) for bound, count in _BUCKET.findall(after)]
    if not counts or not counts[-1][1]:
        return float("nan")
    rank, low_s, low = 0.99 * counts[-1][1], 0.0, 0.0
    for bound_s, count in counts:
        if count >= rank:
            return low_s if bound_s == float("inf") else low_s + (bound_s - low_s) * (rank - low) / (count - low)
        low_s, low = bound_s, count
    raise AssertionError
