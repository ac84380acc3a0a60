"""The engine over HTTP. Tasks go over aiohttp, whose relay is ten times as fast as httpx's; control calls over httpx.

Foreign exceptions end here: what leaves is `EngineUnreachable` (the task never got there) or `EngineLost`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from enum import Enum

import aiohttp
import httpx

from engine.hints import PRIORITY_HEADER
from gateway.errors import EngineLost

CONNECT_S = 5.0
CONTROL_S = 5.0
# vLLM closes idle connections after 5 s; to reuse one a moment before that would lose the task on it.
KEEPALIVE_S = 3.0
CHUNK_BYTES = 65536

_RELAYED_HEADERS = (
    "authorization",
    "x-api-key",
    "content-type",
    "traceparent",
    "tracestate",
    "x-request-id",
    PRIORITY_HEADER,
)
_RELAYED_BACK = ("retry-after",)


class Health(Enum):
    UP = "up"
    DOWN = "down"
    UNSURE = "unsure"  # no answer in time


class EngineUnreachable(EngineLost):
    """No connection to the engine: nothing has been sent."""


class Answer:
    """What the engine answers: status, those of its headers that are for the client, and the body as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("content-type", "application/json")
        self.headers = [
            (name.encode("ascii"), response.headers[name].encode("latin-1"))
            for name in _RELAYED_BACK
            if name in response.headers
        ]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive. Raises `EngineLost` if it breaks off."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost("the engine broke off its answer") from error

    async def read(self) -> bytes:
        """The whole body. Raises `EngineLost` if it breaks off."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost("the engine broke off its answer") from error


class EngineClient:
    """url: `http://host:port`, or `unix:/path/to/socket`. Make it inside a running event loop."""

    def __init__(self, url: str) -> None:
        connector: aiohttp.BaseConnector
        if url.startswith("unix:"):
            path = url.removeprefix("unix:")
            connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
            transport, self._base = httpx.AsyncHTTPTransport(uds=path), "http://engine"
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            transport, self._base = httpx.AsyncHTTPTransport(), url
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
            read_bufsize=CHUNK_BYTES,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        self._control = httpx.AsyncClient(transport=transport, base_url=self._base, timeout=CONTROL_S, trust_env=False)

    @asynccontextmanager
    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Answer]:
        """Send a request. Leaving the context before the answer's end closes the connection, on which vLLM aborts the task."""
        relayed = {name: headers[name] for name in _RELAYED_HEADERS if name in headers}
        if body:
            relayed.setdefault("content-type", "application/json")
        try:
            response = await self._session.request(
                method, self._base + path, data=body or None, headers=relayed, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise EngineUnreachable("the engine cannot be reached") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost("the engine broke off before its answer") from error
        try:
            yield Answer(response)
        finally:
            # Without awaiting: a cancelled task must get through here. At the answer's end the connection is back in the
            # pool already and this closes nothing.
            response.close()

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """A control call. Raises `EngineUnreachable`."""
        relayed = {name: value for name, value in (headers or {}).items() if name in _RELAYED_HEADERS}
        try:
            return await self._control.get(path, headers=relayed)
        except httpx.HTTPError as error:
            raise EngineUnreachable(f"the engine cannot be reached: {error or type(error).__name__}") from error

    async def health(self) -> Health:
        try:
            return Health.UP if (await self.get("/health")).is_success else Health.DOWN
        except EngineUnreachable as error:
            # A busy engine answers late; one that is gone refuses at once.
            return Health.DOWN if isinstance(error.__cause__, httpx.ConnectError) else Health.UNSURE

    async def close(self) -> None:
        await asyncio.gather(self._session.close(), self._control.aclose())
