"""The lightest HTTP client that will do: one connection, one request at a time, answers timed but not read.

For measuring what a server adds in tenths of a millisecond, on a machine that the client shares with it. It knows just
enough of HTTP/1.1 for the answers of uvicorn: a body with a length, or in chunks with no trailer.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, cast
from urllib.parse import urlsplit


class Timed(NamedTuple):
    """An answer. Seconds from the sending of the request to the first byte of the body, and to the last."""

    status: int
    first_s: float
    last_s: float


class Wire(asyncio.Protocol):
    """One connection, kept open. `ask` raises `ConnectionError` when the server closes it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Timed] | None = None
        self._received = bytearray()
        self._body_at = -1
        self._length: int | None = None
        self._sent_s = 0.0
        self._first_s = 0.0  # when the body began; 0 until then

    @classmethod
    async def connect(cls, url: str) -> Wire:
        """`http://host:port`."""
        address = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(cls, address.hostname or "", address.port or 80)
        return wire

    async def ask(self, request: bytes) -> Timed:
        """One whole request, as `request()` below makes it."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        self._received.clear()
        self._body_at, self._length = -1, None
        self._answer = asyncio.get_running_loop().create_future()
        self._first_s = 0.0
        self._sent_s = time.perf_counter()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
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
            timed = Timed(int(self._received[9:12]), (self._first_s or now) - self._sent_s, now - self._sent_s)
            self._answer.set_result(timed)

    def _is_whole(self) -> bool:
        if self._length is not None:
            return len(self._received) >= self._body_at + self._length
        return self._received.endswith(b"0\r\n\r\n")


def request(url: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A POST of JSON as bytes."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(url).netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _content_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":", 1)[1])
    return None
