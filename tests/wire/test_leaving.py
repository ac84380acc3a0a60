"""A client that goes away, in whatever state its request is and in whatever dialect, leaves nothing behind, and pays for what
it held. How soon is measured: `client leaves` in `tests/benchmarks/speed`."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest, StartGateway, running_gateway
from tests.wire.leaver import Leaver
from tests.wire.scripted_dialects import BODIES, events_of, half_then_wait, in_dialect, in_dialect_when_told
from tests.wire.scripted_engine import ScriptedEngine, push
from tests.wire.scripted_engine import start as start_answer

ID = "default/leaver"

# Gives the client that is to leave, and those that stay.
Reach = Callable[[GatewayUnderTest, ScriptedEngine, str], Awaitable[list[Leaver]]]

every_path = pytest.mark.parametrize("path", BODIES)


def ask(gateway: GatewayUnderTest, path: str, **fields: Any) -> Awaitable[Leaver]:
    return Leaver.ask(gateway.url, path, {**BODIES[path], **fields}, "leaver")


def outcomes(gateway: GatewayUnderTest, path: str) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in gateway.app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "justitia_requests_total" and sample.labels["endpoint"] == path
    }


async def queued(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    engine.default = in_dialect_when_told
    kept = await Leaver.ask(gateway.url, path, BODIES[path], "kept")
    await engine.until(lambda engine: len(engine.bodies) == 1)
    leaver = await ask(gateway, path)
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    return [leaver, kept]


async def sent_and_no_byte_yet(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    engine.default = in_dialect_when_told
    leaver = await ask(gateway, path, stream=True)
    await engine.until(lambda engine: len(engine.bodies) == 1)
    return [leaver]


async def streaming(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    engine.default = half_then_wait
    leaver = await ask(gateway, path, stream=True)
    await leaver.hear(b"hel")
    return [leaver]


async def waiting_for_the_whole_answer(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    engine.default = in_dialect_when_told
    leaver = await ask(gateway, path)
    await engine.until(lambda engine: len(engine.bodies) == 1)
    return [leaver]


async def queued_again(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    """The engine died with it, and is not back."""

    async def die(body: dict[str, Any], send: Any, engine: ScriptedEngine) -> None:
        engine.healthy = False
        send.__self__.transport.abort()  # uvicorn's request cycle

    engine.answers = [die]
    leaver = await ask(gateway, path)
    await gateway.until(lambda: not gateway.app.flow.engine.up and gateway.app.flow.queue.waiting == 1)
    return [leaver]


async def sent_again(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    """The engine lost it, was well, and got it once more."""

    async def die(body: dict[str, Any], send: Any, engine: ScriptedEngine) -> None:
        send.__self__.transport.abort()

    engine.answers, engine.default = [die], in_dialect_when_told
    leaver = await ask(gateway, path)
    await engine.until(lambda engine: len(engine.bodies) == 2)
    return [leaver]


async def with_a_large_body(gateway: GatewayUnderTest, engine: ScriptedEngine, path: str) -> list[Leaver]:
    """That comes in many parts, after its head: reading it pauses in between."""
    engine.default = in_dialect_when_told
    body = {**BODIES[path], "metadata": {"large": "x" * 3_000_000}}
    leaver = await Leaver.ask(gateway.url, path, body, "leaver", pause_s=0.05)
    await engine.until(lambda engine: len(engine.bodies) == 1)
    return [leaver]


NOT_AT_THE_ENGINE: tuple[Reach, ...] = (queued, queued_again)
AT_THE_ENGINE: tuple[Reach, ...] = (
    sent_and_no_byte_yet,
    streaming,
    waiting_for_the_whole_answer,
    with_a_large_body,
    sent_again,
)


@every_path
@pytest.mark.parametrize("reach", NOT_AT_THE_ENGINE, ids=lambda reach: reach.__name__)
async def test_who_leaves_the_queue_has_held_nothing(
    start: StartGateway, scripted: ScriptedEngine, reach: Reach, path: str
) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0)
    leaver, *kept = await reach(gateway, scripted, path)
    sent = len(scripted.bodies)
    leaver.leave()
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 0)
    await gateway.until(lambda: outcomes(gateway, path) == {"cancelled": 1})
    assert gateway.app.flow.queue.agents[ID].arrived == 0  # type: ignore[index]
    scripted.healthy = True
    await gateway.until(lambda: gateway.app.flow.engine.up)
    scripted.go.set()
    await gateway.until(gateway.is_empty)
    assert len(scripted.bodies) == sent, "it was not sent any more"
    for client in kept:
        client.leave()


@every_path
@pytest.mark.parametrize("reach", AT_THE_ENGINE, ids=lambda reach: reach.__name__)
async def test_who_leaves_the_engine_pays_for_what_it_held(
    start: StartGateway, scripted: ScriptedEngine, reach: Reach, path: str
) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0)
    (leaver,) = await reach(gateway, scripted, path)
    next_one = asyncio.create_task(gateway.chat("next"))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    scripted.metrics = scripted.metrics.replace("count 100", "count 9000")  # iterations, in which it holds its memory
    await gateway.until(lambda: gateway.app.flow.engine.iterations == 8900)
    predicted = gateway.app.flow.queue.agents[ID].arrived  # type: ignore[index]
    bodies, left = len(scripted.bodies), scripted.left
    scripted.default = in_dialect
    leaver.leave()
    # The engine has been told, and the next task has the slot.
    await gateway.until(lambda: scripted.left == left + 1 and len(scripted.bodies) == bodies + 1)
    assert (await next_one).status_code == 200
    assert outcomes(gateway, path)["cancelled"] == 1
    charged = gateway.app.flow.queue.agents[ID].arrived  # type: ignore[index]
    if reach is streaming:
        assert 0 < charged < predicted, "a few tokens of a short prompt"
    else:
        assert charged == predicted, "it ran for longer than what was predicted of it"
    assert gateway.is_empty()


@every_path
async def test_who_leaves_before_its_request_is_whole_never_was_a_task(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, path: str
) -> None:
    leaver = await Leaver.ask(gateway.url, path, BODIES[path], "leaver", share=0.5)
    leaver.leave()
    await gateway.until(lambda: outcomes(gateway, path) == {"cancelled": 1})
    assert gateway.app.flow.agents.by_id == {}
    assert scripted.bodies == []


async def test_a_thousand_that_leave_at_random_leave_nothing_behind(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    """In all states and dialects, at an engine that dies of some of them; half of them name one of ten agents."""
    rng = random.Random(5)
    gateway = await start(max_in_flight=24, max_engine_waiting=0, max_waiting=2000)
    running: Counter[str] = Counter()

    async def answer(body: dict[str, Any], send: Any, engine: ScriptedEngine) -> None:
        running["now"] += 1
        try:
            await asyncio.sleep(rng.uniform(0, 0.05))
            if rng.random() < 0.03:
                send.__self__.transport.abort()
            elif not body.get("stream"):
                await in_dialect(body, send, engine)
            else:
                await start_answer(send)
                events = events_of(body, send)
                for event in events:
                    await push(send, event, more=event is not events[-1])
                    await asyncio.sleep(rng.uniform(0, 0.02))
        finally:
            running["now"] -= 1

    scripted.default = answer
    server = gateway.running._server
    watching = open_ones(scripted)  # the connections of the watches
    await gateway.chat("first")
    served = len(server.server_state.connections)
    tasks = _tasks()
    whole = 0

    async def one(number: int) -> None:
        nonlocal whole
        await asyncio.sleep(rng.uniform(0, 2))
        path = rng.choice(list(BODIES))
        body = {**BODIES[path], "stream": rng.random() < 0.5}
        share = rng.uniform(0, 1) if rng.random() < 0.1 else 1.0
        agent = f"agent-{number % 10}" if number % 2 else None
        leaver = await Leaver.ask(gateway.url, path, body, agent, share=share)
        try:
            async with asyncio.timeout(rng.choice((0.0, 0.05, 0.5, 2.0)) * rng.random()):
                whole += (await leaver.hear_all()).endswith(b"0\r\n\r\n")
        except TimeoutError:
            pass
        leaver.leave()

    await asyncio.gather(*(one(number) for number in range(1000)))
    await gateway.until(gateway.is_empty)
    await gateway.until(lambda: running["now"] == 0)
    app = gateway.app
    await gateway.until(lambda: open_ones(scripted) <= watching)
    assert len(server.server_state.connections) <= served
    await gateway.until(lambda: not _tasks() - tasks)
    assert app.dispatcher._turns == {}
    assert {agent.record.name for agent in app.flow.agents} <= {"first", *(f"agent-{n}" for n in range(10))}
    assert set(app.flow.queue.agents) == set(app.flow.agents.by_id)
    assert app.flow.agents.awaited == {}
    assert app.flow.queue.peak_tokens == 0
    ended = sum((Counter(outcomes(gateway, path)) for path in BODIES), Counter())
    assert sum(ended.values()) == 1001, ended
    assert ended["cancelled"] > 300
    assert set(ended) <= {"cancelled", "completed", "failed"}
    assert (await gateway.chat("after")).status_code == 200


def open_ones(engine: ScriptedEngine) -> int:
    return sum(not connection.is_closing() for connection in engine.connections)


def _tasks() -> Counter[str]:
    return Counter(task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]


# The KV cache of the real one.


@pytest.mark.engine
@every_path
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting for the whole answer"])
async def test_the_kv_of_who_leaves_is_free(engine: LiveEngine, path: str, stream: bool) -> None:
    engine.lengths({"leaves": 1800})
    fields: dict[str, Any] = {"stream": stream, "vllm_xargs": {"forced_length_key": "leaves"}}
    if path == "/v1/messages":
        fields["max_tokens"] = 1900

    async with real_gateway(engine) as gateway:
        view = gateway.app.flow.engine
        leaver = await ask(gateway, path, **fields)
        if stream:
            await leaver.hear(b"delta")
        await gateway.until(lambda: view.held_tokens > 0 and bool(view.held))
        leaver.leave()
        await gateway.until(lambda: gateway.is_empty() and view.held_tokens == 0 and view.running == 0)
        assert gateway.app.flow.queue.agents[ID].arrived > 0  # type: ignore[index]
        assert outcomes(gateway, path) == {"cancelled": 1}


@pytest.mark.engine
@every_path
async def test_who_waits_in_the_engine_leaves_it(engine: LiveEngine, path: str) -> None:
    """Two others hold 64 of its 127 blocks and more with each token: there is no room for this one, which has been sent."""
    engine.lengths({"waits-and-leaves": 5, "fills": 900})
    fills = {"model": "tiny", "stream": True, "max_tokens": 1000, "vllm_xargs": {"forced_length_key": "fills"}}
    long = "Q" * 2025  # as many tokens
    fields: dict[str, Any] = {"stream": True, "vllm_xargs": {"forced_length_key": "waits-and-leaves"}}
    fields |= {"input": long} if path == "/v1/responses" else {"messages": [{"role": "user", "content": long}]}
    if path == "/v1/messages":
        fields["max_tokens"] = 6

    async with real_gateway(engine, max_engine_waiting=10, beta=10) as gateway:
        view = gateway.app.flow.engine
        fillers = [
            await Leaver.ask(gateway.url, "/v1/completions", {**fills, "prompt": [token] * 1000}, f"fills-{token}")
            for token in (100, 101)
        ]
        for filler in fillers:
            await filler.hear(b"text")
        leaver = await ask(gateway, path, **fields)
        await gateway.until(lambda: view.waiting == 1)
        leaver.leave()
        await gateway.until(lambda: gateway.app.flow.queue.in_flight == 2 and view.waiting == 0)
        assert view.running == 2
        held = gateway.app.flow.queue.agents[ID].arrived  # type: ignore[index]
        assert held == 0, "it waited"
        for filler in fillers:
            filler.leave()
        await gateway.until(lambda: gateway.is_empty() and view.held_tokens == 0)


@asynccontextmanager
async def real_gateway(engine: LiveEngine, **settings: Any) -> AsyncIterator[GatewayUnderTest]:
    engine.wait_ready()
    async with running_gateway(engine=engine.url, link=engine.link_address, **settings) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        yield gateway
