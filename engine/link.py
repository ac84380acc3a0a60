"""The link: what the engine's scheduler tells the gateway, over ZeroMQ on a local socket.

The engine binds an XPUB socket. Each new subscriber, also one that comes back and also while the engine is idle, makes
it send a `Hello`, which carries the protocol's version and the engine's size, and then the latest `Report`. After every
engine iteration (and after an abort) follows another report. A report is the whole state with counters that only grow,
so a lost one costs nothing, and the engine keeps no more than one to send. The last one is repeated every second: it
may have been the one that was lost, and an engine that falls silent is not idle but gone.

Two threads use the engine's socket, one at a time: the scheduler's, which sends when it has something to tell, and one
of the publisher's own, which greets and repeats while the scheduler has nothing to do. ZeroMQ allows that under a lock,
and the scheduler never waits for it. A thread that did all the sending was tried: beside a main thread that keeps
Python's interpreter lock busy it came to send no more than one report in three.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio

PROTOCOL = 1
# Reports that may wait in ZeroMQ for a slow gateway before new ones are dropped.
SEND_HIGH_WATER_MARK = 64
# While the scheduler has nothing to tell, newcomers are greeted this often, and the last report is repeated each tenth time.
IDLE_INTERVAL_S = 0.1
REPEAT_AFTER = 10

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
        self._sent: Report | None = None
        # A context of our own: no one else's `term` can wait for this socket, nor this one for theirs.
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # hear of every subscriber, not only of the first
        self._socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise LinkError(f"cannot bind the link to {address}: {error}") from error
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._while_idle, name="justitia-link", daemon=True)
        self._thread.start()

    def publish(self, report: Report) -> None:
        """Tell the subscribers, and those to come until the next report. After `close`: nothing."""
        self._latest = report
        if self._lock.acquire(blocking=False):
            try:
                self._serve()
            finally:
                self._lock.release()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with self._lock:
            self._socket.close()
            self._context.term()

    def _while_idle(self) -> None:
        seen, unchanged = None, 0
        while not self._closing.wait(IDLE_INTERVAL_S):
            if self._latest is not seen:
                # The scheduler is at work, and greets by itself.
                seen, unchanged = self._latest, 0
                continue
            unchanged += 1
            with self._lock:
                self._serve(repeat=unchanged % REPEAT_AFTER == 0)

    def _serve(self, repeat: bool = False) -> None:
        """Greet who is new, and send the latest report to all if it was not sent yet. The caller holds the lock."""
        if self._closing.is_set():
            return
        try:
            newcomers = False
            # Of what XPUB has to read, 1 begins a subscription and 0 ends one.
            while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                newcomers |= self._socket.recv(zmq.NOBLOCK)[:1] == b"\x01"
            # All hear the greeting of one. A send never blocks: XPUB drops what a full subscriber cannot take.
            if newcomers:
                self._socket.send(self._hello, zmq.NOBLOCK)
            latest = self._latest
            if latest is not None and (newcomers or repeat or latest is not self._sent):
                self._sent = latest  # also when it cannot be encoded: once is enough
                self._socket.send(_encode(latest), zmq.NOBLOCK)
        except Exception:
            # The engine serves on without this report.
            logger.exception("a report was lost on the link to the gateway")


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
        # Not with NOBLOCK: beside it pyzmq misses wake-ups. A message that is there makes the future done at once.
        pending = asyncio.ensure_future(self._socket.recv())
        try:
            while True:
                came = [parse(await pending)]
                pending = asyncio.ensure_future(self._socket.recv())
                while pending.done():
                    came.append(parse(pending.result()))
                    pending = asyncio.ensure_future(self._socket.recv())
                newest = next((message for message in reversed(came) if isinstance(message, Report)), None)
                for message in came:
                    if isinstance(message, Hello) or message is newest:
                        yield message
        finally:
            pending.cancel()

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
