"""The client that leaves, the engine that dies, the queue that is full: nothing is lost, and the error is clear."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from gateway.relay.engine_client import EngineClient, Health
from tests.wire.conftest import GatewayUnderTest, StartGateway, running_gateway
from tests.wire.scripted_engine import ScriptedEngine, chunk, push, wait_for_word
from tests.wire.scripted_engine import start as start_answer


async def stream_then_wait(body, send, engine) -> None:  # type: ignore[no-untyped-def]
    await start_answer(send)
    await push(send, chunk("first"))
    await engine.go.wait()


async def stream_then_break(body, send, engine) -> None:  # type: ignore[no-untyped-def]
    """Ends the connection in the middle of the answer."""
    await start_answer(send)
    await push(send, chunk("first"))
    await engine.go.wait()
    send.__self__.transport.abort()  # uvicorn's request cycle: the connection is gone, as when a process is killed


async def break_at_once(body, send, engine) -> None:  # type: ignore[no-untyped-def]
    send.__self__.transport.abort()


def outcomes(gateway: GatewayUnderTest) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in gateway.app.metrics.registry.collect()
        if family.name == "justitia_requests"
        for sample in family.samples
        if sample.name == "justitia_requests_total"
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_byte_frees_the_engine(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, stream: bool
) -> None:
    scripted.default = wait_for_word
    request = asyncio.create_task(gateway.chat(stream=stream))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    request.cancel()
    await scripted.until(lambda engine: engine.left == 1)
    await gateway.until(gateway.is_empty)
    assert outcomes(gateway) == {"cancelled": 1}


async def test_a_client_that_leaves_mid_stream_frees_the_engine_and_is_charged_what_it_held(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    scripted.default = stream_then_wait
    async with gateway.client.stream(
        "POST", "/v1/chat/completions", json={"stream": True, "messages": []}, headers={"X-Agent-ID": "a"}
    ) as answer:
        async for _ in answer.aiter_bytes():
            break
    await scripted.until(lambda engine: engine.left == 1)
    await gateway.until(gateway.is_empty)
    agent = gateway.app.flow.queue.agents["default/a"]
    assert 0 < agent.arrived < 100, "one token of a prompt of a few bytes"
    assert outcomes(gateway) == {"cancelled": 1}


async def test_a_client_that_leaves_the_queue_is_gone_from_it_and_refunded(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0)
    scripted.default = wait_for_word
    first = asyncio.create_task(gateway.chat("first"))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    second = asyncio.create_task(gateway.chat("second"))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    second.cancel()
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 0)
    assert gateway.app.flow.queue.agents["default/second"].arrived == 0
    scripted.go.set()
    assert (await first).status_code == 200
    assert len(scripted.bodies) == 1, "it never reached the engine"


async def test_a_full_queue_answers_429_with_retry_after(start: StartGateway, scripted: ScriptedEngine) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0, max_waiting=1)
    scripted.default = wait_for_word
    kept = [asyncio.create_task(gateway.chat("a"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    kept.append(asyncio.create_task(gateway.chat("b")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    answer = await gateway.chat("c")
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert "default/c" not in gateway.app.flow.agents.by_id
    scripted.go.set()
    assert [kept_answer.status_code for kept_answer in await asyncio.gather(*kept)] == [200, 200]


async def test_a_task_that_waits_too_long_is_answered_504(start: StartGateway, scripted: ScriptedEngine) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0, max_queue_s=0.2)
    scripted.default = wait_for_word
    first = asyncio.create_task(gateway.chat("first"))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    answer = await gateway.chat("second")
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "waited_too_long"
    assert gateway.app.flow.queue.waiting == 0
    scripted.go.set()
    assert (await first).status_code == 200


async def test_a_refused_final_task_does_not_end_its_agent(start: StartGateway, scripted: ScriptedEngine) -> None:
    gateway = await start(max_in_flight=1, max_waiting=1)
    scripted.default = wait_for_word
    kept = [asyncio.create_task(gateway.chat("a"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    kept.append(asyncio.create_task(gateway.chat("b")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    final = {"X-Agent-Final": "true"}
    assert (await gateway.chat("a", headers=final)).status_code == 429
    scripted.go.set()
    await asyncio.gather(*kept)
    assert "default/a" in gateway.app.flow.agents.by_id
    assert (await gateway.chat("a", headers=final)).status_code == 200
    assert "default/a" not in gateway.app.flow.agents.by_id


async def test_slots_are_those_that_the_settings_say(start: StartGateway, scripted: ScriptedEngine) -> None:
    gateway = await start(max_in_flight=2)
    scripted.default = wait_for_word
    requests = [asyncio.create_task(gateway.chat(f"a{number}")) for number in range(9)]
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 7)
    assert gateway.app.flow.queue.in_flight == 2
    scripted.go.set()
    assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}


async def test_an_engine_that_tells_nothing_of_itself_serves_a_few_at_once() -> None:
    silent = ScriptedEngine(default=wait_for_word, metrics="<html>not vLLM</html>")
    async with silent.serving() as engine, running_gateway(engine=engine.url) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up)
        requests = [asyncio.create_task(gateway.chat(f"a{number}")) for number in range(12)]
        await gateway.until(lambda: gateway.app.flow.queue.waiting == 4)
        assert gateway.app.flow.queue.in_flight == 8
        engine.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
        assert (await gateway.client.get("/health")).json()["capacity_tokens"] == 0


async def test_odd_metrics_once_do_not_stop_the_clock(gateway: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    good, scripted.metrics = scripted.metrics, "<html>502 Bad Gateway</html>"
    polls = scripted.polls
    await gateway.until(lambda: scripted.polls >= polls + 2)
    scripted.metrics = good.replace("count 100", "count 5000")
    await gateway.until(lambda: gateway.app.flow.engine.iterations == 4900)


async def test_a_task_broken_off_is_charged_what_it_held_and_not_learned(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    """Usage in every chunk, as some ask for it, does not make a cancelled task a finished one."""

    async def usage_in_every_chunk(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send)
        await push(send, b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":10,"completion_tokens":4}}\n\n')
        await engine.go.wait()

    scripted.default = usage_in_every_chunk
    body = {"stream": True, "messages": [], "n": 2}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers={"X-Agent-ID": "a"}) as answer:
        async for _ in answer.aiter_bytes():
            break
    await gateway.until(gateway.is_empty)
    record = gateway.app.flow.agents.by_id["default/a"]  # type: ignore[index]
    assert (record.tasks, record.record.whole) == ((), False)
    assert gateway.app.flow.queue.agents["default/a"].arrived == 2 * (10 * 2 + 3)  # type: ignore[index]


async def test_a_whole_answer_that_is_cancelled_costs_the_iterations_it_ran(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    scripted.default = wait_for_word
    request = asyncio.create_task(gateway.chat("a", max_tokens=10))
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    predicted = gateway.app.flow.queue.agents["default/a"].arrived  # type: ignore[index]
    scripted.metrics = scripted.metrics.replace("count 100", "count 9000")
    await gateway.until(lambda: gateway.app.flow.engine.iterations == 8900)
    request.cancel()
    await gateway.until(gateway.is_empty)
    assert gateway.app.flow.queue.agents["default/a"].arrived == predicted  # type: ignore[index]


@pytest.mark.parametrize("usage", [b'{"prompt_tokens": 5, "completion_tokens": -1}', b'{"prompt_tokens": "x"}', b"[]"])
async def test_odd_usage_does_not_keep_the_turn(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, usage: bytes
) -> None:
    async def odd(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send, b"application/json")
        await push(send, b'{"choices": [], "usage": ' + usage + b"}", more=False)

    scripted.default = odd
    assert (await gateway.chat()).status_code == 200
    assert gateway.is_empty()


async def test_one_late_health_answer_is_not_the_end(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([Health.UNSURE, Health.UNSURE, Health.UP, Health.UNSURE, Health.UNSURE, Health.UNSURE, Health.DOWN])
    seen: list[bool] = []

    async def health(self) -> Health:  # type: ignore[no-untyped-def]
        seen.append(gateway.app.flow.engine.up)
        gateway.app.dispatcher.engine_in_doubt.set()  # no waiting between checks
        gateway.app.dispatcher.engine_in_doubt.clear()
        return next(answers, Health.DOWN)

    monkeypatch.setattr(EngineClient, "health", health)
    await gateway.until(lambda: not gateway.app.flow.engine.up)
    assert seen == [True] * 6


async def test_no_engine_is_answered_503_with_retry_after() -> None:
    async with running_gateway(engine="unix:/tmp/no-engine-is-here.sock") as gateway:
        answer = await gateway.chat()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_engine"
        assert int(answer.headers["retry-after"]) > 0
        assert (await gateway.client.get("/ready")).status_code == 503
        assert (await gateway.client.get("/health")).status_code == 200
        assert (await gateway.client.get("/v1/models")).status_code == 503


async def test_a_task_that_the_engine_lost_before_its_answer_is_sent_again_once_with_its_tag(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    scripted.answers = [break_at_once]
    answer = await gateway.chat()
    assert answer.status_code == 200
    assert len(scripted.bodies) == 2
    assert scripted.bodies[0]["priority"] == scripted.bodies[1]["priority"]
    assert scripted.bodies[0]["vllm_xargs"] == scripted.bodies[1]["vllm_xargs"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_task_that_the_engine_loses_twice_is_answered_502(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, stream: bool
) -> None:
    scripted.answers = [break_at_once, break_at_once]
    answer = await gateway.chat(stream=stream)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_lost"
    assert gateway.is_empty()


async def test_a_stream_that_breaks_ends_with_an_error_event_and_done(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    scripted.answers = [stream_then_break]
    scripted.go.set()
    answer = await gateway.chat(stream=True)
    events = answer.content.split(b"\n\n")
    assert events[0] + b"\n\n" == chunk("first")
    assert b'"code":"engine_lost"' in events[1]
    assert events[2] == b"data: [DONE]"
    assert gateway.is_empty()
    assert outcomes(gateway) == {"failed": 1}


async def test_tasks_wait_while_the_engine_is_away_and_are_served_when_it_is_back() -> None:
    async with ScriptedEngine(default=wait_for_word).serving() as engine:
        port = int(engine.url.rpartition(":")[2])
        async with running_gateway(engine=engine.url, max_in_flight=1, max_engine_waiting=0) as gateway:
            await gateway.until(lambda: gateway.app.flow.engine.up)
            requests = [asyncio.create_task(gateway.chat(f"a{number}")) for number in range(3)]
            await engine.until(lambda engine: len(engine.bodies) == 1)
            await gateway.until(lambda: gateway.app.flow.queue.waiting == 2)
            engine.healthy = False
            engine.default = break_at_once
            await gateway.until(lambda: not gateway.app.flow.engine.up)
            assert (await gateway.chat("new")).status_code == 503
            engine.go.set()  # the first is answered all the same; the others must not be released
            assert (await requests[0]).status_code == 200
            assert gateway.app.flow.queue.waiting == 2
            engine.default = wait_for_word
            engine.healthy = True
            assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 3
    assert port


async def test_a_gateway_that_stops_serves_what_it_has_accepted_and_takes_nothing_new(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0, drain_s=20)
    scripted.default = wait_for_word
    accepted = [asyncio.create_task(gateway.chat("first"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    accepted.append(asyncio.create_task(gateway.chat("second")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    stopping = asyncio.create_task(gateway.running.stop())
    await asyncio.sleep(0)
    refused = await gateway.chat("third")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert 5 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["connection"] == "close"
    assert (await gateway.client.get("/ready")).status_code == 503
    health = await gateway.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert not stopping.done()
    scripted.go.set()
    assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200, 200]
    await stopping
    with pytest.raises(httpx.ConnectError):
        await gateway.client.get("/health")


async def test_what_still_waits_at_the_end_of_the_drain_is_handed_back(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    gateway = await start(max_in_flight=1, max_engine_waiting=0, drain_s=0.1)
    scripted.default = wait_for_word
    requests = [asyncio.create_task(gateway.chat("first"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    requests.append(asyncio.create_task(gateway.chat("second")))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 1)
    async with asyncio.timeout(10):
        await gateway.running.stop()
    for answer in await asyncio.gather(*requests):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert int(answer.headers["retry-after"]) > 0
    assert len(scripted.bodies) == 1


async def test_what_is_in_flight_is_cut_off_after_its_time(start: StartGateway, scripted: ScriptedEngine) -> None:
    gateway = await start(drain_s=0.1)
    scripted.default = wait_for_word
    in_flight = asyncio.create_task(gateway.chat())
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    async with asyncio.timeout(10):
        await gateway.running.stop()
    answer = await in_flight
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"


async def test_a_body_that_is_still_being_sent_when_the_gateway_ends_is_answered(start: StartGateway) -> None:
    gateway = await start(drain_s=20)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    async with asyncio.timeout(10):
        await gateway.running.stop()
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"shutting_down"' in answer
    writer.close()
