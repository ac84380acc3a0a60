"""Both ends of the link, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from engine import link as link_module
from engine.link import (
    CHANGE_BYTES,
    GATEWAYS,
    LARGEST_CHANGE,
    LONGEST_NAME,
    PROTOCOL,
    READ_MESSAGES,
    RECEIVE_HIGH_WATER_MARK,
    SEND_HIGH_WATER_MARK,
    Change,
    Ended,
    EngineLink,
    GatewayLink,
    Greeting,
    Hello,
    LinkError,
    Message,
    Report,
    Snapshot,
    inbox,
    parse,
)

pytestmark = pytest.mark.wire

HELLO = Hello(PROTOCOL, "e1", "0.32.0", 127, 32, 64, 2048)
ANSWER_S = 5.0


def report(iteration: int, tasks: int = 1) -> Report:
    return Report(
        engine_id="e1",
        iteration=iteration,
        free_blocks=100,
        running=tasks,
        waiting=2,
        preempted=3,
        tasks=list(range(tasks)),
        kv_tokens=[40] * tasks,
        output_tokens=[2] * tasks,
    )


@pytest.fixture
def address() -> Iterator[str]:
    path = Path(f"/tmp/justitia-test-{uuid.uuid4().hex[:8]}.sock")
    yield f"ipc://{path}"
    for left in (path, Path(f"{path}.in")):
        left.unlink(missing_ok=True)


@pytest.fixture
def publisher(address: str) -> Iterator[EngineLink]:
    one = EngineLink(address, HELLO)
    yield one
    one.close()


Subscribe = Callable[[], AsyncIterator[Message]]


@pytest.fixture
async def subscribe(address: str) -> AsyncIterator[Subscribe]:
    subscribers = []

    def new() -> AsyncIterator[Message]:
        subscribers.append(GatewayLink(address))
        return subscribers[-1].messages()

    yield new
    for one in subscribers:
        one.close()


async def take(messages: AsyncIterator[Message]) -> Message:
    async with asyncio.timeout(ANSWER_S):
        return await anext(messages)


def unheard(message: Message) -> Message:
    """A repeated report also says whom the engine has heard since."""
    return msgspec.structs.replace(message, heard={}) if isinstance(message, Report) else message


@pytest.mark.parametrize("message", [HELLO, report(1), report(9, tasks=300), report(0, tasks=0), Ended("e1", {7: 1.5})])
def test_there_and_back(message: Message) -> None:
    assert parse(msgspec.msgpack.encode(message)) == message


def test_the_capacity_is_in_tokens() -> None:
    assert HELLO.capacity_tokens == 127 * 32


async def test_a_subscriber_of_an_idle_engine_is_greeted(publisher: EngineLink, subscribe: Subscribe) -> None:
    messages = subscribe()
    assert await take(messages) == HELLO
    publisher.publish(report(1))
    assert await take(messages) == report(1)


async def test_a_late_subscriber_is_told_the_state(publisher: EngineLink, subscribe: Subscribe) -> None:
    publisher.publish(report(41))
    for _ in range(3):  # also the second and the third: XPUB would hear of the first only
        messages = subscribe()
        assert await take(messages) == HELLO
        assert unheard(await take(messages)) == report(41)


async def test_a_subscriber_that_was_there_before_the_engine(address: str, subscribe: Subscribe) -> None:
    messages = subscribe()
    publisher = EngineLink(address, HELLO)
    try:
        assert await take(messages) == HELLO
    finally:
        publisher.close()


async def test_a_new_engine_greets_the_same_subscriber(address: str, subscribe: Subscribe) -> None:
    """A restart of the engine: the socket's file is there, the publisher is new."""
    messages = subscribe()
    for engine_id in ("first", "second"):
        hello = msgspec.structs.replace(HELLO, engine_id=engine_id)
        publisher = EngineLink(address, hello)
        assert await take(messages) == hello
        publisher.close()


async def test_the_last_report_is_repeated(publisher: EngineLink, subscribe: Subscribe) -> None:
    """It may have been the one that was lost, and nothing follows it while the engine is idle."""
    messages = subscribe()
    await take(messages)
    publisher.publish(report(7))
    assert unheard(await take(messages)) == report(7)
    assert unheard(await take(messages)) == report(7)


async def test_a_slow_gateway_reads_the_newest_report(publisher: EngineLink, subscribe: Subscribe) -> None:
    messages = subscribe()
    await take(messages)
    for iteration in range(500):
        publisher.publish(report(iteration))
    read: list[int] = []
    while not read or read[-1] < 499:
        message = await take(messages)
        assert isinstance(message, Report)
        read.append(message.iteration)
    assert read == sorted(read)
    assert len(read) < 500


async def test_reports_that_keep_coming_are_read_in_pieces(
    publisher: EngineLink, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one message is read, the next one comes. Between the pieces, other tasks get a turn."""
    link = GatewayLink(address)
    messages = link.messages()
    await take(messages)
    socket, sent, flood = zmq.Socket.shadow(link._socket.underlying), 0, 4 * SEND_HIGH_WATER_MARK

    def parse_while_more_comes(data: bytes) -> Message:
        nonlocal sent
        if sent < flood:
            sent += 1
            publisher.publish(report(sent))
            assert socket.poll(1000 * ANSWER_S)
        return parse(data)

    monkeypatch.setattr(link_module, "parse", parse_while_more_comes)
    publisher.publish(report(0))
    first = await take(messages)
    assert isinstance(first, Report)
    assert first.iteration <= SEND_HIGH_WATER_MARK
    turn = asyncio.Event()
    asyncio.get_running_loop().call_soon(turn.set)
    await take(messages)
    assert turn.is_set()
    link.close()


def test_a_gateway_that_does_not_read_costs_the_engine_nothing(publisher: EngineLink, address: str) -> None:
    """20,000 large reports: far more than every buffer on the way holds."""
    with zmq.Context() as context, context.socket(zmq.SUB) as sleeper:
        sleeper.setsockopt(zmq.LINGER, 0)
        sleeper.setsockopt(zmq.RCVTIMEO, int(1000 * ANSWER_S))
        sleeper.setsockopt(zmq.SUBSCRIBE, b"")
        sleeper.connect(address)
        assert parse(sleeper.recv()) == HELLO
        for iteration in range(20_000):
            publisher.publish(report(iteration, tasks=256))
        assert publisher._latest is not None and publisher._latest.iteration == 19_999, "no call waited for the gateway"
        received = 0
        message: Message = HELLO
        while not isinstance(message, Report) or message.iteration < 19_999:
            message = parse(sleeper.recv())
            received += 1
        assert received < 20_000


def test_publishing_after_the_end_is_silent(address: str) -> None:
    publisher = EngineLink(address, HELLO)
    publisher.close()
    publisher.close()
    publisher.publish(report(1))


async def test_what_cannot_be_encoded_costs_one_report(
    publisher: EngineLink, subscribe: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    messages = subscribe()
    await take(messages)
    while "a report was lost" not in caplog.text:  # not while the link's own thread has the sockets
        publisher.publish(msgspec.structs.replace(report(1), tasks=[2**70]))
        await asyncio.sleep(0)
    publisher.publish(report(2))
    assert await take(messages) == report(2)


@pytest.mark.parametrize("address", ["ipc:///nowhere/at/all.sock", "ipc://" + "/tmp/" + 200 * "x", "nonsense"])
def test_an_address_that_cannot_be_bound(address: str) -> None:
    with pytest.raises(LinkError, match="cannot bind the link"):
        EngineLink(address, HELLO)


@pytest.mark.parametrize("message", [b"", b"\xc1", b"hello", msgspec.msgpack.encode({"type": "hello", "protocol": 1})])
def test_what_cannot_be_read(message: bytes) -> None:
    with pytest.raises(LinkError, match="unreadable"):
        parse(message)


async def test_another_protocol(address: str, subscribe: Subscribe) -> None:
    messages = subscribe()
    publisher = EngineLink(address, msgspec.structs.replace(HELLO, protocol=PROTOCOL + 1))
    with contextlib.closing(publisher), pytest.raises(LinkError, match=f"protocol {PROTOCOL + 1}"):
        await take(messages)


def test_fields_of_a_later_version_are_passed_over() -> None:
    newer = msgspec.msgpack.decode(msgspec.msgpack.encode(HELLO)) | {"from_the_future": 1}
    assert parse(msgspec.msgpack.encode(newer)) == HELLO


# Changes


class Engine:
    """A scheduler that does nothing but obey: what it was told, in order."""

    def __init__(self, address: str, engine_id: str = "e1") -> None:
        self.link = EngineLink(address, msgspec.structs.replace(HELLO, engine_id=engine_id))
        self.engine_id = engine_id
        self.iteration = 0
        self.changes: list[Change] = []
        self.snapshots = 0
        self.read_most = 0

    @property
    def tags(self) -> dict[int, int]:
        return {task: tag for change in self.changes for task, tag in change.tags.items()}

    def report(self) -> Report:
        return msgspec.structs.replace(
            report(self.iteration), engine_id=self.engine_id, heard=self.link.heard, refused=self.link.refused
        )

    def step(self) -> None:
        changes = list(self.link.changes())
        self.read_most = max(self.read_most, len(changes))
        self.changes += changes
        self.snapshots += self.link.snapshot_wanted
        self.link.snapshot_wanted = False
        self.iteration += 1
        self.link.publish(self.report())


class Gateway:
    """A gateway's end of the link that reads all the time, and keeps what it read."""

    def __init__(self, address: str) -> None:
        self.link = GatewayLink(address)
        self.read: list[Message] = []
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self.link.messages():
            self.read.append(message)

    @property
    def met(self) -> bool:
        return self.link._engine is not None

    @property
    def last(self) -> Report | None:
        return next((one for one in reversed(self.read) if isinstance(one, Report)), None)

    async def close(self) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        self.link.close()


async def until(done: Callable[[], bool], *engines: Engine) -> None:
    """The engines make steps until then."""
    async with asyncio.timeout(ANSWER_S):
        while not done():
            for engine in engines:
                engine.step()
            await asyncio.sleep(0.0005 if engines else 0.01)


@pytest.fixture
def engine(address: str) -> Iterator[Engine]:
    one = Engine(address)
    yield one
    one.link.close()


@pytest.fixture
async def gateway(address: str) -> AsyncIterator[Gateway]:
    one = Gateway(address)
    yield one
    await one.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not heard is sent again soon. For tests in which that is the matter."""
    monkeypatch.setattr(link_module, "RESEND_S", 0.1)


@pytest.fixture
def push(address: str) -> Iterator[Callable[[bytes], None]]:
    """A peer that sends what it likes."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(1000 * ANSWER_S))
        socket.connect(inbox(address))
        yield socket.send


def greeting(number: int, gateway: str = "g", protocol: int = PROTOCOL) -> bytes:
    return msgspec.msgpack.encode({"type": "greeting", "protocol": protocol, "gateway": gateway, "number": number})


def change(number: int, gateway: str = "g", **what: object) -> bytes:
    return msgspec.msgpack.encode({"type": "change", "gateway": gateway, "number": number, **what})


async def test_changes_are_heard_in_order_and_reports_say_so(engine: Engine, gateway: Gateway) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.change({1: 10, 2: 20})
    gateway.link.change({1: 11}, {"agent": 300})
    await until(lambda: len(engine.changes) == 2, engine)
    assert [(one.number, one.tags, one.keep) for one in engine.changes] == [
        (1, {1: 10, 2: 20}, {}),
        (2, {1: 11}, {"agent": 300}),
    ]
    await until(lambda: gateway.last is not None and gateway.last.heard == {gateway.link.name: 2}, engine)
    assert gateway.link._unheard == {}
    assert (gateway.link.resent, gateway.link.dropped, engine.link.refused) == (0, 0, 0)


async def test_what_was_read_and_not_given_to_the_scheduler_is_not_heard_yet(
    engine: Engine, push: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose time is up leaves some for the next one."""
    for message in (
        greeting(5),
        *(change(number, tags={number: 1}) for number in (5, 6, 7)),
        greeting(9),
        greeting(3, "h"),
    ):
        push(message)
    while len(engine.link._requests) < 6:
        with engine.link._lock:
            engine.link._listen()
        await asyncio.sleep(0)
    monkeypatch.setattr(link_module, "READ_S", -1.0)
    heard = []
    while engine.link.left:
        engine.step()
        heard.append((list(engine.tags), engine.report().heard))
    assert heard == [
        ([], {"g": 4}),
        ([5], {"g": 5}),
        ([5, 6], {"g": 6}),
        ([5, 6, 7], {"g": 7}),
        ([5, 6, 7], {"g": 8}),
        ([5, 6, 7], {"h": 2, "g": 8}),
    ]


async def test_nothing_is_sent_for_nothing(engine: Engine, gateway: Gateway) -> None:
    gateway.link.change({1: 10})  # no engine has said hello: none has tasks
    await until(lambda: gateway.met, engine)
    gateway.link.change()
    gateway.link.change({}, {})
    gateway.link.change({5: 50})
    await until(lambda: bool(engine.changes), engine)
    assert [(one.number, one.tags) for one in engine.changes] == [(1, {5: 50})]


@pytest.mark.parametrize(
    ("messages", "refused", "applied"),
    [
        ([change(1, tags={1: 1})], 1, []),  # a stranger
        ([greeting(1, "other"), change(1, tags={1: 1})], 1, []),
        ([greeting(1, protocol=PROTOCOL + 1), change(1, tags={1: 1})], 2, []),
        ([greeting(1, protocol=PROTOCOL - 1)], 1, []),
        ([greeting(1, "n" * (LONGEST_NAME + 1))], 1, []),
        ([greeting(1), change(2, tags={2: 2}), change(1, tags={1: 1})], 1, [1]),  # early
        ([greeting(1), change(1, tags={1: 1}), change(1, tags={1: 9})], 1, [1]),  # twice
        ([greeting(1), change(1), change(3), change(2), change(3)], 1, [1, 2, 3]),
        ([greeting(5), change(5), change(6)], 0, [5, 6]),
        ([greeting(1), change(1), greeting(1), change(1)], 0, [1, 1]),  # begins anew
        ([greeting(7), greeting(2), change(7), change(2)], 1, [2]),
    ],
)
async def test_what_is_refused(
    engine: Engine, push: Callable[[bytes], None], messages: list[bytes], refused: int, applied: list[int]
) -> None:
    for message in (*messages, greeting(1, "last"), change(1, "last")):
        push(message)
    await until(lambda: bool(engine.changes) and engine.changes[-1].gateway == "last", engine)
    assert [one.number for one in engine.changes[:-1]] == applied
    assert engine.link.refused == refused


def nested(depth: int) -> bytes:
    """Deep in a field that is passed over."""
    return b"\x82" + msgspec.msgpack.encode("type") + b"\xa8snapshot" + b"\xa1x" + b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"\xc1",
        b"hello",
        b"\xff" * 1000,
        nested(50_000),
        b"\x91" * 60_000,
        b"\xdf\xff\xff\xff\xff",  # a map of 4 G entries that are not there
        b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode(HELLO),
        msgspec.msgpack.encode(["change", 1]),
        msgspec.msgpack.encode({"type": "nonsense"}),
        msgspec.msgpack.encode({"type": "change", "gateway": "g"}),
        greeting(0),
        greeting(-(2**63)),
        greeting(2**64 - 1),
        change(-1),
        change(1, tags={"a": 1}),
        change(1, tags={1: 2.5}),
        change(1, tags=[1]),
        change(1, keep={"a": None}),
        change(1, keep={1: 1}),
        change(1, gateway=b"\xff"),  # type: ignore[arg-type]
        b"\x81\xa4type" + b"\xa8greeting"[:-1] + b"\xff",
    ],
)
async def test_what_cannot_be_read_is_counted_and_harms_nobody(
    engine: Engine, gateway: Gateway, push: Callable[[bytes], None], odd: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await until(lambda: gateway.met, engine)
    push(odd)
    await until(lambda: engine.link.refused == 1, engine)
    gateway.link.change({1: 2**63 - 1, 2: -(2**63), 2**63 - 1: 7})
    at = engine.iteration
    await until(lambda: bool(engine.changes) and gateway.last is not None and gateway.last.iteration > at + 1, engine)
    assert engine.tags == {1: 2**63 - 1, 2: -(2**63), 2**63 - 1: 7}
    assert gateway.last is not None and gateway.last.refused == 1, "reports can still be encoded"
    assert not caplog.records


@pytest.mark.parametrize("number", [1, 2**62])
async def test_no_number_that_is_heard_keeps_reports_from_being_sent(
    engine: Engine, gateway: Gateway, push: Callable[[bytes], None], number: int
) -> None:
    push(greeting(number))
    push(change(number, tags={2**64 - 1: 2**64 - 1}, keep={"": -(2**63)}))
    await until(lambda: bool(engine.changes), engine)
    await until(lambda: gateway.last is not None and gateway.last.heard.get("g") == number, engine)


async def test_a_message_that_is_too_large_costs_its_sender_the_connection(
    address: str, engine: Engine, gateway: Gateway
) -> None:
    await until(lambda: gateway.met, engine)
    with zmq.Context() as context, context.socket(zmq.PUSH) as large:
        large.setsockopt(zmq.LINGER, 0)
        monitor = large.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        large.connect(inbox(address))
        large.send(bytes(LARGEST_CHANGE + 1))
        async with asyncio.timeout(ANSWER_S):
            while not monitor.poll(0):
                engine.step()
                await asyncio.sleep(0.001)
        large.disable_monitor()
        monitor.close()
    assert engine.link.refused == 0, "it was never read"
    gateway.link.change({1: 1})
    await until(lambda: engine.tags == {1: 1}, engine)


async def test_the_largest_message_is_read(engine: Engine, push: Callable[[bytes], None]) -> None:
    push(bytes(LARGEST_CHANGE))
    await until(lambda: engine.link.refused == 1, engine)


async def test_many_changes_are_split_and_all_arrive(engine: Engine, gateway: Gateway) -> None:
    await until(lambda: gateway.met, engine)
    tags = {2**62 + task: 2**62 - task for task in range(10_000)}
    keep = {f"agent-{number}-" + "ü" * (number % 300): number for number in range(1000)}
    gateway.link.change(tags, keep)
    await until(lambda: not gateway.link._unheard, engine)
    assert engine.tags == tags
    assert {agent: n for one in engine.changes for agent, n in one.keep.items()} == keep
    sizes = [len(msgspec.msgpack.encode(one)) for one in engine.changes]
    assert len(sizes) > 5
    assert max(sizes) <= LARGEST_CHANGE
    assert (gateway.link.resent, gateway.link.dropped, engine.link.refused) == (0, 0, 0)


@pytest.mark.parametrize(("length", "dropped"), [(CHANGE_BYTES - 24, 0), (CHANGE_BYTES - 23, 1), (10**6, 1)])
async def test_a_name_that_no_message_could_carry_is_dropped(
    engine: Engine, gateway: Gateway, length: int, dropped: int
) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.change({1: 1}, {"x" * length: 5, "short": 6})
    await until(lambda: not gateway.link._unheard and bool(engine.changes), engine)
    assert gateway.link.dropped == dropped
    assert engine.tags == {1: 1}
    assert {len(agent) for one in engine.changes for agent in one.keep} == {5} | ({length} if not dropped else set())


# Lost changes


@pytest.mark.usefixtures("impatient")
async def test_a_lost_change_is_sent_again_with_those_after_it(engine: Engine, gateway: Gateway) -> None:
    """It was lost on the way: the later ones come out of turn, and are refused."""
    await until(lambda: gateway.met, engine)
    send, lost = gateway.link._send, []

    def lose(request: link_module.Request) -> None:
        if isinstance(request, Change) and not lost:
            lost.append(request)
        else:
            send(request)

    gateway.link._send = lose  # type: ignore[method-assign]
    gateway.link.change({1: 1, 2: 1}, {"a": 1})
    gateway.link.change({2: 2})
    gateway.link.change({3: 3}, {"a": 3})
    await until(lambda: not gateway.link._unheard, engine)
    assert [one.number for one in lost] == [1]
    assert [(one.number, one.tags, one.keep) for one in engine.changes] == [(4, {1: 1, 2: 2, 3: 3}, {"a": 3})]
    assert (engine.link.refused, gateway.link.resent) == (2, 3)


async def test_control_without_sending_again_a_lost_change_is_lost(
    engine: Engine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "RESEND_S", 1e9)
    await until(lambda: gateway.met, engine)
    gateway.link._number += 1  # as if one had been lost
    gateway.link.change({1: 1})
    await until(lambda: engine.link.refused == 1, engine)
    at = engine.iteration
    await until(lambda: gateway.last is not None and gateway.last.iteration > at, engine)
    assert (engine.changes, len(gateway.link._unheard)) == ([], 1)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_has_forgotten_the_gateway_is_told_again(
    engine: Engine, gateway: Gateway, push: Callable[[bytes], None]
) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.change({1: 1})
    await until(lambda: not gateway.link._unheard and bool(engine.changes), engine)
    for number in range(GATEWAYS):
        push(greeting(1, f"other-{number}"))
    await until(lambda: "other-7" in engine.link.heard, engine)
    assert gateway.link.name not in engine.link.heard
    assert len(engine.link.heard) == GATEWAYS
    gateway.link.change({1: 2})
    await until(lambda: engine.tags == {1: 2} and not gateway.link._unheard, engine)
    assert next(iter(engine.link.heard)) == gateway.link.name
    assert len(engine.link.heard) == GATEWAYS
    assert gateway.link.resent == 1


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_lost_its_memory_but_not_its_name_is_told_again(address: str, gateway: Gateway) -> None:
    first = Engine(address)
    await until(lambda: gateway.met, first)
    gateway.link.change({1: 1})
    await until(lambda: not gateway.link._unheard and bool(first.changes), first)
    first.link.close()
    gateway.link.change({1: 2})
    second = Engine(address)
    with contextlib.closing(second.link):
        await until(lambda: second.tags == {1: 2} and not gateway.link._unheard, second)


@pytest.mark.usefixtures("impatient")
async def test_a_new_engine_is_greeted_and_hears_nothing_of_the_old_ones_tasks(address: str, gateway: Gateway) -> None:
    first = Engine(address, "first")
    # A greeting that is still on its way would be the second's too, and what follows it; which does no harm.
    await until(lambda: gateway.link.name in first.link.heard, first)
    first.link.close()
    gateway.link.change({1: 1})
    assert gateway.link._unheard
    second = Engine(address, "second")
    with contextlib.closing(second.link):
        await until(lambda: gateway.link._engine == "second", second)
        assert gateway.link._unheard == {}
        gateway.link.change({2: 2})
        await until(lambda: not gateway.link._unheard and 2 in second.tags, second)
        assert 1 not in second.tags
        assert gateway.link.resent == 0


@pytest.mark.usefixtures("impatient")
async def test_a_report_of_another_engine_acknowledges_nothing(address: str, gateway: Gateway, engine: Engine) -> None:
    await until(lambda: gateway.met, engine)
    engine.engine_id = "ghost"
    gateway.link._number += 1
    gateway.link.change({1: 1})
    await until(lambda: gateway.link.resent > 0, engine)
    engine.link.heard[gateway.link.name] = 10**6
    at = gateway.link.resent
    await until(lambda: gateway.link.resent > at, engine)
    assert gateway.link._unheard
    engine.engine_id = "e1"
    await until(lambda: not gateway.link._unheard, engine)


async def test_an_idle_engine_says_what_it_has_heard(
    engine: Engine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's KV is kept while it waits for its tool: just then an engine may have nothing to do."""
    monkeypatch.setattr(link_module, "REPEAT_AFTER", 2)
    engine.step()
    await until(lambda: gateway.met)
    gateway.link.change(keep={"a": 100})
    await until(lambda: not gateway.link._unheard)
    assert gateway.link.resent == 0
    assert gateway.last is not None and gateway.last.iteration == 1, "no step was made"
    await until(lambda: bool(engine.changes), engine)
    assert engine.changes[0].keep == {"a": 100}


async def test_what_an_idle_engine_has_said_that_it_heard_its_next_step_knows(
    engine: Engine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: whoever was told relies on it."""
    monkeypatch.setattr(link_module, "REPEAT_AFTER", 2)
    engine.step()
    await until(lambda: gateway.met)
    for task in range(10):
        gateway.link.change({task: 1})
    await until(lambda: not gateway.link._unheard)
    assert engine.changes == []
    monkeypatch.setattr(link_module, "READ_S", -1.0)
    engine.step()
    assert list(engine.tags) == list(range(10))


async def test_an_idle_engine_says_what_it_has_refused(
    engine: Engine, gateway: Gateway, push: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "REPEAT_AFTER", 2)
    engine.step()
    push(b"nonsense")
    await until(lambda: gateway.last is not None and gateway.last.refused == 1)
    assert engine.iteration == 1


# Several gateways


async def test_a_gateway_that_comes_back_finds_the_state(address: str, engine: Engine, gateway: Gateway) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.change({1: 1})
    await until(lambda: bool(engine.changes), engine)
    again = Gateway(address)
    try:
        await until(lambda: again.last is not None)  # and the engine makes no step
        assert isinstance(again.read[0], Hello)
        assert again.last is not None and again.last.iteration == engine.iteration
        again.link.change({1: 2})
        await until(lambda: engine.tags == {1: 2}, engine)
        assert engine.link.heard == {again.link.name: 1, gateway.link.name: 1}
    finally:
        await again.close()


async def test_two_gateways_at_once(address: str, engine: Engine, gateway: Gateway) -> None:
    other = Gateway(address)
    try:
        await until(lambda: gateway.met and other.met, engine)
        for number in range(100):
            gateway.link.change({1: number, 100 + number: 0})
            other.link.change({2: number, 1000 + number: 0})
        await until(lambda: not gateway.link._unheard and not other.link._unheard, engine)
        assert (engine.tags[1], engine.tags[2], len(engine.tags)) == (99, 99, 202)
        for link in (gateway.link, other.link):
            assert [one.number for one in engine.changes if one.gateway == link.name] == list(range(1, 101))
            assert link.resent == 0
        assert engine.link.refused == 0
    finally:
        await other.close()


# Snapshots and ends


async def test_a_snapshot_is_asked_of_the_next_step(engine: Engine, gateway: Gateway) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.ask_for_snapshot()
    await until(lambda: engine.snapshots == 1, engine)
    for _ in range(5):
        engine.step()
    assert engine.snapshots == 1


async def test_an_idle_engine_answers_a_snapshot_at_once_and_its_next_step_wholly(
    engine: Engine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may be long. Then it is no idle engine that repeats itself, and what is left out is still wanted."""
    monkeypatch.setattr(link_module, "REPEAT_AFTER", 10**9)
    engine.step()
    await until(lambda: gateway.last is not None)
    reports = len(gateway.read)
    gateway.link.ask_for_snapshot()
    await until(lambda: len(gateway.read) > reports)
    assert isinstance(gateway.read[-1], Report)
    engine.step()
    assert engine.snapshots == 1


async def test_all_ends_are_delivered(engine: Engine, gateway: Gateway) -> None:
    """Not only the newest, as of reports; with a gateway that is busy while they come."""
    await until(lambda: gateway.met, engine)
    for task in range(100):
        engine.link.ended(Ended("e1", {task: task / 2}))
        engine.step()
    async with asyncio.timeout(ANSWER_S):
        while len(gateway.read) < 2 or len([one for one in gateway.read if isinstance(one, Ended)]) < 100:
            await asyncio.sleep(0.001)
            engine.step()
    ends = [one for one in gateway.read if isinstance(one, Ended)]
    assert ends == [Ended("e1", {task: task / 2}) for task in range(100)]
    assert sum(isinstance(one, Report) for one in gateway.read) < engine.iteration


async def test_ends_that_cannot_be_encoded_cost_themselves_only(
    engine: Engine, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A number that no gateway gave. The engine does not fail for it."""
    await until(lambda: gateway.met, engine)
    engine.link.ended(Ended("e1", {2**70: 1.0}))
    engine.link.ended(Ended("e1", {1: 1.0}))
    await until(lambda: Ended("e1", {1: 1.0}) in gateway.read, engine)
    assert "a report was lost" in caplog.text


# Floods


class Flood:
    """A peer that sends as fast as it can, from a thread of its own."""

    def __init__(self, address: str, kind: int, *messages: bytes) -> None:
        self.sent = 0
        self.full = 0  # attempts in a row that found no room
        self._messages = messages
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for message in self._messages:
                    self._socket.send(message, zmq.NOBLOCK)
                    self.sent += 1
                    self.full = 0
            except zmq.Again:
                self.full += 1
                self._stop.wait(0.001)  # full: let the engine's process have the core

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


@pytest.mark.parametrize(
    "messages",
    [
        (b"nonsense",),
        (greeting(1), change(1, tags={1: 1}), msgspec.msgpack.encode(Snapshot())),
        (greeting(1), change(1, tags={2**40 + task: 2**40 for task in range(2500)})),
        (bytes(LARGEST_CHANGE),),
        (nested(60_000),),
    ],
    ids=["garbage", "changes", "large changes", "large garbage", "nested"],
)
async def test_a_flood_costs_a_step_little_and_an_honest_gateway_is_heard(
    address: str, engine: Engine, gateway: Gateway, messages: tuple[bytes, ...]
) -> None:
    await until(lambda: gateway.met, engine)
    flood = Flood(inbox(address), zmq.PUSH, *messages)
    try:
        await until(lambda: flood.sent > RECEIVE_HIGH_WATER_MARK, engine)
        taken = engine.link._take
        reads = []
        engine.link._take = lambda message: (reads.append(message), taken(message))[1]  # type: ignore[method-assign,func-returns-value]
        before, honest = 0, 0
        for step in range(400):
            if step % 10 == 0:
                gateway.link.change({-step: step})
                honest += 1
            before = len(reads)
            with engine.link._lock:  # not while the link's own thread is at it
                engine.link._listen()
            assert len(reads) - before <= READ_MESSAGES
            engine.step()
            await asyncio.sleep(0)
        assert engine.read_most <= READ_MESSAGES
        assert len(engine.link._requests) <= READ_MESSAGES
        await until(lambda: sum(one.gateway == gateway.link.name for one in engine.changes) == honest, engine)
        await until(lambda: not gateway.link._unheard, engine)
        assert gateway.link.resent == 0
    finally:
        flood.close()


async def test_a_step_whose_time_is_over_reads_nothing(
    engine: Engine, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link.change({1: 1})
    with engine.link._lock:
        while not int(engine.link._in.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            await asyncio.sleep(0.001)
        with monkeypatch.context() as context:
            context.setattr(link_module, "READ_S", -1.0)
            engine.link._listen()
            assert not any(isinstance(one, Change) for one in engine.link._requests)
    await until(lambda: engine.tags == {1: 1}, engine)


async def test_what_floods_in_does_not_pile_up(address: str, engine: Engine) -> None:
    """The engine does not read at all: what each end may hold is all that the peer can send."""
    engine.link._lock.acquire()
    flood = Flood(inbox(address), zmq.PUSH, bytes(1000))
    try:
        async with asyncio.timeout(ANSWER_S):
            while flood.full < 200:
                await asyncio.sleep(0.01)
        # The peer's own mark is 1000 too, and there is the socket between them.
        assert RECEIVE_HIGH_WATER_MARK <= flood.sent < 4 * RECEIVE_HIGH_WATER_MARK
    finally:
        flood.close()
        engine.link._lock.release()


async def test_a_flood_of_subscriptions_is_read_in_pieces(address: str, engine: Engine) -> None:
    flood = Flood(address, zmq.XSUB, b"\x01", b"\x00")
    try:
        await until(lambda: flood.sent > RECEIVE_HIGH_WATER_MARK, engine)
        sent = 0

        class Counting:
            def __init__(self, socket: zmq.Socket[bytes]) -> None:
                self._socket, self.received = socket, 0

            def recv(self, flags: int) -> bytes:
                self.received += 1
                return self._socket.recv(flags)

            def __getattr__(self, name: str) -> object:
                return getattr(self._socket, name)

        counting = Counting(engine.link._out)
        engine.link._out = counting  # type: ignore[assignment]
        async with asyncio.timeout(ANSWER_S):
            while sent < 10 * READ_MESSAGES:
                with engine.link._lock:
                    counting.received = 0
                    engine.link._tell()
                assert counting.received <= READ_MESSAGES
                sent += counting.received
                await asyncio.sleep(0.001)
    finally:
        flood.close()


async def test_the_engine_closes_while_it_is_flooded(address: str) -> None:
    engine = Engine(address)
    flood = Flood(inbox(address), zmq.PUSH, greeting(1), change(1, tags={1: 1}))
    try:
        await until(lambda: flood.sent > RECEIVE_HIGH_WATER_MARK, engine)
        async with asyncio.timeout(ANSWER_S):
            await asyncio.to_thread(engine.link.close)
        read = dict(engine.link._read)
        engine.link.publish(report(1))
        given = 0
        while engine.link.left:
            given += len(list(engine.link.changes()))
        assert given <= READ_MESSAGES, "what had been read already"
        assert list(engine.link.changes()) == []
        assert engine.link.heard == engine.link._read == read
    finally:
        engine.link.close()
        flood.close()


async def test_a_gateway_that_sends_to_an_engine_that_does_not_read_waits_for_nothing(
    engine: Engine, gateway: Gateway
) -> None:
    await until(lambda: gateway.met, engine)
    engine.link._lock.acquire()
    try:
        # A call that waited would never return: the engine reads nothing until the lock is released.
        for task in range(5 * RECEIVE_HIGH_WATER_MARK):
            gateway.link.change({task: task})
        assert gateway.link.dropped > 0
    finally:
        engine.link._lock.release()
    gateway.link._unheard = {
        number: (one, sent - link_module.RESEND_S) for number, (one, sent) in gateway.link._unheard.items()
    }
    await until(lambda: not gateway.link._unheard, engine)
    assert engine.tags == {task: task for task in range(5 * RECEIVE_HIGH_WATER_MARK)}


def test_a_gateways_address_is_a_local_socket() -> None:
    with pytest.raises(LinkError, match="ipc:///path"):
        GatewayLink("tcp://127.0.0.1:1")


async def test_a_greeting_that_is_repeated_changes_nothing(engine: Engine, gateway: Gateway) -> None:
    await until(lambda: gateway.met, engine)
    gateway.link._greet()
    gateway.link.change({1: 1})
    gateway.link._meet(HELLO)  # for another subscriber that is new
    gateway.link._greet()
    gateway.link.change({1: 2})
    await until(lambda: not gateway.link._unheard and len(engine.changes) == 2, engine)
    assert (engine.link.refused, gateway.link.resent, engine.tags) == (0, 0, {1: 2})
    assert msgspec.msgpack.decode(greeting(1), type=Greeting) == Greeting(PROTOCOL, "g", 1)
