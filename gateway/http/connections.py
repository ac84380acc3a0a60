"""Client connections: what one may ask of us, and how long it may take.

uvicorn's protocol parses HTTP and runs the application. It knows no bound on a head, on requests that are sent without waiting
for the answers, or on answers that nobody reads, and no time for a client that sends slowly. They are here.

A client is looked at once in a while, by one sweep over all connections. So a request costs a few attributes, and a chunk of
an answer nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http
import logging
import termios
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.http.disconnect import LEAVING, Leaving
from gateway.protocol.dialects import ANTHROPIC, OPENAI, Dialect
from gateway.protocol.errors import (
    RESTART_S,
    GatewayError,
    HeadTooLarge,
    InvalidRequest,
    RequestTimeout,
    ShuttingDown,
    TooManyConnections,
    UrlTooLong,
)
from gateway.telemetry.metrics import CutOff

logger = logging.getLogger(__name__)

# Of a head with its request line; also of what comes between the bytes of a body: sizes of chunks, extensions, trailers.
# Tokens of identity providers and traces come to some 10 KiB.
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 128
MAX_URL_BYTES = 8 * 1024
# Requests of one connection that have come and are not answered. Hardly a client sends a second one before the first is.
MAX_PIPELINED = 8
# Parts of a body, each smaller than the second, that one request may have: each costs as much as a large one.
MAX_CRUMBS = 1000
CRUMB_BYTES = 64
# A body must gain this much, or its end, within the time that a client may make no progress.
PROGRESS_BYTES = 1024
# Answers that wait to be read, of all clients together. Above it the largest are given up.
MAX_UNREAD_BYTES = 256 * 2**20
# Seconds for which a client that we have done with is still listened to: it may be sending, and would not see its answer if
# the connection were gone.
LINGER_S = 2.0
SWEEP_S = 1.0
# Connections that are looked at in one go: all 10,000 at once would be felt.
AT_ONCE = 200
# Idle connections that give way at once when there are too many, as a share of the limit: one by one, each new one would
# have to look for the oldest.
YIELD_SHARE = 0.02
# Seconds for which none is looked for after none was found.
NONE_IDLE_S = 0.1
# Connections above the limit that are told so; those above are closed without a word.
TOLD = 64


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """max_connections: at once. keep_alive_s: for which one without a request is kept. stall_s: that a client may take for a
    head, and may make no progress with its body, or with reading its answer."""

    max_connections: int
    keep_alive_s: float
    stall_s: float


class Connections:
    """All connections of one server. cut_off: told of each that is ended before its time."""

    def __init__(self, limits: ConnectionLimits, cut_off: Callable[[CutOff], None] = lambda why: None) -> None:
        self.limits = limits
        self.cut_off = cut_off
        self.draining = False
        self._open: set[ClientConnection] = set()
        self._none_idle_until = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> ClientConnection:
        """What uvicorn makes for each connection."""
        return ClientConnection(self, config, server_state, app_state, _loop)

    def opened(self, connection: ClientConnection) -> bool:
        """False if there are too many; then it should go. Idle ones give way to new ones."""
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

    def closed(self, connection: ClientConnection) -> None:
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
        """Those who have not taken their answers by now will not."""
        for connection in tuple(self._open):
            if connection.answering:
                connection.transport.abort()

    async def watch(self) -> None:
        """Sweeps for as long as it is let."""
        every_s = min(SWEEP_S, self.limits.stall_s / 4, self.limits.keep_alive_s / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(every_s)
            await self.sweep(loop.time())

    async def sweep(self, now: float) -> None:
        """now: on the event loop's clock."""
        unread = {}
        for number, connection in enumerate(tuple(self._open)):
            if number % AT_ONCE == 0:
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


class ClientConnection(HttpToolsProtocol):
    """since: when it became idle, or when the client last got on with what it does, on the event loop's clock."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.since = 0.0
        self.url, self.headers = b"", []
        self._connections = connections
        self._unanswered: deque[RequestResponseCycle] = deque()  # the first is being served
        self._early = _Early(self)
        self._in_head = False
        self._keep_alive = False  # after the request whose body is coming
        self._fruitless_bytes = 0  # since the last head, or part of a body
        self._body_bytes = self._body_mark = self._crumbs = 0
        self._upgrading = b""  # the method of a request that asks for another protocol
        self._unread_bytes = 0
        self._deaf = False  # what comes is passed over

    @property
    def idle(self) -> bool:
        return not self._unanswered and not self._deaf and not self.transport.is_closing()

    @property
    def answering(self) -> bool:
        whole = bool(self._unanswered) and not self._unanswered[0].more_body
        return whole or self.transport.get_write_buffer_size() > 0

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        if not self._connections.opened(self):
            self._connections.cut_off(CutOff.REFUSED)
            if len(self._connections) > self._connections.limits.max_connections + TOLD:
                transport.abort()
            else:
                self._refuse(TooManyConnections("too many connections are open", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            if len(data) <= MAX_HEAD_BYTES:
                self._feed(data)
            else:  # piece by piece, so that a flood is not taken in before it is seen to be one
                pieces = memoryview(data)
                for begin in range(0, len(data), MAX_HEAD_BYTES):
                    self._feed(pieces[begin : begin + MAX_HEAD_BYTES])
        except httptools.HttpParserError as error:
            self._connections.cut_off(CutOff.INVALID)
            self._refuse(_translated(error))
        except GatewayError as error:
            self._connections.cut_off(CutOff.INVALID)
            self._refuse(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        for cycle in self._unanswered:  # uvicorn tells the last one alone
            _gone(cycle)
        super().connection_lost(exc)

    # What the parser calls

    def on_message_begin(self) -> None:
        if len(self._unanswered) >= MAX_PIPELINED:
            raise InvalidRequest(f"more than {MAX_PIPELINED} requests were sent before the first was answered")
        super().on_message_begin()
        self._in_head = True
        self.since = self.loop.time()

    def on_headers_complete(self) -> None:
        if len(self.url) > MAX_URL_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_head()
        if self._fruitless_bytes > MAX_HEAD_BYTES:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                self._refuse_head()
        self._in_head = False
        self._fruitless_bytes = self._crumbs = 0
        if self.parser.should_upgrade():
            self._upgrading = self.parser.get_method()
            if self._upgrading == b"CONNECT":
                raise InvalidRequest("this is no proxy")
            return
        super().on_headers_complete()
        self._body_mark = self._body_bytes
        self.headers = []  # trailers may come, which are none
        cycle = self.cycle
        cycle.scope["state"][LEAVING] = Leaving(self.loop)
        self._unanswered.append(cycle)
        if len(self._unanswered) > 1:
            self.flow.resume_reading()  # else we would not hear that the client leaves
        # Until the whole body is there, an answer ends the connection.
        self._keep_alive = cycle.keep_alive
        cycle.keep_alive = False
        cycle.transport = self._early  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._fruitless_bytes = 0
        self._body_bytes += len(body)
        if len(body) < CRUMB_BYTES:
            self._crumbs += 1
            if self._crumbs > MAX_CRUMBS:
                raise InvalidRequest(f"the body comes in more than {MAX_CRUMBS} parts of less than {CRUMB_BYTES} bytes")
        super().on_body(body)
        if self.flow.read_paused and len(self._unanswered) > 1:
            raise InvalidRequest("a large body was sent before the request before it was answered")

    def on_message_complete(self) -> None:
        if self._upgrading:
            return  # it comes once more
        super().on_message_complete()
        self.flow.resume_reading()  # it pauses at a large body: we would not hear that the client leaves
        cycle = self.cycle
        cycle.transport = self.transport
        if not cycle.response_started:
            cycle.transport = _HeadFirst(cycle)  # type: ignore[assignment]
            cycle.keep_alive = self._keep_alive and not self._connections.draining

    # What uvicorn calls

    def on_response_complete(self) -> None:
        cycle = self._unanswered.popleft()
        if isinstance(cycle.transport, _HeadFirst):
            cycle.transport.flush()  # there was no body
        self.since = self.loop.time()
        # As uvicorn does, but for a timer for what is idle too long: the sweep sees to that.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """The server ends: what is idle or only half there goes, an answer may still go out."""
        if self._unanswered and self._unanswered[-1].more_body:
            self._refuse(ShuttingDown("the gateway is shutting down", retry_after_s=RESTART_S))
        elif self._unanswered:
            self.end_after_answer()
        else:
            self.transport.close()

    # What `Connections` calls

    def end_after_answer(self) -> None:
        if self._unanswered:
            self._unanswered[-1].keep_alive = False

    def look(self, now: float) -> int:
        """End it if the client has taken too long. Returns the bytes that wait here to be read by it."""
        limits, transport = self._connections.limits, self.transport
        before, self._unread_bytes = self._unread_bytes, 0
        if held := transport.get_write_buffer_size():
            self._unread_bytes = held + _unread_by_peer(transport)
            if self._unread_bytes != before:
                self.since = now
            elif now - self.since > limits.stall_s:
                self._connections.cut_off(CutOff.UNREAD)
                transport.abort()
        elif transport.is_closing() or (self._deaf and not self._unanswered):
            if now - self.since > LINGER_S:
                transport.abort()
        elif self._unanswered:
            self._look_at_body(now)
        elif self._in_head:
            if now - self.since > limits.stall_s:
                self._connections.cut_off(CutOff.SLOW)
                self._refuse(RequestTimeout(f"the head of the request did not come within {limits.stall_s:g} s"))
        elif now - self.since > limits.keep_alive_s:
            transport.close()
        return held

    def _look_at_body(self, now: float) -> None:
        stall_s = self._connections.limits.stall_s
        if not self._unanswered[-1].more_body or self.flow.read_paused:
            self.since = now  # it is our turn
        elif self._body_bytes - self._body_mark >= PROGRESS_BYTES:
            self._body_mark = self._body_bytes
            self.since = now
        elif now - self.since > stall_s:
            self._connections.cut_off(CutOff.SLOW)
            self._refuse(RequestTimeout(f"the body of the request made no progress for {stall_s:g} s"))

    def linger(self) -> None:
        """The last word has been said: let the client read it, and pass over what it still sends."""
        self._deaf = True
        if not self.transport.is_closing():
            self.since = self.loop.time()
            self.flow.resume_reading()
            self.transport.write_eof()

    def _feed(self, data: bytes | memoryview) -> None:
        """Raises `GatewayError` or `HttpParserError` for what is not taken."""
        self._fruitless_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            self._feed(data[upgrade.args[0] :])
        if self._fruitless_bytes > MAX_HEAD_BYTES or (self._in_head and len(self.headers) > MAX_HEADERS):
            self._refuse_head()

    def _decline_upgrade(self) -> None:
        """None is on offer. Clients in Java ask with every request, and the parser would pass over the body: once more, then,
        without the wish."""
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%s %s HTTP/%s" % (self._upgrading, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._upgrading = b""
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _refuse_head(self) -> None:
        """Raises."""
        if len(self.url) > MAX_URL_BYTES:
            raise UrlTooLong(f"the URL is longer than {MAX_URL_BYTES} bytes")
        if len(self.headers) > MAX_HEADERS:
            raise HeadTooLarge(f"more than {MAX_HEADERS} headers")
        raise HeadTooLarge(f"headers, or what surrounds the body, are larger than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, error: GatewayError) -> None:
        """No more is taken from this client. What has come whole is answered first, and then nothing more is said."""
        self._deaf = True
        if self._unanswered and self._unanswered[-1].more_body:
            broken = self._unanswered.pop()
            if self._unanswered:
                self.pipeline.popleft()
            _gone(broken)
            if broken.response_started:
                self.transport.close()
                return
        if self._unanswered:
            self.end_after_answer()
            return
        logger.debug("%s: %s", self.client, error)
        dialect = ANTHROPIC if self.url.startswith(b"/v1/messages") else OPENAI
        self.transport.write(_answer(error, dialect))
        self.linger()


class _HeadFirst:
    """The transport of an answer until it has begun: its head waits for what comes next, so that both leave in one call to the
    system, which takes as long for either."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if not self._cycle.response_started:  # 100 Continue
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self.flush(data)

    def flush(self, data: bytes = b"") -> None:
        self._cycle.transport = self._transport
        self._transport.write((self._head or b"") + data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _Early:
    """The transport of an answer that is given before the request has come whole. To close it is to linger."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.linger()


def _gone(cycle: RequestResponseCycle) -> None:
    """The client of this request."""
    cycle.disconnected = True
    cycle.message_event.set()
    cycle.scope["state"][LEAVING].left()


def _unread_by_peer(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has taken and the client has not. The kernel holds megabytes, and asks for more when a third is
    gone: a slow client would seem to read nothing for long."""
    unread = array("i", [0])
    with contextlib.suppress(OSError):  # it has just been closed
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, unread)
    return unread[0]


def _translated(error: httptools.HttpParserError) -> GatewayError:
    if not isinstance(error, httptools.HttpParserCallbackError):
        return InvalidRequest(f"this is no valid HTTP: {error}")
    cause = error.__context__  # what was raised in the callback
    return cause if isinstance(cause, GatewayError) else InvalidRequest("the URL of the request cannot be read")


def _answer(error: GatewayError, dialect: Dialect) -> bytes:
    """As `app` would answer, for what never gets there."""
    body = dialect.error(error)
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (headers | error.headers()).items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
