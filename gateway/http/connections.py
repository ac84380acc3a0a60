"""All client connections together: how many there are, which give way, and the sweep that enforces what one client may take.

uvicorn bounds neither the size of a head, nor requests sent without waiting for answers, nor answers that are not read, and
gives a slow client all the time it wants. Those bounds are here and in `client_connection`.

A connection is looked at once in a while, by one sweep over all. So a request costs a few attributes, and a chunk of an
answer nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from typing import Protocol

from gateway.telemetry.metrics import CutOff

# Bytes of answers that wait to be read, of all clients together. Above it the largest are given up.
MAX_UNREAD_BYTES = 256 * 2**20
SWEEP_S = 1.0
# Connections looked at in one go: all 10,000 at once would delay requests.
SWEEP_BATCH = 200
# Idle connections that give way at once when there are too many, as a share of the limit: one by one, each new one would
# have to look for the oldest.
YIELD_SHARE = 0.02
# Seconds without another search after one found no idle connection.
NONE_IDLE_S = 0.1


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What client connections may take."""

    max_connections: int
    keep_alive_s: float  # how long a connection without a request is kept
    stall_s: float  # how long a client may take for a head, and may make no progress with its body or with reading


class Transport(Protocol):
    def abort(self) -> None: ...


class Connection(Protocol):
    """One client connection, as far as all of them together are concerned."""

    since: float  # when it became idle, or when its client last made progress, on the event loop's clock

    @property
    def idle(self) -> bool:
        """Whether it could give way to another."""
        ...

    @property
    def answering(self) -> bool:
        """Whether the client still waits for an answer, or for the rest of it."""
        ...

    @property
    def transport(self) -> Transport: ...

    def end_after_answer(self) -> None:
        """Close it when the last request that has arrived is answered."""
        ...

    def look(self, now: float) -> int:
        """End it if its client has taken too long. Returns the bytes that wait here to be read by the client."""
        ...


class Connections:
    """All connections of one server."""

    def __init__(self, limits: ConnectionLimits, cut_off: Callable[[CutOff], None] = lambda why: None) -> None:
        self.limits = limits
        self.cut_off = cut_off  # called for each connection that is ended early
        self.draining = False
        self._open: set[Connection] = set()
        self._none_idle_until = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> bool:
        """Add a connection, for which idle ones give way. False if there are too many all the same, and it should be
        refused."""
        if len(self._open) >= self.limits.max_connections and connection.since >= self._none_idle_until:
            idle = [other for other in self._open if other.idle]
            if not idle:
                self._none_idle_until = connection.since + NONE_IDLE_S
            for other in nsmallest(max(1, int(self.limits.max_connections * YIELD_SHARE)), idle, lambda c: c.since):
                self.cut_off(CutOff.CROWDED)
                other.transport.abort()
                self._open.discard(other)
        self._open.add(connection)
        return len(self._open) <= self.limits.max_connections

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)

    def drain(self) -> None:
        """From now on each answer ends its connection."""
        self.draining = True
        for connection in self._open:
            connection.end_after_answer()

    @property
    def answering(self) -> bool:
        """Whether any client still waits for an answer, or for the rest of it."""
        return any(connection.answering for connection in self._open)

    def abandon(self) -> None:
        """Close the connections whose clients have not taken their answers by now."""
        for connection in tuple(self._open):
            if connection.answering:
                connection.transport.abort()

    async def watch(self) -> None:
        """Sweep until cancelled."""
        every_s = min(SWEEP_S, self.limits.stall_s / 4, self.limits.keep_alive_s / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every_s)
            await self.sweep(loop.time())

    async def sweep(self, now: float) -> None:
        """Look at each connection once. now: on the event loop's clock."""
        unread = {}
        for number, connection in enumerate(tuple(self._open)):
            if number % SWEEP_BATCH == 0:
                await asyncio.sleep(0)
            if connection in self._open and (size := connection.look(now)):
                unread[connection] = size
        excess = sum(unread.values()) - MAX_UNREAD_BYTES
        if excess > 0:
            for connection in nlargest(len(unread), unread, lambda c: unread[c]):
                self.cut_off(CutOff.UNREAD)
                connection.transport.abort()
                excess -= unread[connection]
                if excess <= 0:
                    break
