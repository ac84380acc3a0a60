"""Coding agents as they are: a session is one agent, with all of its sub-agents, whichever client it is of."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.clients.recordings import CODING_AGENTS, PARTS, ROOT, CodingAgent, Request
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_dialects import in_dialect, in_dialect_when_told
from tests.wire.scripted_engine import ScriptedEngine

every_client = pytest.mark.parametrize("client", CODING_AGENTS, ids=lambda client: client.name)


async def send(gateway: GatewayUnderTest, request: Request, **headers: str) -> httpx.Response:
    answer = await gateway.client.post(request.path, json=request.body, headers={**request.headers, **headers})
    assert answer.status_code == 200, answer.text
    return answer


async def agents(gateway: GatewayUnderTest) -> dict[str, int]:
    """Tasks that have ended, by agent."""
    listed = (await gateway.client.get("/v1/agents")).json()["data"]
    return {agent["id"]: agent["tasks"]["ended"] for agent in listed}


def released(engine: ScriptedEngine) -> list[str]:
    return [body["vllm_xargs"]["justitia_agent"].removeprefix("default/") for body in engine.bodies]


@every_client
async def test_a_session_is_one_agent_with_all_its_sub_agents(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, client: CodingAgent
) -> None:
    scripted.default = in_dialect
    requests = client.record("session-1")
    assert len(requests) == 8
    assert {request.part for request in requests} == {ROOT, *PARTS}
    answers = [await send(gateway, request) for request in requests]
    assert {answer.headers["x-agent-source"] for answer in answers} == {client.source}
    (agent,) = {answer.headers["x-agent-id"] for answer in answers}
    assert await agents(gateway) == {agent: 8}
    assert released(scripted) == [agent] * 8


@every_client
async def test_what_it_says_reaches_the_engine_as_it_was_said(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, client: CodingAgent
) -> None:
    scripted.default = in_dialect
    for request in client.record("session-1"):
        await send(gateway, request)
        arrived = dict(scripted.bodies[-1])
        for ours in ("priority", "vllm_xargs", "request_id"):
            arrived.pop(ours, None)
        if request.path == "/v1/chat/completions":
            assert arrived.pop("stream_options") == {"include_usage": True}
        sent = {name: value for name, value in request.body.items() if name != "stream_options"}
        assert arrived == sent


@every_client
async def test_two_sessions_are_two_agents(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, client: CodingAgent
) -> None:
    scripted.default = in_dialect
    mixed = zip(client.record("session-1"), client.record("session-2"), strict=True)
    await asyncio.gather(*(send(gateway, request) for pair in mixed for request in pair))
    assert sorted((await agents(gateway)).values()) == [8, 8]


@every_client
async def test_what_a_sub_agent_sends_first_is_its_roots_already(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, client: CodingAgent
) -> None:
    """Requests that are sent at once arrive in any order."""
    scripted.default = in_dialect
    requests = client.record("session-1")
    subs_first = sorted(requests, key=lambda request: request.part == ROOT)
    assert subs_first[0].part == "outer"
    for request in subs_first:
        await send(gateway, request)
    assert list((await agents(gateway)).values()) == [8]


@pytest.mark.parametrize(
    "client", [one for one in CODING_AGENTS if one.source != "metadata.user_id"], ids=lambda client: client.name
)
async def test_the_end_of_a_sub_agent_is_not_the_end_of_its_root(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, client: CodingAgent
) -> None:
    scripted.default = in_dialect
    *requests, last = client.record("session-1")
    for request in requests:
        final = {"X-Agent-Final": "true"} if request.part != ROOT else {}
        await send(gateway, request, **final)
    assert list((await agents(gateway)).values()) == [7]
    await send(gateway, last, **{"X-Agent-Final": "true"})
    assert await agents(gateway) == {}


@every_client
async def test_a_session_has_one_share(start: StartGateway, scripted: ScriptedEngine, client: CodingAgent) -> None:
    """A session's eight requests wait, or are in flight; another session's three come, which is less work. They are not
    three among eleven: they go first."""
    order = await _order_of_release(await start(max_in_flight=1, max_engine_waiting=0), scripted, client, named=True)
    long, short = order[0], order[1]
    assert order == [long] + [short] * 3 + [long] * 7


async def test_without_sessions_eight_requests_would_have_eight_shares(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    """The control: the same load, and nobody says whose it is."""
    client = CODING_AGENTS[-1]
    order = await _order_of_release(await start(max_in_flight=1, max_engine_waiting=0), scripted, client, named=False)
    assert len(set(order)) == 11
    assert _place_of_short(scripted) != [1, 2, 3]


async def _order_of_release(
    gateway: GatewayUnderTest, engine: ScriptedEngine, client: CodingAgent, *, named: bool
) -> list[str]:
    engine.default = in_dialect_when_told
    requests = [*client.record("session-long"), *client.record("session-short")[:3]]
    sending = []
    for number, request in enumerate(requests):
        if not named:
            request = Request(request.part, request.path, {}, request.body)
        if number >= 8:
            request.body["top_p"] = 0.5  # to be known by at the engine
        sending.append(asyncio.create_task(send(gateway, request)))
        await gateway.until(lambda so_far=number: gateway.app.flow.queue.waiting == so_far, *sending)  # type: ignore[misc]
    assert gateway.app.flow.queue.in_flight == 1
    engine.go.set()
    await asyncio.gather(*sending)
    return released(engine)


def _place_of_short(engine: ScriptedEngine) -> list[int]:
    return [place for place, body in enumerate(engine.bodies) if "top_p" in body]
