"""The link between the engine's scheduler and the gateway: ZeroMQ on local sockets, messages as msgspec structs.

Engine to gateway. The engine binds an XPUB socket. Each new subscriber, also one that comes back and also while the engine
is idle, makes it send a `Hello`, which carries the protocol's version and the engine's size, and then the latest `Report`.
Another report follows when something has happened, and while all that happens is that tasks decode, every so often. It is
the whole state with counters that only grow, so a lost one costs nothing, and the engine keeps no more than one to send. The
last one is repeated every second: it may have been the one that was lost, and an engine that falls silent is not idle but
gone. What a task really held is sent once, in `Ended`, when it ends.

Gateway to engine. The engine binds a PULL socket beside it. A gateway first sends a `Greeting` with its name, the protocol's
version, and the number of its next change. `Change` has new tags of tasks, and the agents whose KV is to be kept. Changes
are taken in the order of their numbers; one without a greeting or out of turn is refused and counted. Each report has the
number up to which each gateway's changes were taken: the scheduler had those before the step, or, where an idle engine
repeats its report, has them before its next one. What is not acknowledged within a second is sent again, after another
greeting: so a lost change heals as a lost report does. `Snapshot` asks for all that a report may leave out.

Whatever the other end does, a step waits for nothing. Reports that a gateway does not read are dropped. Of what gateways
send, a step reads so many messages and so long at most; the rest waits in ZeroMQ, which takes `RECEIVE_HIGH_WATER_MARK`
messages of `LARGEST_CHANGE` bytes from each and lets no gateway keep another from being read.

Two threads use the engine's sockets, one at a time: the scheduler's, and one of the link's own, which greets, repeats and
reads while the scheduler has nothing to do. ZeroMQ allows that under a lock, and the scheduler never waits for it. A
thread that did all the sending was tried: beside a main thread that keeps Python's interpreter lock busy it came to send
no more than one report in three.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import islice
from typing import Annotated, NamedTuple

import msgspec
import zmq
import zmq.asyncio

PROTOCOL = 2
# Messages that may wait in ZeroMQ for a slow gateway before new ones are dropped.
SEND_HIGH_WATER_MARK = 256
# Messages that may wait in ZeroMQ for the engine, from each gateway, and bytes that one may have.
RECEIVE_HIGH_WATER_MARK = 1000
LARGEST_CHANGE = 64 * 2**10
# What a step reads of them at most.
READ_MESSAGES, READ_S = 64, 500e-6
# Gateways whose last number a report has.
GATEWAYS = 8
# Bytes of the entries of one change (which has some more), and of an entry beside its name. A gateway's own name is short.
CHANGE_BYTES, ENTRY_BYTES = 48 * 2**10, 24
LONGEST_NAME = 256
# What a report can encode: beyond it, one greeting would keep all further reports from being encoded.
Number = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
RESEND_S = 1.0
# While the scheduler has nothing to report, newcomers are greeted this often, and the last report is repeated each tenth time.
IDLE_INTERVAL_S = 0.1
REPEAT_AFTER = 10

logger = logging.getLogger(__name__)


class LinkError(Exception):
    """The link cannot be opened, or the peer on it has another protocol."""


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=False):
    """The engine's first message to a subscriber; a repeated one changes nothing."""

    protocol: int
    engine_id: str  # new at every start of the engine: iterations and counters begin again at zero
    engine_version: str
    total_blocks: int  # those a task can hold (vLLM keeps one for itself)
    block_size: int  # tokens
    max_num_seqs: int  # tasks that run at once
    max_model_len: int  # tokens
    prefix_caching: bool = False
    displace_margin: float | None = None  # see `SchedulerSettings`; None: it displaces no task

    @property
    def capacity_tokens(self) -> int:
        """M, the KV cache in tokens."""
        return self.total_blocks * self.block_size


class Holding(NamedTuple):
    """What one running task holds: tokens of KV, and tokens it has produced so far, over all of its sequences."""

    kv_tokens: int
    output_tokens: int


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report", omit_defaults=True, forbid_unknown_fields=False):
    """The engine's state after an iteration. Counters are since the engine's start.

    The columns `tasks`, `kv_tokens` and `output_tokens` are of the running sequences.
    """

    engine_id: str
    iteration: int
    free_blocks: int
    running: int
    waiting: int
    preempted: int = 0
    recomputed_tokens: int = 0  # computed, lost by preemption, and to be computed again
    displaced: int = 0  # of the preempted: those that gave way to a more urgent task
    displaced_tokens: int = 0  # of the recomputed
    prefill_iterations: float = 0.0  # that a token of a prompt takes, on average; 0: not known
    kept_blocks: int = 0  # of the free ones: those that hold the KV of agents that wait for their tools
    tasks: list[int] = []  # the gateway's number of the task; -1: it is not the gateway's
    kv_tokens: list[int] = []
    output_tokens: list[int] = []
    waiting_tasks: list[int] = []  # in the engine's own queue, unless they are many
    # KV tokens by agent, in answer to a `Snapshot` only; a block that several sequences hold counts for each in part.
    agents: dict[str, float] = {}
    heard: dict[str, int] = {}  # by gateway, the number of its last change
    refused: int = 0  # messages that could not be read, or came before a greeting or out of turn

    @property
    def held(self) -> dict[int, Holding]:
        """By the gateway's task number; put together anew each time."""
        held: dict[int, Holding] = {}
        for task, kv_tokens, output_tokens in zip(self.tasks, self.kv_tokens, self.output_tokens, strict=True):
            if task in held:  # a body with `n` > 1 is one task and several sequences
                kv_tokens, output_tokens = kv_tokens + held[task].kv_tokens, output_tokens + held[task].output_tokens
            if task >= 0:
                held[task] = Holding(kv_tokens, output_tokens)
        return held


class Ended(msgspec.Struct, frozen=True, tag="ended", forbid_unknown_fields=False):
    """Tasks have ended, with all of their sequences."""

    engine_id: str
    costs: dict[int, float]  # by task, in KV token·iterations: see `engine.scheduler.ledger`


class Greeting(msgspec.Struct, frozen=True, tag="greeting", forbid_unknown_fields=False):
    """A gateway's first message, sent to each engine that it meets."""

    protocol: int
    gateway: str
    number: Number  # of the change that comes next


class Change(msgspec.Struct, frozen=True, kw_only=True, tag="change", omit_defaults=True, forbid_unknown_fields=False):
    """What a gateway changes at the engine."""

    gateway: str
    number: Number  # one more than that of its last
    tags: dict[int, int] = {}  # by task, the tag that it has from now on
    keep: dict[str, int] = {}  # by agent, for how many iterations from now its KV is to be kept; 0 ends it


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", forbid_unknown_fields=False):
    """Asks for a report that leaves nothing out."""


Message = Hello | Report | Ended
Request = Greeting | Change | Snapshot

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode
_decode_request = msgspec.msgpack.Decoder(Request).decode


def inbox(address: str) -> str:
    """The address for changes to the engine that reports at `address`. Raises `LinkError` if that is no local socket."""
    if not address.startswith("ipc://"):
        raise LinkError(f"cannot bind the link to {address}: an address is ipc:///path/to/link.sock")
    return f"{address}.in"


class EngineLink:
    """The engine's end. Nothing in it blocks or raises, whatever the other end does.

    address: a ZeroMQ address such as `ipc:///run/justitia/link.sock`. Raises `LinkError` when it cannot be bound.
    """

    def __init__(self, address: str, hello: Hello) -> None:
        addresses = address, inbox(address)
        self._hello = encode(hello)
        self._latest: Report | None = None
        self._sent: Report | None = None
        self._ended: deque[Ended] = deque(maxlen=SEND_HIGH_WATER_MARK)
        # Read, and not given to the scheduler yet. The counts are of all so far; up to `_promised` a report has said so.
        self._requests: deque[Greeting | Change] = deque()
        self._taken = self._given = self._promised = 0
        # The last number of each gateway, the one that greeted last comes first: of what was read, and given.
        self._read: dict[str, int] = {}
        self.heard: dict[str, int] = {}
        self.refused = 0
        self.snapshot_wanted = False  # until the scheduler's next report
        self._repeat_wanted = False  # though the scheduler has nothing new to report
        # A context of our own: no other `term` can wait for these sockets, nor ours for others.
        self._context = zmq.Context()
        self._out: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._out.setsockopt(zmq.XPUB_VERBOSE, 1)  # report every subscriber, not only the first
        self._out.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self._out.setsockopt(zmq.MAXMSGSIZE, LONGEST_NAME)  # of a subscription
        self._in: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._in.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        self._in.setsockopt(zmq.MAXMSGSIZE, LARGEST_CHANGE)
        for socket, at in zip((self._out, self._in), addresses, strict=True):
            socket.setsockopt(zmq.LINGER, 0)
            try:
                socket.bind(at)
            except zmq.ZMQError as error:
                self._out.close()
                self._in.close()
                self._context.term()
                raise LinkError(f"cannot bind the link to {at}: {error}") from error
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._while_idle, name="justitia-link", daemon=True)
        self._thread.start()

    def publish(self, report: Report) -> None:
        """Sends it to the subscribers, and to those to come until the next report. Does nothing after `close`."""
        self._latest = report
        self._try(self._tell)

    def ended(self, ended: Ended) -> None:
        """Goes out with the next report."""
        self._ended.append(ended)

    @property
    def left(self) -> bool:
        """Whether some of what was read was not yet returned by `changes`."""
        return bool(self._requests)

    def changes(self, *, listen: bool = True) -> Iterator[Change]:
        """The changes of gateways, in the order in which they came; without `listen`, the rest of what was read."""
        if listen:
            self._try(self._listen)
        until = time.perf_counter() + READ_S
        while self._requests:
            request = self._requests.popleft()
            self._given += 1
            self.heard = _upto(request, self.heard)
            if isinstance(request, Change):
                yield request
            if self._given >= self._promised and time.perf_counter() > until:
                return  # the rest in the next step

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with self._lock:
            self._out.close()
            self._in.close()
            self._context.term()

    def _try(self, do: Callable[[], None]) -> None:
        """Calls it, unless the other thread uses the sockets or the link is closed."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._closing.is_set():
                    do()
            finally:
                self._lock.release()

    def _while_idle(self) -> None:
        seen, unchanged = None, 0
        while not self._closing.wait(IDLE_INTERVAL_S):
            if self._latest is not seen:
                # The scheduler is at work, and does this in its steps.
                seen, unchanged = self._latest, 0
                continue
            unchanged += 1
            with self._lock:
                self._listen()
                self._tell(repeat=self._repeat_wanted or unchanged % REPEAT_AFTER == 0)

    def _tell(self, repeat: bool = False) -> None:
        """Greets new subscribers, and sends the latest report if it was not sent yet. The caller holds the lock."""
        try:
            newcomers = False
            # Of what XPUB has to read, 1 begins a subscription and 0 ends one.
            for _ in range(READ_MESSAGES):
                if not int(self._out.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    break
                newcomers |= self._out.recv(zmq.NOBLOCK)[:1] == b"\x01"
            # A greeting goes to all. A send never blocks: XPUB drops what a full subscriber cannot take.
            if newcomers:
                self._out.send(self._hello, zmq.NOBLOCK)
            while self._ended:
                self._out.send(encode(self._ended.popleft()), zmq.NOBLOCK)
            latest = self._latest
            if latest is not None and (newcomers or repeat or latest is not self._sent):
                if latest is self._sent:  # since then more may have been read
                    latest = msgspec.structs.replace(latest, heard=self._read, refused=self.refused)
                    self._promised = self._taken
                else:
                    self._sent = latest  # also when it cannot be encoded: once is enough
                self._repeat_wanted = False
                self._out.send(encode(latest), zmq.NOBLOCK)
        except Exception:
            # The engine serves on without this report.
            logger.exception("a report was lost on the link to the gateway")

    def _listen(self) -> None:
        """Reads what has come, for `READ_S` at most. The caller holds the lock."""
        try:
            until = time.perf_counter() + READ_S
            for _ in range(READ_MESSAGES - len(self._requests)):
                if not int(self._in.getsockopt(zmq.EVENTS)) & zmq.POLLIN or time.perf_counter() > until:
                    return
                self._take(self._in.recv(zmq.NOBLOCK))
        except Exception:
            logger.exception("the link's inbox cannot be read")

    def _take(self, message: bytes) -> None:
        try:
            request = _decode_request(message)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self.refused += 1
            return
        if isinstance(request, Greeting):
            if request.protocol != PROTOCOL or len(request.gateway) > LONGEST_NAME:
                self.refused += 1
                return
        elif isinstance(request, Snapshot):
            self.snapshot_wanted = self._repeat_wanted = True
            return
        elif request.number - 1 != self._read.get(request.gateway):
            self.refused += 1
            return
        self._read = _upto(request, self._read)
        self._requests.append(request)
        self._taken += 1


def _upto(request: Greeting | Change, numbers: dict[str, int]) -> dict[str, int]:
    """The last number of each gateway, with this one's. A new dictionary, as a report may still have the old one."""
    if isinstance(request, Change):
        return {**numbers, request.gateway: request.number}
    others = ((name, number) for name, number in numbers.items() if name != request.gateway)
    return {request.gateway: request.number - 1, **dict(islice(others, GATEWAYS - 1))}


class GatewayLink:
    """The gateway's end: an asynchronous stream of messages, and changes the other way. May connect before the engine runs."""

    def __init__(self, address: str) -> None:
        self.name = uuid.uuid4().hex
        self.resent = 0  # changes that were sent again, since the engine did not acknowledge them
        self.dropped = 0  # messages that could not be sent, as too many wait for an engine that does not read
        self._engine: str | None = None
        self._number = 0
        self._unheard: dict[int, tuple[Change, float]] = {}  # by number, with when it was sent
        addresses = address, inbox(address)
        context = zmq.asyncio.Context.instance()
        self._socket: zmq.asyncio.Socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._out: zmq.Socket[bytes] = zmq.Socket(context, zmq.PUSH)  # which never waits
        self._out.setsockopt(zmq.LINGER, 0)
        self._out.setsockopt(zmq.SNDHWM, RECEIVE_HIGH_WATER_MARK)
        for socket, at in zip((self._socket, self._out), addresses, strict=True):
            socket.connect(at)

    async def messages(self) -> AsyncIterator[Message]:
        """What the engine sends; of reports that came while the caller was busy, only the newest. Never ends by itself.

        Raises `LinkError` on a message that cannot be read, or a `Hello` of another protocol.
        """
        # Not with NOBLOCK: beside it pyzmq misses wake-ups. A message that is there makes the future done at once.
        pending = asyncio.ensure_future(self._socket.recv())
        try:
            while True:
                came = [parse(await pending)]
                pending = asyncio.ensure_future(self._socket.recv())
                # No more of them at a time than may wait: if messages come faster than they are read, this must end.
                while pending.done() and len(came) < SEND_HIGH_WATER_MARK:
                    came.append(parse(pending.result()))
                    pending = asyncio.ensure_future(self._socket.recv())
                newest = next((message for message in reversed(came) if isinstance(message, Report)), None)
                for message in came:
                    if isinstance(message, Hello):
                        self._meet(message)
                    elif message is newest:
                        self._acknowledge(newest)
                    elif isinstance(message, Report):
                        continue
                    yield message
                if pending.done():
                    await asyncio.sleep(0)  # else other tasks would get no turn until nothing is left
        finally:
            pending.cancel()

    def change(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None:
        """Sends changes, and again until they are acknowledged. Does nothing before an engine's hello."""
        if self._engine is None:
            return
        one, size = _Draft(), 0
        entries: list[tuple[int | str, int]] = [*(tags or {}).items(), *(keep or {}).items()]
        for entry in entries:
            length = ENTRY_BYTES + (len(entry[0].encode()) if isinstance(entry[0], str) else 0)
            if length > CHANGE_BYTES:
                self.dropped += 1  # a name that no message could carry
                continue
            if size + length > CHANGE_BYTES:
                self._number_and_send(one)
                one, size = _Draft(), 0
            size += length
            one.add(*entry)
        if size:
            self._number_and_send(one)

    def ask_for_snapshot(self) -> None:
        self._send(Snapshot())

    def close(self) -> None:
        self._socket.close()
        self._out.close()

    def _meet(self, hello: Hello) -> None:
        """A hello may be for another new subscriber. When the engine is new, all tasks of the old one are gone."""
        if hello.engine_id != self._engine:
            self._engine = hello.engine_id
            self._unheard.clear()
            self._greet()

    def _greet(self) -> None:
        self._send(Greeting(PROTOCOL, self.name, self._number + 1))

    def _acknowledge(self, report: Report) -> None:
        heard = report.heard.get(self.name, 0) if report.engine_id == self._engine else 0
        while self._unheard and next(iter(self._unheard)) <= heard:
            del self._unheard[next(iter(self._unheard))]
        if not self._unheard or next(iter(self._unheard.values()))[1] > time.monotonic() - RESEND_S:
            return
        tags: dict[int, int] = {}
        keep: dict[str, int] = {}
        for change, _ in self._unheard.values():
            tags |= change.tags
            keep |= change.keep
        self.resent += len(self._unheard)
        self._unheard.clear()
        self._greet()  # the engine may have dropped our name, or wait for a number that was lost
        self.change(tags, keep)

    def _number_and_send(self, draft: _Draft) -> None:
        self._number += 1
        one = Change(gateway=self.name, number=self._number, tags=draft.tags, keep=draft.keep)
        self._unheard[one.number] = one, time.monotonic()
        self._send(one)

    def _send(self, request: Request) -> None:
        try:
            self._out.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1


class _Draft:
    def __init__(self) -> None:
        self.tags: dict[int, int] = {}
        self.keep: dict[str, int] = {}

    def add(self, name: int | str, value: int) -> None:
        if isinstance(name, int):
            self.tags[name] = value
        else:
            self.keep[name] = value


def parse(message: bytes) -> Message:
    """Raises `LinkError` on a message that cannot be read, or a `Hello` of another protocol."""
    try:
        parsed: Message = _decode(message)
    except msgspec.DecodeError as error:
        raise LinkError(f"unreadable message on the link: {error}") from error
    if isinstance(parsed, Hello) and parsed.protocol != PROTOCOL:
        raise LinkError(f"the engine speaks protocol {parsed.protocol} on the link, this gateway {PROTOCOL}")
    return parsed
