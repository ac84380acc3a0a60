"""A client that goes away ends its request at once, whatever is being awaited for it. One that reads nothing for long is taken
for one that has gone: see `protocol`, which then ends its connection.

Our server says so by a call. ASGI's own way is a message, and to wait for it takes a task beside each request's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Scope

# In the state of a request's scope: its `Leaving`.
LEAVING = "justitia.leaving"


class Leaving:
    """Of one request, told by the server. then: who wants to know that the client has left."""

    __slots__ = ("gone", "loop", "then")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.gone = False
        self.then: Callable[[], object] | None = None

    def left(self) -> None:
        self.gone = True
        if self.then is not None:
            self.then()


class Client:
    """The client of the request that the current task serves. When it leaves, that task is cancelled. Make it when the body has
    been received: from then on there is nothing to hear but that it leaves."""

    def __init__(self, scope: Scope) -> None:
        self._leaving: Leaving = scope["state"][LEAVING]
        serving = asyncio.current_task(self._leaving.loop)
        assert serving is not None
        self._serving = serving
        if self._leaving.gone:
            serving.cancel()
        else:
            self._leaving.then = serving.cancel

    @property
    def left(self) -> bool:
        return self._leaving.gone

    def cancelled(self) -> bool:
        """To be asked by who has caught a cancellation: True if it was because the client left, and nobody else wants it. Then
        it is over."""
        return self.left and not self._serving.uncancel()

    def done(self) -> None:
        self._leaving.then = None
