"""The engine over HTTP. Requests of clients go over connections of our own, control calls over httpx.

Foreign exceptions end here: what leaves is `EngineUnreachable` (the task never got there) or `EngineLost`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum

import httpx

from gateway.http.writing import Headers
from gateway.protocol.errors import EngineLost
from gateway.relay.engine_http import BrokenOff, Connection, Pool, Unreachable

CONTROL_S = 5.0
# The type of an answer that is a stream.
EVENTS = "text/event-stream"

_CREDENTIALS = ("authorization", "x-api-key")
_RELAYED_HEADERS = ("content-type", "traceparent", "tracestate", "x-request-id")
_RELAYED_BACK = (b"retry-after", b"metadata")


class Health(Enum):
    UP = "up"
    DOWN = "down"
    UNSURE = "unsure"  # no answer in time


class EngineUnreachable(EngineLost):
    """No connection to the engine: nothing has been sent."""


class Answer:
    """What the engine answers: status, those of its headers that are for the client, and the body as it comes. Close it,
    whatever happens: before its end that closes the connection, on which vLLM aborts the task."""

    def __init__(self, pool: Pool, connection: Connection) -> None:
        self._pool, self._connection = pool, connection
        headers = connection.headers
        self.status = connection.status
        self.content_type = headers.get(b"content-type", b"application/json").decode("latin-1")
        length = headers.get(b"content-length", b"")
        self.length = int(length) if length.isdigit() else None
        self.metadata = headers.get(b"metadata", b"")  # of embeddings in bytes: where each is, and what they used
        self.headers: Headers = [(name, headers[name]) for name in _RELAYED_BACK if name in headers]

    async def read_some(self) -> bytes:
        """What has arrived of the body; nothing at its end. Raises `EngineLost` if it breaks off."""
        try:
            return await self._connection.read()
        except BrokenOff as error:
            raise EngineLost("the engine broke off its answer") from error

    async def read(self) -> bytes:
        """The whole body. Raises `EngineLost` if it breaks off."""
        chunks = [await self.read_some()]
        while chunks[-1]:
            chunks.append(await self.read_some())
        return chunks[0] if len(chunks) == 2 else b"".join(chunks)

    def close(self) -> None:
        """Awaits nothing: a cancelled task must get through here."""
        self._pool.give_back(self._connection)


class EngineClient:
    """url: `http://host:port`, or `unix:/path/to/socket`. key: the engine's own, if it wants one. relays_keys: whether it gets
    those of clients. Make it inside a running event loop."""

    def __init__(self, url: str, key: str | None = None, *, relays_keys: Callable[[], bool] = lambda: True) -> None:
        self._pool = Pool(url)
        self._own = {} if key is None else {"authorization": f"Bearer {key}"}
        self._relays_keys = relays_keys
        transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:") if url.startswith("unix:") else None)
        base = "http://engine" if url.startswith("unix:") else url
        self._control = httpx.AsyncClient(transport=transport, base_url=base, timeout=CONTROL_S, trust_env=False)

    async def ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], own: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request, with those of a client's headers that are for the engine, and our own. Raises `EngineLost`."""
        try:
            connection = await self._pool.take()
        except Unreachable as error:
            raise EngineUnreachable("the engine cannot be reached") from error
        try:
            connection.send(self._head(method, path, len(body), headers, own) + body)
            await connection.head()
        except BaseException as error:
            connection.close()
            if isinstance(error, BrokenOff):
                raise EngineLost("the engine broke off before its answer") from error
            raise
        return Answer(self._pool, connection)

    async def read(self, path: str) -> tuple[int, bytes]:
        """Status and body, of what is asked for so often that httpx would be felt. Raises `EngineLost` and `TimeoutError`."""
        async with asyncio.timeout(CONTROL_S):
            answer = await self.ask("GET", path, b"", {})
            try:
                return answer.status, await answer.read()
            finally:
                answer.close()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """A control call. Raises `EngineUnreachable`."""
        relayed = {**self._relayed(headers or {}), **self._own}
        try:
            return await self._control.get(path, headers=relayed)
        except httpx.HTTPError as error:
            raise EngineUnreachable(f"the engine cannot be reached: {str(error) or type(error).__name__}") from error

    async def health(self) -> Health:
        try:
            return Health.UP if (await self.get("/health")).is_success else Health.DOWN
        except EngineUnreachable as error:
            # A busy engine answers late; one that is gone refuses at once.
            return Health.DOWN if isinstance(error.__cause__, httpx.ConnectError) else Health.UNSURE

    async def close(self) -> None:
        self._pool.close()
        await self._control.aclose()

    def _head(
        self, method: str, path: str, length: int, headers: Mapping[str, str], own: Mapping[str, str] | None
    ) -> bytes:
        sent = {"host": self._pool.host, **self._relayed(headers), **self._own, **(own or {})}
        if length:
            sent.setdefault("content-type", "application/json")
        if length or method == "POST":
            sent["content-length"] = str(length)
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "\r\n"]
        return "\r\n".join(lines).encode("latin-1")

    def _relayed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Of a client's headers those that are for the engine. A key that is ours to check is not."""
        names = _RELAYED_HEADERS if self._own or not self._relays_keys() else _RELAYED_HEADERS + _CREDENTIALS
        return {name: headers[name] for name in names if name in headers and headers[name].isprintable()}
