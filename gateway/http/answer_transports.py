"""Stand-ins for the transport of one answer: they decide when its bytes leave, and what closing means."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import termios
from array import array
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class HeadFirst:
    """The transport of an answer until it has begun: its head waits for what comes next, so that both leave in one call to the
    system, which takes as long for either."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if not self._cycle.response_started:  # 100 Continue
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self.flush(data)

    def flush(self, data: bytes = b"") -> None:
        self._cycle.transport = self._transport
        self._transport.write((self._head or b"") + data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Early:
    """The transport of an answer that is given before its request is complete. Closing it lets the client read the answer
    first."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = linger


def unread_by_peer(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has taken and the client has not. The kernel holds megabytes, and asks for more only when a third
    of them is gone: without this, a slow client would seem to read nothing for long."""
    unread = array("i", [0])
    with contextlib.suppress(OSError):  # it has just been closed
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, unread)
    return unread[0]
