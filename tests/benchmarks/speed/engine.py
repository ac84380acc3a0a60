"""The engine of the benchmark. It answers at once, or as slowly as it is asked to.

It shares a core with the clients, so it is as lean as can be: a protocol on the bare loop that writes bytes made beforehand,
and knows no more of HTTP than it takes. It lives in the process of the clients, and tells them what it saw in memory.

What a request wants is the name of its model:

    whole       an answer with a length
    stream      an answer of `TOKENS` events, usage, and end
    flood       an event, and then, while the engine is `flooding`, one for every stream that takes it in each turn of the loop,
                as in a step of an engine
    single:N    an event, and another one whenever the client says `again(N)`
    paced:MS    an event each so many milliseconds without end, with the time of its writing in it. The streams are spread
                evenly over the interval
    hold:N      an answer when a slot is freed: one each `free_s`, the oldest task first
    silent:N    nothing
    mute:N      the head of a stream, and nothing more
    hushed:N    the same after one event

Every event is written by itself. Where there is a number, times are noted under it, in seconds of the monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from tests.benchmarks.speed.answers import EVENT, FIXED, HEAD, NOT_FOUND, STAMPED, STREAM, WHOLE, metrics

TICK_S = 0.001  # no timer of the loop is finer
# What a stream may have on its way: much more, and a relay that lags would be measured by how much it reads at once.
SEND_BUFFER_BYTES = 65536
BACKLOG = 4096

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MODEL = re.compile(rb'"model": *"([a-z]+):?(\d*)"')


@dataclass(slots=True)
class Noted:
    """A request with a number. done: when it was answered, or its connection closed. Make it in the loop."""

    came: asyncio.Event = field(default_factory=asyncio.Event)
    came_s: float = 0.0
    done: asyncio.Future[float] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Engine:
    """What the connections share. Make it in the loop that serves."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.free_s: float | None = None  # one of the tasks that are held is answered each so many seconds; None: none
        self.connections: set[Connection] = set()
        self.streams = 0  # without an end, and open
        self.tasks = 0  # that came
        self.notes: dict[int, Noted] = {}
        self.held: deque[tuple[Connection, int]] = deque()
        self.idle_s: list[float] = []  # how long the slots that were freed stood empty
        self.serving: dict[bytes, Callable[[Connection, int], None]] = {
            b"whole": lambda connection, _: connection.write(WHOLE),
            b"stream": lambda connection, _: connection.write(STREAM),
            b"flood": self._flood,
            b"single": self._single,
            b"paced": self._pace,
            b"hold": self._hold,
            b"silent": lambda connection, number: self._hush(connection, number, b""),
            b"mute": lambda connection, number: self._hush(connection, number, HEAD),
            b"hushed": lambda connection, number: self._hush(connection, number, HEAD + EVENT),
        }
        self._floods: set[Connection] = set()
        self._full: set[Connection] = set()  # of those, the ones that take no more for now
        self._flooding = self._stepping = False
        self._singles: dict[int, Connection] = {}
        self._wheels: dict[int, Wheel] = {}
        self._freed: deque[float] = deque()
        self._freeing: asyncio.TimerHandle | None = None

    def note(self, number: int) -> Noted:
        """Of a request that comes, or has come."""
        return self.notes.setdefault(number, Noted())

    @contextlib.contextmanager
    def flooding(self) -> Iterator[None]:
        self._flooding = True
        self._step_soon()
        try:
            yield
        finally:
            self._flooding = False

    def again(self, number: int) -> None:
        """The client has what was written on the stream `single:N`."""
        connection = self._singles.get(number)
        if connection is not None and connection.open:
            connection.write(EVENT)

    def free_slots(self, every_s: float | None) -> None:
        """From now on, one each so many seconds; None: none."""
        self.free_s = every_s
        self.idle_s.clear()
        self._freed.clear()
        if self._freeing is not None:
            self._freeing.cancel()
            self._freeing = None
        if every_s is not None:
            self._free(self.loop.time())

    def metrics(self) -> bytes:
        return metrics(iterations=self.tasks, running=self.streams + len(self.held))

    def _flood(self, connection: Connection, _: int) -> None:
        self._begin(connection)
        connection.on_full = lambda: self._full.add(connection)
        connection.on_room = lambda: self._take_up(connection)
        self._floods.add(connection)
        connection.write(EVENT)

    def _take_up(self, connection: Connection) -> None:
        self._full.discard(connection)
        self._step_soon()

    def _step_soon(self) -> None:
        if self._flooding and not self._stepping:
            self._stepping = True
            self.loop.call_soon(self._step)

    def _step(self) -> None:
        self._stepping = False
        for connection in self._floods - self._full:
            connection.write(EVENT)
        if self._floods - self._full:
            self._step_soon()

    def _single(self, connection: Connection, number: int) -> None:
        self._begin(connection)
        self._singles[number] = connection
        connection.write(EVENT)

    def _pace(self, connection: Connection, interval_ms: int) -> None:
        self._begin(connection)
        if interval_ms not in self._wheels:
            self._wheels[interval_ms] = Wheel(self.loop, interval_ms)
        self._wheels[interval_ms].add(connection)

    def _begin(self, connection: Connection) -> None:
        """A stream without an end."""
        self.streams += 1
        connection.on_close = lambda: self._ended(connection)
        connection.write(HEAD)

    def _ended(self, connection: Connection) -> None:
        self.streams -= 1
        self._floods.discard(connection)
        self._full.discard(connection)

    def _hold(self, connection: Connection, number: int) -> None:
        now = time.monotonic()
        self.note(number).came_s = now
        if self._freed:
            self.idle_s.append(now - self._freed.popleft())
        self.held.append((connection, number))

    def _free(self, due: float) -> None:
        """Timers are late by up to a tick, and that must not add up."""
        assert self.free_s is not None
        while due <= self.loop.time():
            due += self.free_s
            self._answer_oldest()
        self._freeing = self.loop.call_at(due, self._free, due)

    def _answer_oldest(self) -> None:
        while self.held:
            connection, number = self.held.popleft()
            if connection.open:
                now = time.monotonic()
                self._freed.append(now)
                self.note(number).done.set_result(now)
                connection.write(WHOLE)
                return

    def _hush(self, connection: Connection, number: int, first: bytes) -> None:
        noted = self.note(number)
        connection.on_close = lambda: noted.done.set_result(time.monotonic())
        if first:
            connection.write(first)
        noted.came_s = time.monotonic()
        noted.came.set()


class Wheel:
    """Streams with one interval, spread evenly over it: in each tick it is the turn of one place. Without streams it stands."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_ms: int) -> None:
        self._loop = loop
        self._places: list[set[Connection]] = [set() for _ in range(interval_ms)]
        self._begun_s = time.monotonic()
        self._turned = self._added = 0
        self._turning = False

    def add(self, connection: Connection) -> None:
        self._places[self._added % len(self._places)].add(connection)
        self._added += 1
        if not self._turning:
            self._turn()

    def _turn(self) -> None:
        due = int((time.monotonic() - self._begun_s) / TICK_S)
        self._turned = max(self._turned, due - len(self._places))  # held up for long, we owe a stream one event at most
        while self._turned < due:
            self._turned += 1
            place = self._places[self._turned % len(self._places)]
            for connection in tuple(place):
                if connection.open:
                    connection.write(STAMPED % time.monotonic_ns())
                else:
                    place.discard(connection)
        self._turning = any(self._places)
        if self._turning:
            self._loop.call_later(TICK_S, self._turn)


class Connection(asyncio.Protocol):
    """on_close, on_full, on_room: what a stream wants to know."""

    def __init__(self, engine: Engine) -> None:
        self.open = True
        self.on_close: Callable[[], None] | None = None
        self.on_full: Callable[[], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self._engine = engine
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self.write: Callable[[bytes], None] = made.write
        self.abort: Callable[[], None] = made.abort
        self._engine.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._engine.connections.discard(self)
        if self.on_close is not None:
            self.on_close()

    def pause_writing(self) -> None:
        if self.on_full is not None:
            self.on_full()

    def resume_writing(self) -> None:
        if self.on_room is not None:
            self.on_room()

    def data_received(self, data: bytes) -> None:
        data = self._received + data if self._received else data
        while (body_at := data.find(b"\r\n\r\n") + 4) >= 4:
            length = _LENGTH.search(data, 0, body_at)
            end = body_at + int(length[1]) if length else body_at
            if len(data) < end:
                break
            self._serve(data, body_at)
            data = data[end:]
        self._received = data

    def _serve(self, data: bytes, body_at: int) -> None:
        engine = self._engine
        if data.startswith(b"GET "):
            path = data[4 : data.find(b" ", 4)]
            self.write(engine.metrics() if path == b"/metrics" else FIXED.get(path, NOT_FOUND))
            return
        model = _MODEL.search(data, body_at)
        if model is None or model[1] not in engine.serving:
            self.write(NOT_FOUND)
            return
        engine.tasks += 1
        engine.serving[model[1]](self, int(model[2] or 0))


@contextlib.asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[str]:
    """The URL at which it listens meanwhile."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections take it over
    server = await engine.loop.create_server(lambda: Connection(engine), sock=listening)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.close()
        for connection in tuple(engine.connections):
            connection.abort()
        await asyncio.sleep(0)  # in which they close
