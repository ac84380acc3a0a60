"""What of an answer goes out in one call to the system: its head never goes alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.http.client_connection import ClientConnection
from gateway.http.connections import ConnectionLimits, Connections

App = Callable[[Any, Any, Any], Awaitable[None]]


class Wire(asyncio.Transport):
    """What is written to it, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass


async def asked(app: App, request: bytes) -> Wire:
    """When the application is done with this request."""
    done = asyncio.Event()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        finally:
            done.set()

    config = uvicorn.Config(watched, log_config=None, access_log=False, server_header=False, date_header=False)
    config.load()
    connections = Connections(ConnectionLimits(10, 75, 60))
    connection = ClientConnection(connections, config, ServerState(), {}, asyncio.get_running_loop())
    wire = Wire()
    connection.connection_made(wire)
    connection.data_received(request)
    async with asyncio.timeout(5):
        await done.wait()
    await asyncio.sleep(0)  # whatever comes after the application
    return wire


def answering(*parts: bytes, length: bytes | None = None) -> App:
    headers = [] if length is None else [(b"content-length", length)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    return app


HEAD = b"HTTP/1.1 200 OK\r\n"
WHOLE = HEAD + b"content-length: 2\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
EXPECTS = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n{"


@pytest.mark.parametrize(
    ("request_", "app", "writes"),
    [
        pytest.param(GET, answering(b"ok", length=b"2"), [WHOLE + b"ok"], id="whole"),
        pytest.param(
            GET, answering(b"a", b"b", b""), [CHUNKED + b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n"], id="stream"
        ),
        pytest.param(GET, answering(b"", b"a", b""), [CHUNKED, b"1\r\na\r\n", b"0\r\n\r\n"], id="head wanted at once"),
        pytest.param(
            b"HEAD" + GET[3:], answering(b"ok", length=b"2"), [WHOLE], id="without the body that would be there"
        ),
        pytest.param(
            EXPECTS,
            answering(b"ok", length=b"2"),
            [b"HTTP/1.1 100 Continue\r\n\r\n", WHOLE + b"ok"],
            id="told to go on",
        ),
    ],
)
async def test_writes(request_: bytes, app: App, writes: list[bytes]) -> None:
    wire = await asked(app, request_)
    assert wire.writes == writes
    assert not wire.closed


async def test_an_answer_that_breaks_off_after_its_head() -> None:
    wire = await asked(answering(length=b"2"), GET)
    assert wire.writes == [WHOLE]
    assert wire.closed
