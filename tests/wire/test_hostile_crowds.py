"""Many connections, and clients that do not read: what they can hold of us, and whether others are still served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.loop_thread import LoopThread
from tests.wire.hostile import GatewayProcess, Neighbour, chat, files_to_spare, gateway_process, head, open_files, post
from tests.wire.scripted_engine import (
    DONE,
    ScriptedEngine,
    Send,
    answer_at_once,
    chunk,
    push,
    start,
    usage_chunk,
    wait_for_word,
)

MIB = 2**20
STALL_S = 1
# Bytes: what the sockets between an engine and a client that does not read may hold, by far.
HELD_BETWEEN = 32 * MIB
HEALTH = head(path="/health", method="GET")


@pytest.fixture(scope="module")
def engine_in_thread(loop_thread: LoopThread) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    serving = engine.serving()
    loop_thread.call(serving.__aenter__())
    yield engine
    loop_thread.call(serving.__aexit__(None, None, None))


@pytest.fixture
def scripted(engine_in_thread: ScriptedEngine) -> Iterator[ScriptedEngine]:
    engine_in_thread.bodies.clear()
    yield engine_in_thread
    engine_in_thread.default = answer_at_once
    engine_in_thread.answers.clear()


@pytest.fixture(scope="module")
def gateway(engine_in_thread: ScriptedEngine) -> Iterator[GatewayProcess]:
    with gateway_process(engine_in_thread.url, client_stall_s=STALL_S) as running:
        yield running


class Large:
    """A large answer, in parts."""

    def __init__(self, mib: int) -> None:
        self.mib = mib
        self.sent = 0  # bytes that the engine could write

    async def __call__(self, body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
        if body.get("stream"):
            await start(send)
            await self._push(send, chunk("x" * 16_000))
            await push(send, usage_chunk(1, 1) + DONE, more=False)
        else:
            await start(send, b"application/json")
            await push(send, b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}, "text": "')
            await self._push(send, b"x" * 16_000)
            await push(send, b'"}', more=False)

    async def _push(self, send: Send, part: bytes) -> None:
        while self.sent < self.mib * MIB:
            await push(send, part)
            if send.__self__.disconnected:  # type: ignore[attr-defined]  # uvicorn's request cycle, which then drops what is sent
                return
            self.sent += len(part)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cut_off(gateway: GatewayProcess) -> float:
    return gateway.metric("justitia_connections_cut_off_total")


# Who does not read


def test_a_stream_that_nobody_reads_stops_the_engine_and_then_is_given_up(
    gateway: GatewayProcess, scripted: ScriptedEngine
) -> None:
    answers = [Large(200) for _ in range(4)]
    before = cut_off(gateway)
    neighbour = Neighbour(gateway)
    scripted.answers = list(answers)
    with gateway.memory_bounded(32), gateway.crowd(4, receive_buffer=4096) as clients:
        with neighbour:
            for client in clients:
                client.send(post(chat(stream=True)))
            until(lambda: cut_off(gateway) == before + 4)
        assert all(0 < answer.sent < HELD_BETWEEN for answer in answers), (
            "the engine was stopped until they were given up"
        )
        neighbour.was_unharmed()
        until(lambda: gateway.metric("justitia_tasks") == 0)


def test_a_stream_that_is_read_slowly_goes_on(gateway: GatewayProcess, scripted: ScriptedEngine) -> None:
    scripted.answers = [Large(6)]
    with gateway.connect(receive_buffer=2**16) as client:
        client.send(post(chat(stream=True), "Connection: close"))
        since_s = time.monotonic()
        while time.monotonic() < since_s + 2 * STALL_S:
            assert client.receive(20_000), "it takes its time, and is not stuck"
            time.sleep(0.05)
        assert client.rest().endswith(DONE + b"\r\n0\r\n\r\n")


def test_whole_answers_that_nobody_reads_stop_the_engine_and_then_are_given_up(
    gateway: GatewayProcess, scripted: ScriptedEngine
) -> None:
    answers = [Large(200) for _ in range(2)]
    before, files = cut_off(gateway), open_files(gateway.process.pid)
    scripted.answers = list(answers)
    with gateway.memory_bounded(32), gateway.crowd(2, receive_buffer=4096) as clients:
        for client in clients:
            client.send(post(chat()))
        until(lambda: cut_off(gateway) == before + 2)
        assert all(0 < answer.sent < HELD_BETWEEN for answer in answers), (
            "the engine was stopped until they were given up"
        )
        until(lambda: open_files(gateway.process.pid) <= files + 2)


def test_who_leaves_after_a_request_sent_ahead_is_missed_at_once(
    gateway: GatewayProcess, scripted: ScriptedEngine
) -> None:
    scripted.default = wait_for_word
    left = scripted.left
    with gateway.connect() as client:
        client.send(post(chat()) + HEALTH)
        until(lambda: len(scripted.bodies) == 1)
    until(lambda: scripted.left == left + 1)
    until(lambda: gateway.metric("justitia_tasks") == 0)


# Many


def test_5000_idle_connections_leave_room_for_others(gateway: GatewayProcess) -> None:
    if not files_to_spare(5_500):
        pytest.skip("5,000 connections need more open files than this machine allows (ulimit -Hn)")
    neighbour = Neighbour(gateway)
    with gateway.memory_bounded(200), gateway.crowd(5_000) as clients:
        for client in clients[::10]:
            client.send(HEALTH)  # these have been served once
        until(lambda: gateway.metric("justitia_connections") >= 5_000)
        with neighbour:
            neighbour.until_answered(100)
        neighbour.was_unharmed()
        assert clients[0].reply("GET").status == 200
    until(lambda: gateway.metric("justitia_connections") < 10)


def test_connections_that_open_and_close_leave_nothing_behind(gateway: GatewayProcess) -> None:
    files = open_files(gateway.process.pid)
    with gateway.memory_bounded(16), Neighbour(gateway) as neighbour:
        for number in range(1000):
            with gateway.connect() as client:
                if number % 3 == 1:
                    client.send(HEALTH)
                elif number % 3 == 2:
                    client.send(post(chat())[:-5])
    neighbour.was_unharmed()
    until(lambda: open_files(gateway.process.pid) <= files + 2)
    assert gateway.metric("justitia_tasks") == 0


def test_idle_connections_give_way_to_new_ones_and_busy_ones_do_not(
    scripted: ScriptedEngine, loop_thread: LoopThread
) -> None:
    scripted.default = wait_for_word
    with gateway_process(scripted.url, max_connections=50) as gateway, gateway.crowd(10) as first:
        for client in first:
            client.send(post(chat()))
        until(lambda: len(scripted.bodies) == 10)
        with gateway.crowd(200) as idle:
            for client in idle[::2]:
                client.send(b"GET / HT")
            assert gateway.get("/health")["status"] == "ok"
            assert gateway.metric("justitia_connections") <= 50
        with gateway.crowd(40) as second:
            for client in second:
                client.send(post(chat()))
            with gateway.crowd(20) as refused:
                for client in refused:
                    client.send(post(chat()))
                    reply = client.reply()
                    assert reply.status == 503
                    assert reply.error["code"] == "too_many_connections"
                    assert int(reply.headers["retry-after"]) > 0
                    assert client.rest() == b""
            loop_thread.loop.call_soon_threadsafe(scripted.go.set)
            assert [client.reply().status for client in (*first, *second)] == [200] * 50
