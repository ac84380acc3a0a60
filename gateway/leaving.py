"""A client that goes away ends its request at once, whatever is being awaited for it. One that reads nothing for long is taken
for one that has gone: see `protocol`, which then ends its connection."""

from __future__ import annotations

import asyncio

from starlette.types import Receive


class Client:
    """The client of the request that the current task serves. When it leaves, that task is cancelled. Make it when the body has
    been received: from then on there is nothing to hear but that it leaves."""

    def __init__(self, receive: Receive) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self.left = False
        self._serving = serving
        self._watch = asyncio.create_task(self._until_left(receive))

    def cancelled(self) -> bool:
        """To be asked by who has caught a cancellation: True if it was because the client left, and nobody else wants it. Then
        it is over."""
        return self.left and not self._serving.uncancel()

    def done(self) -> None:
        self._watch.cancel()

    async def _until_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._serving.cancel()
