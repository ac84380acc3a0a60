"""One client connection: what a client may send, and how long it may take.

uvicorn's protocol parses HTTP and runs the application; this class derives from it and adds the bounds. What it reads of
uvicorn's privates stands in `uvicorn_facts`, which is checked at start.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.http.answer_transports import Early, HeadFirst, unread_by_peer
from gateway.http.connections import Connections
from gateway.http.disconnect import DISCONNECT, Disconnect
from gateway.protocol.dialects import Dialect, dialect_of_path, error_answer
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
# Requests of one connection that have arrived and are not answered. Few clients send a second one before the first answer.
MAX_PIPELINED = 8
# Chunks below TINY_CHUNK_BYTES that the body of one request may have: each costs as much as a large one.
MAX_TINY_CHUNKS = 1000
TINY_CHUNK_BYTES = 64
# A body must gain this much, or end, within the time in which a client may make no progress.
PROGRESS_BYTES = 1024
# Seconds for which a refused client may still send: it may be sending, and would not see its answer if the connection were
# gone.
LINGER_S = 2.0
# Connections above the limit that are refused with an answer; those beyond are closed without one.
MAX_REFUSALS_EXPLAINED = 64


class ClientConnection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on what its client may send and how long it may take."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.since = 0.0  # when it became idle, or when the client last made progress, on the event loop's clock
        self.url, self.headers = b"", []
        self._connections = connections
        self._unanswered: deque[RequestResponseCycle] = deque()  # the first is being served
        self._in_head = False
        self._keep_alive = False  # after the request whose body is arriving
        self._bytes_since_progress = 0  # since the last head, or part of a body
        self._body_bytes = self._body_mark = self._tiny_chunks = 0
        self._upgrading = b""  # the method of a request that asks for another protocol
        self._unread_bytes = 0
        self._discarding = False  # what arrives is ignored

    @property
    def idle(self) -> bool:
        return not self._unanswered and not self._discarding and not self.transport.is_closing()

    @property
    def answering(self) -> bool:
        whole = bool(self._unanswered) and not self._unanswered[0].more_body
        return whole or self.transport.get_write_buffer_size() > 0

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        self._early = Early(transport, self.linger)
        if not self._connections.opened(self):
            self._connections.cut_off(CutOff.REFUSED)
            if len(self._connections) > self._connections.limits.max_connections + MAX_REFUSALS_EXPLAINED:
                transport.abort()
            else:
                self._refuse(TooManyConnections("too many connections are open", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        try:
            if len(data) <= MAX_HEAD_BYTES:
                self._feed(data)
            else:  # piece by piece, so that a flood is recognized before it is in memory
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
        for cycle in self._unanswered:  # uvicorn informs only the last one
            _disconnect(cycle)
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
            raise _head_error(self.url, self.headers)
        if self._bytes_since_progress > MAX_HEAD_BYTES:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                raise _head_error(self.url, self.headers)
        self._in_head = False
        self._bytes_since_progress = self._tiny_chunks = 0
        if self.parser.should_upgrade():
            self._upgrading = self.parser.get_method()
            if self._upgrading == b"CONNECT":
                raise InvalidRequest("CONNECT is not supported: this server is not a proxy")
            return
        super().on_headers_complete()
        self._body_mark = self._body_bytes
        self.headers = []  # trailers may follow, which are no headers
        cycle = self.cycle
        cycle.scope["state"][DISCONNECT] = Disconnect(self.loop)
        self._unanswered.append(cycle)
        if len(self._unanswered) > 1:
            self.flow.resume_reading()  # else the client's disconnect would go unnoticed
        # Until the whole body is there, an answer ends the connection.
        self._keep_alive = cycle.keep_alive
        cycle.keep_alive = False
        cycle.transport = self._early  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._bytes_since_progress = 0
        self._body_bytes += len(body)
        if len(body) < TINY_CHUNK_BYTES:
            self._tiny_chunks += 1
            if self._tiny_chunks > MAX_TINY_CHUNKS:
                raise InvalidRequest(
                    f"the request body has more than {MAX_TINY_CHUNKS} chunks of less than {TINY_CHUNK_BYTES} bytes"
                )
        super().on_body(body)
        if self.flow.read_paused and len(self._unanswered) > 1:
            raise InvalidRequest("a large body was sent before the previous request was answered")

    def on_message_complete(self) -> None:
        if self._upgrading:
            return  # the parser is given the request a second time
        super().on_message_complete()
        self.flow.resume_reading()  # a large body pauses it: the client's disconnect would go unnoticed
        cycle = self.cycle
        cycle.transport = self.transport
        if not cycle.response_started:
            cycle.transport = HeadFirst(cycle)  # type: ignore[assignment]
            cycle.keep_alive = self._keep_alive and not self._connections.draining

    # What uvicorn calls

    def on_response_complete(self) -> None:
        cycle = self._unanswered.popleft()
        if isinstance(cycle.transport, HeadFirst):
            cycle.transport.flush()  # there was no body
        self.since = self.loop.time()
        # As uvicorn does, but without its timer for idle connections: the sweep ends those.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """The server ends: idle connections and incomplete requests go, an answer may still go out."""
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
        limits, transport = self._connections.limits, self.transport
        before, self._unread_bytes = self._unread_bytes, 0
        if held := transport.get_write_buffer_size():
            self._unread_bytes = held + unread_by_peer(transport)
            if self._unread_bytes != before:
                self.since = now
            elif now - self.since > limits.stall_s:
                self._connections.cut_off(CutOff.UNREAD)
                transport.abort()
        elif transport.is_closing() or (self._discarding and not self._unanswered):
            if now - self.since > LINGER_S:
                transport.abort()
        elif self._unanswered:
            self._look_at_body(now)
        elif self._in_head:
            if now - self.since > limits.stall_s:
                self._connections.cut_off(CutOff.SLOW)
                self._refuse(RequestTimeout(f"the head of the request did not arrive within {limits.stall_s:g} s"))
        elif now - self.since > limits.keep_alive_s:
            transport.close()
        return held

    def _look_at_body(self, now: float) -> None:
        stall_s = self._connections.limits.stall_s
        if not self._unanswered[-1].more_body or self.flow.read_paused:
            self.since = now  # the client waits for us
        elif self._body_bytes - self._body_mark >= PROGRESS_BYTES:
            self._body_mark = self._body_bytes
            self.since = now
        elif now - self.since > stall_s:
            self._connections.cut_off(CutOff.SLOW)
            self._refuse(RequestTimeout(f"the body of the request made no progress for {stall_s:g} s"))

    # Refusing

    def linger(self) -> None:
        """Nothing more will be sent: let the client read its answer, and ignore what it still sends."""
        self._discarding = True
        if not self.transport.is_closing():
            self.since = self.loop.time()
            self.flow.resume_reading()
            self.transport.write_eof()

    def _feed(self, data: bytes | memoryview) -> None:
        """Raises `GatewayError` or `HttpParserError` for what is not accepted."""
        self._bytes_since_progress += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            self._feed(data[upgrade.args[0] :])
        if self._bytes_since_progress > MAX_HEAD_BYTES or (self._in_head and len(self.headers) > MAX_HEADERS):
            raise _head_error(self.url, self.headers)

    def _decline_upgrade(self) -> None:
        """No other protocol is offered. Clients in Java ask for one with every request, and the parser would skip the body: so
        it is given the head a second time, without the request for an upgrade."""
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%s %s HTTP/%s" % (self._upgrading, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._upgrading = b""
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _refuse(self, error: GatewayError) -> None:
        """Accept no more from this client. Requests that are complete are answered, and then the connection ends; if there are
        none, the error is the answer."""
        self._discarding = True
        if self._unanswered and self._unanswered[-1].more_body:
            broken = self._unanswered.pop()
            if self._unanswered:
                self.pipeline.popleft()
            _disconnect(broken)
            if broken.response_started:
                self.transport.close()
                return
        if self._unanswered:
            self.end_after_answer()
            return
        logger.debug("%s: %s", self.client, error)
        path = self.url.partition(b"?")[0].decode("latin-1")
        self.transport.write(_answer(error, dialect_of_path(path)))
        self.linger()


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Report to a request that its client has disconnected."""
    cycle.disconnected = True
    cycle.message_event.set()
    cycle.scope["state"][DISCONNECT].report()


def _head_error(url: bytes, headers: Sequence[object]) -> GatewayError:
    """Which of the bounds on a head was exceeded."""
    if len(url) > MAX_URL_BYTES:
        return UrlTooLong(f"the URL is longer than {MAX_URL_BYTES} bytes")
    if len(headers) > MAX_HEADERS:
        return HeadTooLarge(f"there are more than {MAX_HEADERS} headers")
    return HeadTooLarge(f"headers, or the framing of the body, are larger than {MAX_HEAD_BYTES} bytes")


def _translated(error: httptools.HttpParserError) -> GatewayError:
    if not isinstance(error, httptools.HttpParserCallbackError):
        return InvalidRequest(f"this is not valid HTTP: {error}")
    cause = error.__context__  # what was raised in the callback
    return cause if isinstance(cause, GatewayError) else InvalidRequest("the URL of the request cannot be read")


def _answer(error: GatewayError, dialect: Dialect) -> bytes:
    """The bytes of an error that never reaches the application, as it would answer it."""
    status, headers, body = error_answer(error, dialect)
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in {**headers, "connection": "close"}.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
