"""Cancels a request's task when its client disconnects, whatever the task awaits. A client that stops reading is disconnected
too: see `client_connection`.

The server reports a disconnect by a call. ASGI's own way is a message, which would take a second task for each request to
wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Scope

# The key of a request's `Disconnect` in the state of its scope.
DISCONNECT = "justitia.disconnect"


class Disconnect:
    """Whether the client of one request has disconnected, as reported by the server."""

    __slots__ = ("happened", "loop", "on_disconnect")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.happened = False
        self.on_disconnect: Callable[[], object] | None = None

    def report(self) -> None:
        self.happened = True
        if self.on_disconnect is not None:
            self.on_disconnect()


class Client:
    """The client of the request that the current task serves. When it disconnects, the task is cancelled. Make it when the body
    has been received: until then a disconnect arrives as ASGI's message."""

    def __init__(self, scope: Scope) -> None:
        self._disconnect: Disconnect = scope["state"][DISCONNECT]
        serving = asyncio.current_task(self._disconnect.loop)
        assert serving is not None
        self._serving = serving
        if self._disconnect.happened:
            serving.cancel()
        else:
            self._disconnect.on_disconnect = serving.cancel

    @property
    def left(self) -> bool:
        return self._disconnect.happened

    def cancelled(self) -> bool:
        """Call it where a cancellation was caught. True if the client's disconnect was its only reason; then it is over."""
        return self.left and not self._serving.uncancel()

    def done(self) -> None:
        """From now on a disconnect cancels nothing."""
        self._disconnect.on_disconnect = None
