"""Both ends of the link, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from engine.link import PROTOCOL, Ended, EngineLink, GatewayLink, Hello, LinkError, Message, Report, parse

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
    path.unlink(missing_ok=True)


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
        assert await take(messages) == report(41)


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
    assert await take(messages) == report(7)
    assert await take(messages) == report(7)


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


def test_a_gateway_that_does_not_read_costs_the_engine_nothing(publisher: EngineLink, address: str) -> None:
    """20,000 large reports: far more than every buffer on the way holds."""
    with zmq.Context() as context, context.socket(zmq.SUB) as sleeper:
        sleeper.setsockopt(zmq.LINGER, 0)
        sleeper.setsockopt(zmq.RCVTIMEO, int(1000 * ANSWER_S))
        sleeper.setsockopt(zmq.SUBSCRIBE, b"")
        sleeper.connect(address)
        assert parse(sleeper.recv()) == HELLO
        large = report(1, tasks=256)
        started = time.thread_time()  # ours alone: the machine may be busy with others
        for _ in range(20_000):
            publisher.publish(large)
        mean_s = (time.thread_time() - started) / 20_000
    assert mean_s < 500e-6  # about 50 µs on an idle machine, most of it for encoding 256 tasks


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
