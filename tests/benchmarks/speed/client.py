"""The lightest clients that will do: protocols on the bare loop, which time answers and count events, and read neither.

They know just enough of HTTP/1.1 for the answers that come: a body with a length, or in chunks with no trailer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

from tests.benchmarks.speed.answers import STAMP

PATH = "/v1/chat/completions"


class Refused(Exception):
    """An answer other than 200: what is measured is not what was meant."""


class Timed(NamedTuple):
    """An answer. sent_s: on the monotonic clock. first_s, last_s: from then to the body's first byte, and to its last."""

    sent_s: float
    first_s: float
    last_s: float
    head: bytes

    def header(self, name: bytes) -> bytes | None:
        """name: in lower case."""
        for line in self.head.split(b"\r\n"):
            if line.lower().startswith(name + b":"):
                return line.partition(b":")[2].strip()
        return None


class _Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, url: str) -> Self:
        """`http://host:port`."""
        address = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(cls, address.hostname or "", address.port or 80)
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def send(self, request: bytes) -> None:
        """Raises `ConnectionError` once the server has closed the connection."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Wire(_Client):
    """A connection, kept open, for one request at a time. `ask` raises `Refused`, and `ConnectionError` if it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._answer: asyncio.Future[Timed] | None = None
        self._received = bytearray()
        self._body_at = -1
        self._length: int | None = None
        self._sent_s = 0.0
        self._first_s = 0.0  # when the body began; 0 until then

    async def ask(self, request: bytes) -> Timed:
        """One whole request, as `request()` below makes it."""
        self._received.clear()
        self._body_at, self._length, self._first_s = -1, None, 0.0
        self._answer = asyncio.get_running_loop().create_future()
        self._sent_s = time.monotonic()
        self.send(request)
        timed = await self._answer
        if timed.head[9:12] != b"200":
            raise Refused(bytes(self._received[:500]).decode(errors="replace"))
        return timed

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._received += data
        if self._body_at < 0:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_at = end + 4
            self._length = _content_length(bytes(self._received[:end]).lower())
        if not self._first_s and len(self._received) > self._body_at:
            self._first_s = now
        if self._answer is not None and not self._answer.done() and self._is_whole():
            head = bytes(self._received[: self._body_at])
            self._answer.set_result(
                Timed(self._sent_s, (self._first_s or now) - self._sent_s, now - self._sent_s, head)
            )

    def _is_whole(self) -> bool:
        if self._length is not None:
            return len(self._received) >= self._body_at + self._length
        return self._received.endswith(b"0\r\n\r\n")


class Stream(_Client):
    """A connection with one stream on it, never read to its end. Events are counted, and the reads that brought them.

    again: called for each event that has come. delays_s: if it is a list, events carry the time of their writing, and how old
    they were is put there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events = self.reads = 0
        self.again: Callable[[], None] | None = None
        self.delays_s: list[float] | None = None
        self._rest = b""
        self._open_end = False  # what came last was half of an event's end

    @classmethod
    async def open(cls, url: str, request: bytes) -> Self:
        stream = await cls.connect(url)
        stream.send(request)
        return stream

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        if self.delays_s is not None:
            self._note_delays(data, self.delays_s)
        events = data.count(b"\n\n") + (self._open_end and data.startswith(b"\n"))
        self._open_end = data.endswith(b"\n") and not data.endswith(b"\n\n")
        self.events += events
        if self.again is not None:
            for _ in range(events):
                self.again()

    def _note_delays(self, data: bytes, delays_s: list[float]) -> None:
        now_ns = time.monotonic_ns()
        data = self._rest + data if self._rest else data
        end = data.rfind(b"\n\n") + 2
        self._rest = data[end:] if end >= 2 else data
        delays_s += [(now_ns - int(written_ns)) / 1e9 for written_ns in STAMP.findall(data, 0, max(0, end))]


def request(url: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A task as bytes."""
    lines = [f"POST {PATH} HTTP/1.1", f"Host: {urlsplit(url).netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _content_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":", 1)[1])
    return None
