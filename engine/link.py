"""The link: what the engine's scheduler tells the gateway, over ZeroMQ on a local socket.

The engine binds an XPUB socket. Each new subscriber, also one that comes back and also while the engine is idle, makes
it send a `Hello`, which carries the protocol's version and the engine's size, and then the latest `Report`. After every
engine iteration (and after an abort) follows another report. A report is the whole state with counters that only grow,
so a lost one costs nothing, and the engine keeps no more than one to send. The last one is repeated every second: it
may have been the one that was lost, and an engine that falls silent is not idle but gone.

ZeroMQ's sockets belong to one thread each, and the scheduler's has no time for subscribers. So a thread of the
publisher's own owns the socket, and `publish` only leaves the report where that thread finds it: some microseconds,
whatever the other end does.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio

PROTOCOL = 1
# Reports that may wait in ZeroMQ for a slow gateway before new ones are dropped.
SEND_HIGH_WATER_MARK = 64
REPEAT_INTERVAL_S = 1.0
# How long `close` waits for the publisher's thread, which does nothing that takes time.
CLOSE_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class LinkError(Exception):
    """The link cannot be opened, or the peer on it does not speak our protocol."""


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=False):
    """The first message to a subscriber; a repeated one changes nothing."""

    protocol: int
    engine_id: str  # new at every start of the engine: iterations and counters begin again at zero
    engine_version: str
    total_blocks: int  # those a task can hold (vLLM keeps one for itself)
    block_size: int  # tokens
    max_num_seqs: int  # tasks that run at once
    max_model_len: int  # tokens

    @property
    def capacity_tokens(self) -> int:
        """M, the KV cache in tokens."""
        return self.total_blocks * self.block_size


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """What one running task holds: tokens of KV, and tokens it has produced so far."""

    kv_tokens: int
    output_tokens: int


class Report(msgspec.Struct, frozen=True, tag="report", forbid_unknown_fields=False):
    """The engine's state after an iteration."""

    engine_id: str
    iteration: int  # iterations done since the engine's start
    free_blocks: int
    running: int
    waiting: int
    preempted: int  # preemptions since the engine's start
    held: dict[int, Holding]  # by the gateway's task number


Message = Hello | Report

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class LinkPublisher:
    """The engine's end. `publish` returns at once and never raises, whatever the other end does.

    address: a ZeroMQ address such as `ipc:///run/justitia/link.sock`. Raises `LinkError` when it cannot be bound.
    """

    def __init__(self, address: str, hello: Hello) -> None:
        self._hello = _encode(hello)
        self._latest: Report | None = None
        self._closing = False
        # A byte through this pair wakes the thread; when the pair is full of them, it is awake already.
        self._bell, self._bell_end = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_end.setblocking(False)
        # A context of our own: no one else's `term` can wait for this socket, nor this one for theirs.
        self._context = zmq.Context()
        xpub: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        xpub.setsockopt(zmq.XPUB_VERBOSE, 1)  # hear of every subscriber, not only of the first
        xpub.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        xpub.setsockopt(zmq.LINGER, 0)
        try:
            xpub.bind(address)
        except zmq.ZMQError as error:
            xpub.close()
            self._context.term()
            raise LinkError(f"cannot bind the link to {address}: {error}") from error
        # From here on the socket belongs to the thread; starting it is the memory barrier that ZeroMQ asks for.
        self._thread = threading.Thread(target=self._serve, args=(xpub,), name="justitia-link", daemon=True)
        self._thread.start()

    def publish(self, report: Report) -> None:
        """Replace the latest report, and have it sent. After `close`: nothing."""
        self._latest = report
        self._ring()

    def close(self) -> None:
        self._closing = True
        self._ring()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def _serve(self, xpub: zmq.Socket[bytes]) -> None:
        try:
            self._relay(xpub)
        except Exception:
            # The engine serves on without a link, and the gateway sees it fall silent.
            logger.exception("the link to the gateway broke")
        finally:
            xpub.close()
            self._context.term()
            self._bell.close()
            self._bell_end.close()

    def _relay(self, xpub: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(xpub, zmq.POLLIN)
        poller.register(self._bell_end, zmq.POLLIN)
        sent: Report | None = None
        while True:
            ready = dict(poller.poll(int(1000 * REPEAT_INTERVAL_S)))
            if self._bell_end.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._bell_end.recv(4096)
            if self._closing:
                return
            newcomers = False
            with contextlib.suppress(zmq.Again):
                while True:
                    newcomers |= xpub.recv(zmq.NOBLOCK)[:1] == b"\x01"
            # All subscribers hear the greeting of one. A send never blocks: XPUB drops what a full subscriber cannot
            # take.
            if newcomers:
                xpub.send(self._hello, zmq.NOBLOCK)
            latest = self._latest
            if latest is not None and (newcomers or latest is not sent or not ready):
                xpub.send(_encode(latest), zmq.NOBLOCK)
                sent = latest


class LinkSubscriber:
    """The gateway's end: an asynchronous stream of messages. It may connect before the engine is there."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(address)

    async def messages(self) -> AsyncIterator[Message]:
        """Of the reports that came while the caller was busy only the newest. Never ends by itself.

        Raises `LinkError` on a message that cannot be read, or a `Hello` of another protocol.
        """
        while True:
            came = [parse(await self._socket.recv())]
            with contextlib.suppress(zmq.Again):
                while True:
                    came.append(parse(await self._socket.recv(zmq.NOBLOCK)))
            newest = next((message for message in reversed(came) if isinstance(message, Report)), None)
            for message in came:
                if isinstance(message, Hello) or message is newest:
                    yield message

    def close(self) -> None:
        self._socket.close()


def parse(message: bytes) -> Message:
    """Raises `LinkError` on a message that cannot be read, or a `Hello` of another protocol."""
    try:
        parsed: Message = _decode(message)
    except msgspec.DecodeError as error:
        raise LinkError(f"unreadable message on the link: {error}") from error
    if isinstance(parsed, Hello) and parsed.protocol != PROTOCOL:
        raise LinkError(f"the engine speaks protocol {parsed.protocol} on the link, this gateway {PROTOCOL}")
    return parsed
