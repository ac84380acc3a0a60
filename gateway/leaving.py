"""A client that goes away ends its request at once, whatever is being awaited for it. One that reads nothing for long is taken
for one that has gone: its task holds memory meanwhile."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Send

# Seconds that a message may wait for the client to read it.
SEND_S = 60.0


class Client:
    """The client of the request that the current task serves. When it leaves, that task is cancelled. Make it when the body has
    been received: from then on there is nothing to hear but that it leaves."""

    def __init__(self, receive: Receive, send: Send) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self.left = False
        self._send = send
        self._serving = serving
        self._watch = asyncio.create_task(self._until_left(receive))
        self._loop = asyncio.get_running_loop()
        self._sending_since: float | None = None
        self._look: asyncio.TimerHandle | None = None

    async def send(self, message: Message) -> None:
        if self._look is None:
            self._look = self._loop.call_later(SEND_S, self._has_read)
        self._sending_since = self._loop.time()
        await self._send(message)
        self._sending_since = None

    def cancelled(self) -> bool:
        """To be asked by who has caught a cancellation: True if it was because the client left, and nobody else wants it. Then
        it is over."""
        return self.left and not self._serving.uncancel()

    def done(self) -> None:
        self._watch.cancel()
        if self._look is not None:
            self._look.cancel()

    async def _until_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leaves()

    def _has_read(self) -> None:
        """Once in a while, instead of a timer for each message."""
        since, now = self._sending_since, self._loop.time()
        if since is not None and now - since >= SEND_S:
            self._leaves()
        else:
            self._look = self._loop.call_at((now if since is None else since) + SEND_S, self._has_read)

    def _leaves(self) -> None:
        if not self.left:
            self.left = True
            self._serving.cancel()
