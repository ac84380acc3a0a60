"""Connections to an engine, against servers that answer byte for byte what is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway.relay import engine_http
from gateway.relay.engine_http import BrokenOff, Connection, Pool, Unreachable

pytestmark = pytest.mark.wire

REQUEST = b"GET / HTTP/1.1\r\nhost: engine\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-length: 5\r\n\r\nhello"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(*answers: bytes, close: bool = False) -> Serve:
    """To each request on a connection the next answer, and then silence, or the end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for answer in answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
            if not close:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    return serve


class CountingPool(Pool):
    """Knows whom it has given away, to close them after a test."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.taken: list[Connection] = []

    async def take(self) -> Connection:
        self.taken.append(await super().take())
        return self.taken[-1]


@asynccontextmanager
async def serving(serve: Serve, path: Path | None = None) -> AsyncIterator[Pool]:
    served: set[asyncio.Task[None]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    if path is None:
        server = await asyncio.start_server(tracked, "127.0.0.1", 0)
        pool = CountingPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    else:
        server = await asyncio.start_unix_server(tracked, path)
        pool = CountingPool(f"unix:{path}")
    try:
        async with asyncio.timeout(20):
            yield pool
    finally:
        pool.close()
        for connection in pool.taken:
            connection.close()
        server.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*served, return_exceptions=True)
            await asyncio.sleep(0)  # the transports' own last words


async def asked(pool: Pool) -> Connection:
    connection = await pool.take()
    connection.send(REQUEST)
    await connection.head()
    return connection


async def rest_of(connection: Connection) -> bytes:
    data = b""
    while chunk := await connection.read():
        data += chunk
    return data


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    ],
)
async def test_an_answer_comes_whole_and_its_connection_serves_again(answer: bytes) -> None:
    async with serving(answering(answer, answer)) as pool:
        first = await asked(pool)
        assert first.status == 200
        assert await rest_of(first) == b"hello"
        assert await first.read() == b""
        pool.give_back(first)
        second = await asked(pool)
        assert second is first
        assert await rest_of(second) == b"hello"


async def test_an_answer_in_pieces_comes_as_it_is_written() -> None:
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head, body = WHOLE.split(b"\r\n\r\n")
        for place in range(len(head)):
            writer.write(head[place : place + 1])
            await writer.drain()
        writer.write(b"\r\n\r\n" + body[:2])
        await go.wait()
        writer.write(body[2:])

    async with serving(serve) as pool:
        connection = await asked(pool)
        assert connection.headers[b"content-type"] == b"text/plain"
        assert await connection.read() == b"he"
        go.set()
        assert await rest_of(connection) == b"llo"


@pytest.mark.parametrize(
    ("answer", "reused"),
    [
        (WHOLE.replace(b"content-length", b"Connection: close\r\ncontent-length"), False),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", False),
        (WHOLE, True),
    ],
)
async def test_a_connection_that_ends_with_its_answer_is_not_used_again(answer: bytes, reused: bool) -> None:
    async with serving(answering(answer, close=not reused)) as pool:
        first = await asked(pool)
        assert await rest_of(first) == b"hello"
        pool.give_back(first)
        assert (await pool.take() is first) is reused


async def test_one_that_has_been_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_http, "KEEPALIVE_S", 0.0)
    async with serving(answering(WHOLE, WHOLE)) as pool:
        first = await asked(pool)
        await rest_of(first)
        pool.give_back(first)
        assert await pool.take() is not first


async def test_one_that_is_given_back_before_its_end_is_closed() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE[:-2])
        with suppress(ConnectionError):
            await reader.read()
        gone.set()
        writer.close()

    async with serving(serve) as pool:
        connection = await asked(pool)
        assert await connection.read() == b"hel"
        pool.give_back(connection)
        await gone.wait()
        assert await pool.take() is not connection


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello",
    ],
    ids=["nothing", "half a head", "something else", "an endless head", "no number"],
)
async def test_what_is_no_answer_is_an_error(answer: bytes) -> None:
    async with serving(answering(answer, close=True)) as pool:
        connection = await pool.take()
        connection.send(REQUEST)
        with pytest.raises(BrokenOff):
            await connection.head()


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\nnonsense",
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(answer: bytes) -> None:
    async with serving(answering(answer, close=True)) as pool:
        connection = await asked(pool)
        with pytest.raises(BrokenOff):
            await rest_of(connection)
        assert not connection.reusable


async def test_what_nobody_reads_stays_with_the_engine() -> None:
    size, written = 10_000_000, 0
    full = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n")
        while written < size:
            writer.write(b"x" * 50_000)
            written += 50_000
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                full.set()
                await writer.drain()

    async with serving(serve) as pool:
        connection = await asked(pool)
        await full.wait()
        assert connection._waiting < 2 * engine_http.HIGH_BYTES
        assert len(await rest_of(connection)) == size


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async with serving(answering(WHOLE + WHOLE)) as pool:
        connection = await asked(pool)
        assert await rest_of(connection) == b"hello"
        pool.give_back(connection)
        assert await pool.take() is not connection


async def test_nobody_there() -> None:
    server = await asyncio.start_server(answering(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    with pytest.raises(Unreachable):
        await Pool(f"http://127.0.0.1:{port}").take()
    with pytest.raises(Unreachable):
        await Pool("unix:/nowhere.sock").take()


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with serving(answering(WHOLE), tmp_path / "s") as pool:
        assert await rest_of(await asked(pool)) == b"hello"
