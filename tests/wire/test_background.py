"""A response that the engine makes in the background is ended with its agent, and holds its turn until then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.wire.conftest import GatewayUnderTest, running_gateway
from tests.wire.scripted_engine import ScriptedEngine, push
from tests.wire.scripted_engine import start as start_answer


@dataclass
class ResponsesEngine(ScriptedEngine):
    """Keeps responses as vLLM does: one in the background goes on until it is cancelled."""

    states: dict[str, str] = field(default_factory=dict)  # of responses, by id
    cancels: list[str] = field(default_factory=list)  # the paths that were asked for

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if not path.startswith("/v1/responses"):
            await super().__call__(scope, receive, send)
            return
        data = b""
        while scope["method"] == "POST" and (message := await receive()):
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        if path == "/v1/responses":
            response = json.loads(data)["request_id"]
            self.states[response] = "queued"
        else:
            response = path.split("/")[3]
        async with self.arrived:
            if path.endswith("/cancel"):
                self.cancels.append(path)
                self.states[response] = "cancelled"
            self.arrived.notify_all()
        await start_answer(send, b"application/json")
        await push(send, json.dumps({"id": response, "status": self.states[response]}).encode(), more=False)


@pytest.fixture
async def engine() -> AsyncIterator[ResponsesEngine]:
    made = ResponsesEngine()
    async with made.serving():
        yield made


@pytest.fixture
async def gateway(engine: ResponsesEngine) -> AsyncIterator[GatewayUnderTest]:
    async with running_gateway(engine=engine.url) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        yield gateway


async def begin(gateway: GatewayUnderTest) -> str:
    body = {"model": "tiny", "input": "x", "background": True}
    answer = await gateway.client.post("/v1/responses", json=body, headers={"X-Agent-ID": "a"})
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    response: str = answer.json()["id"]
    return response


async def test_an_agent_that_is_ended_ends_its_responses_in_the_background(
    gateway: GatewayUnderTest, engine: ResponsesEngine
) -> None:
    responses = [await begin(gateway) for _ in range(2)]
    assert gateway.app.flow.queue.in_flight == 2
    answer = await gateway.client.delete("/v1/agents/a")
    assert (answer.status_code, answer.json()["tasks_cancelled"]) == (200, 2)
    assert sorted(engine.cancels) == sorted(f"/v1/responses/{response}/cancel" for response in responses)
    assert gateway.is_empty()
    assert (await gateway.client.get("/v1/agents/a")).status_code == 404


async def test_one_that_goes_on_is_not_cancelled_and_holds_its_turn(
    gateway: GatewayUnderTest, engine: ResponsesEngine
) -> None:
    """The control."""
    response = await begin(gateway)
    other = asyncio.create_task(gateway.chat("b"))
    assert (await other).status_code == 200
    assert (gateway.app.flow.queue.in_flight, engine.cancels) == (1, [])
    engine.states[response] = "completed"
    await gateway.until(gateway.is_empty)
    assert engine.cancels == []
