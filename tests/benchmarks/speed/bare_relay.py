"""What Python can reach: a relay that does nothing else. `python -m tests.benchmarks.speed.bare_relay`.

A bare ASGI application on uvicorn, with an aiohttp session to the engine: bytes in, bytes out, and a client that leaves takes
its request at the engine along. No routes, no scheduler, no metrics, no errors of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import aiohttp
import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_PASSED = (b"content-type", b"content-length")


class BareRelay:
    """engine: `http://host:port`."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
            message = await receive()
        relaying = asyncio.ensure_future(self._relay(scope, body, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        relaying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await relaying

    async def _relay(self, scope: Message, body: bytes, send: Send) -> None:
        assert self._session is not None  # startup has been
        url, headers = self._engine + scope["path"], {"content-type": "application/json"}
        async with self._session.request(scope["method"], url, data=body, headers=headers) as answer:
            passed = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() in _PASSED]
            await send({"type": "http.response.start", "status": answer.status, "headers": passed})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed.bare_relay", description="Relays, and no more."
    )
    parser.add_argument("--engine", required=True, help="http://host:port")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        BareRelay(options.engine),
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        proxy_headers=False,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
