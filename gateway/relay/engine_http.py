"""HTTP/1.1 to the engine, over as many connections as are needed, each kept for the next request.

As little of it as the engine's answers need, since every request and every chunk passes through here: a general client costs
more than all the rest that the gateway does (see the decision on it). The parsing is llhttp's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 5.0
# vLLM closes idle connections after 5 s; to reuse one a moment before that would lose the request on it.
KEEPALIVE_S = 3.0
# Of an answer that has not been asked for yet: more than that is left to the engine's socket.
HIGH_BYTES = 2**18
# Embeddings in bytes have a header that tells of each where it is.
MAX_HEAD_BYTES = 2**19


class Unreachable(Exception):
    """No connection could be made: nothing has been sent."""


class BrokenOff(Exception):
    """The connection ended, or what came over it was no HTTP, before the answer was whole."""


class Connection(asyncio.Protocol):
    """One connection, with one request at a time on it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._chunks: list[bytes] = []
        self._waiting = 0  # bytes in them
        self._paused = False
        self._head_bytes = 0
        self._headed = self._ended = False
        self._keep = False
        self._error: BaseException | None = None
        self._news: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    # What the one who asks does

    def send(self, data: bytes) -> None:
        """A whole request. Its answer is had by `head`, then `read` until there is no more."""
        assert self._transport is not None
        self.status, self.headers = 0, {}
        self._chunks.clear()
        self._waiting = self._head_bytes = 0
        self._headed = self._ended = self._keep = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(data)

    async def head(self) -> None:
        """Until `status` and `headers` are there. Raises `BrokenOff`."""
        while not self._headed:
            await self._hear()

    async def read(self) -> bytes:
        """What has come of the body since the last time, at least one byte; none at its end. Raises `BrokenOff`."""
        while not self._chunks:
            if self._ended:
                return b""
            await self._hear()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._waiting = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    @property
    def reusable(self) -> bool:
        """The answer is over, and the next request can be sent."""
        return (
            self._ended
            and self._keep
            and not self._chunks
            and self._error is None
            and self._transport is not None
            and not self._transport.is_closing()
        )

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _hear(self) -> None:
        if self._error is not None:
            raise BrokenOff("the connection was lost") from self._error
        self._news = self._loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._ended:
            self.close()  # nothing was asked
            return
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            return
        if not self._headed and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(ValueError("the head of the answer is too large"))
            return
        if self._waiting > HIGH_BYTES and not self._paused and not self._ended and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        if self._headed:
            self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._headed and not self._ended and not self._delimited():
            self._ended = True  # a body without a length ends with its connection
        self._error = self._error or exc or ConnectionResetError("closed by the engine")
        self._transport = None
        self._tell()

    def _delimited(self) -> bool:
        return b"content-length" in self.headers or b"transfer-encoding" in self.headers

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._tell()
        self.close()

    # What the parser says

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status >= 200:
            self._keep = self._parser.should_keep_alive()
            self._headed = True
        else:  # the real one is to come
            self.headers = {}

    def on_body(self, body: bytes) -> None:
        if self._ended:  # of a second answer, which nobody asked for
            self._keep = False
            return
        self._chunks.append(body)
        self._waiting += len(body)

    def on_message_complete(self) -> None:
        self._ended = self._headed


class Pool:
    """Connections to one engine. url: `http://host:port`, `https://host:port`, or `unix:/path/to/socket`."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: deque[Connection] = deque()
        if url.startswith("unix:"):
            self._path, self.host = url.removeprefix("unix:"), "engine"
        else:
            address = urlsplit(url)
            self._path, self.host = "", address.netloc.rpartition("@")[2]
            self._address = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
            self._ssl = ssl.create_default_context() if address.scheme == "https" else None

    async def take(self) -> Connection:
        """One that nobody uses, or a new one. Raises `Unreachable`."""
        oldest = self._loop.time() - KEEPALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since > oldest:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(CONNECT_S):
                if self._path:
                    return (await self._loop.create_unix_connection(Connection, self._path))[1]
                return (await self._loop.create_connection(Connection, *self._address, ssl=self._ssl))[1]
        except OSError as error:  # a time-out is one too
            raise Unreachable(str(error) or type(error).__name__) from error

    def give_back(self, connection: Connection) -> None:
        """Awaits nothing. One whose answer is not over is closed, on which the engine gives up the request."""
        if not connection.reusable:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        # Those at the other end have waited longest.
        while self._idle and self._idle[0].idle_since <= connection.idle_since - KEEPALIVE_S:
            self._idle.popleft().close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
