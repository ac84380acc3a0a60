"""A client that can go away at any moment, as a process does that is killed: its connection is closed, and that is all."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit


class Leaver:
    """A request on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def ask(
        cls,
        url: str,
        path: str,
        body: dict[str, Any],
        agent: str | None = None,
        *,
        share: float = 1.0,
        pause_s: float = 0.0,
    ) -> Leaver:
        """share: of the body that is sent at all. pause_s: between the head and it."""
        address = urlsplit(url)
        one = cls(*await asyncio.open_connection(address.hostname, address.port))
        data = json.dumps(body).encode()
        named = f"x-agent-id: {agent}\r\n" if agent else ""
        head = f"POST {path} HTTP/1.1\r\nhost: gateway\r\n{named}content-length: {len(data)}\r\n\r\n"
        one._writer.write(head.encode())
        if pause_s:
            await asyncio.sleep(pause_s)
        one._writer.write(data[: int(share * len(data))])
        await one._writer.drain()
        return one

    async def hear(self, said: bytes) -> bytes:
        """Until the answer has come so far. Raises `asyncio.IncompleteReadError` if it ends before."""
        return await self._reader.readuntil(said)

    async def hear_all(self) -> bytes:
        """Until the gateway closes the connection, which it does not do for an answer's end alone."""
        try:
            return await self._reader.read()
        except ConnectionError:
            return b""

    def leave(self) -> None:
        self._writer.transport.abort()
