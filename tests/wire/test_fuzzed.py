"""What fuzzing has found, each as small as it can be. The fuzzers themselves: tests/fuzz."""

from __future__ import annotations

import pytest

from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_engine import ScriptedEngine, chunk, push
from tests.wire.scripted_engine import start as start_answer


async def test_a_background_that_its_endpoint_does_not_know_keeps_no_turn(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    """Nobody could ever have fetched such an answer, and its slot was never given back."""

    async def stream_then_wait(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start_answer(send)
        await push(send, chunk("first"))
        await engine.go.wait()

    scripted.default = stream_then_wait
    body = {"stream": True, "background": True, "messages": []}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            break
    await scripted.until(lambda engine: engine.left == 1)
    await gateway.until(gateway.is_empty)


async def test_a_path_that_looks_like_our_pattern_is_nobodys_response(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    assert (await gateway.client.get("/v1/responses/%7Bid%7D")).status_code == 404


@pytest.mark.parametrize(("path", "methods"), [("/v1/agents/a", "DELETE, GET"), ("/v1/messages", "POST")])
async def test_a_wrong_method_is_told_the_right_ones(gateway: GatewayUnderTest, path: str, methods: str) -> None:
    answer = await gateway.client.put(path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == methods


@pytest.mark.parametrize("body", [b'{"prompt":[' + b'"",' * 10**6 + b'""]}', b"[" * 10**7, b'{"a":' * 10**6])
async def test_absurd_bodies_are_refused_at_once(start: StartGateway, body: bytes) -> None:
    gateway = await start(max_body_mib=16)
    answer = await gateway.client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
