"""What goes through, and how: bodies, streams, usage, headers, errors."""

from __future__ import annotations

import json

import httpx
import pytest

from gateway.flowcontrol.fairqueue import AgentId
from gateway.relay.relay import SMALL_BYTES
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_engine import DONE, ScriptedEngine, chunk, push, start, usage_chunk


async def test_a_body_goes_through_with_our_fields_and_its_own_bytes(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    body = b'{"model": "tiny",  "messages": [ {"role":"user","content":"\\u00e9 1.0e2"} ], "temperature": 1.0e0, "seed": 7}'
    answer = await gateway.client.post("/v1/chat/completions", content=body, headers={"X-Agent-ID": "a1"})
    assert answer.status_code == 200
    sent = scripted.bodies[0]
    assert sent["priority"] > 0
    assert sent["vllm_xargs"]["justitia_agent"] == "default/a1"
    assert sent["vllm_xargs"]["justitia_task"] > 10**18
    for untouched in (b'[ {"role":"user","content":"\\u00e9 1.0e2"} ]', b"1.0e0"):
        assert untouched in scripted.raw[0]


async def test_the_clients_own_xargs_and_stream_options_are_kept(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    await gateway.chat(stream=True, vllm_xargs={"mine": 1}, stream_options={"continuous_usage_stats": False})
    assert scripted.bodies[0]["vllm_xargs"]["mine"] == 1
    assert scripted.bodies[0]["stream_options"] == {"continuous_usage_stats": False, "include_usage": True}


@pytest.mark.parametrize("asked", [True, False])
async def test_usage_of_a_stream_is_shown_only_if_asked_for(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, asked: bool
) -> None:
    fields = {"stream_options": {"include_usage": True}} if asked else {}
    answer = await gateway.chat(stream=True, **fields)
    assert scripted.bodies[0]["stream_options"]["include_usage"] is True
    assert answer.content == chunk("hel") + chunk("lo") + (usage_chunk(10, 4) if asked else b"") + DONE
    assert gateway.app.flow.agents.by_id[next(iter(gateway.app.flow.agents.by_id))].tasks[0].decode_tokens == 4


async def test_a_stream_cut_anywhere_comes_out_whole(gateway: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    whole = chunk("a") + chunk("b") + usage_chunk(3, 2) + DONE

    async def byte_by_byte(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start(send)
        for place in range(0, len(whole), 7):
            await push(send, whole[place : place + 7])
        await push(send, b"", more=False)

    scripted.answers.append(byte_by_byte)
    answer = await gateway.chat(stream=True)
    assert answer.content == chunk("a") + chunk("b") + DONE


def large_answer(size: int) -> bytes:
    """Its usage is in the middle, and its text has what looks like one."""
    said = {"text": 'x "usage": {"prompt_tokens": 9, "completion_tokens": 9} ' + "y" * size}
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 10}}
    return json.dumps({"choices": [said], "usage": usage, "prompt_logprobs": ["z" * size]}).encode()


@pytest.fixture
def no_room(gateway: GatewayUnderTest) -> None:
    """Nothing that is large is gathered."""
    gateway.app.gathered.limit = 0


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("length", [True, False])
async def test_a_large_answer_goes_through_as_it_comes_and_is_charged(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, length: bool
) -> None:
    whole = large_answer(SMALL_BYTES)

    async def in_parts(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        headers = [(b"content-type", b"application/json"), *([(b"content-length", b"%d" % len(whole))] * length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for place in range(0, len(whole), 10_007):
            await push(send, whole[place : place + 10_007])
        await push(send, b"", more=False)

    scripted.answers.append(in_parts)
    answer = await gateway.chat("a1")
    assert answer.content == whole
    assert ("content-length" in answer.headers) == length
    (task,) = gateway.app.flow.agents.by_id[AgentId("default/a1")].tasks
    assert (task.prompt_tokens, task.cached_tokens, task.decode_tokens) == (30, 10, 7)


async def test_a_large_answer_is_gathered_while_there_is_room(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    whole, held = large_answer(SMALL_BYTES), []

    async def in_parts(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start(send, b"application/json")
        for place in range(0, len(whole), 100_000):
            await push(send, whole[place : place + 100_000])
        await gateway.until(lambda: gateway.app.gathered.held > SMALL_BYTES)
        held.append(gateway.app.gathered.held)
        await push(send, b"", more=False)

    scripted.answers.append(in_parts)
    answer = await gateway.chat("a1")
    assert answer.content == whole
    assert answer.headers["content-length"] == str(len(whole)), "it was known when the answer began"
    assert held[0] <= len(whole)
    assert gateway.app.gathered.held == 0


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("told", [True, False])
async def test_a_large_answer_is_charged_though_its_client_leaves_before_its_end(
    gateway: GatewayUnderTest, scripted: ScriptedEngine, told: bool
) -> None:
    whole = large_answer(4 * SMALL_BYTES)
    shown = whole if told else whole.partition(b', "usage"')[0]

    async def all_but_the_end(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(whole))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await push(send, shown[:-10])
        await engine.go.wait()

    scripted.answers.append(all_but_the_end)
    async with gateway.client.stream(
        "POST", "/v1/chat/completions", json={"messages": []}, headers={"X-Agent-ID": "a1"}
    ) as answer:
        async for _ in answer.aiter_bytes():
            if answer.num_bytes_downloaded > SMALL_BYTES:
                break
    await gateway.until(gateway.is_empty)
    agent = gateway.app.flow.queue.agents[AgentId("default/a1")]
    await gateway.app.journal.flush()
    (row,) = await gateway.app.journal.store.usage(0, 2**40)
    assert row.kv_cost == pytest.approx(agent.arrived)
    assert row.kv_cost > 100
    assert (row.prompt_tokens, row.completion_tokens) == ((30, 7) if told else (1, 0))


@pytest.mark.usefixtures("no_room")
async def test_a_large_answer_that_breaks_off_breaks_off_for_the_client_too(
    gateway: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    async def break_off(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start(send, b"application/json")
        await push(send, large_answer(SMALL_BYTES)[: 2 * SMALL_BYTES])
        send.__self__.transport.close()

    scripted.answers.append(break_off)
    with pytest.raises(httpx.RemoteProtocolError):
        await gateway.chat("a1")
    await gateway.until(gateway.is_empty)
    assert len(scripted.bodies) == 1, "it is not asked again for what has been given already"


async def test_headers_tell_the_agent_and_its_place(gateway: GatewayUnderTest) -> None:
    answer = await gateway.chat("run-17")
    assert answer.headers["x-agent-id"] == "run-17"
    assert answer.headers["x-agent-source"] == "x-agent-id"
    assert float(answer.headers["x-justitia-queue-ms"]) >= 0
    assert int(answer.headers["x-justitia-predicted-cost"]) > 0
    assert int(answer.headers["x-justitia-finish-tag"]) > 0


async def test_a_request_without_an_id_is_an_agent_of_its_own(gateway: GatewayUnderTest) -> None:
    first, second = await gateway.chat(None), await gateway.chat(None)
    assert first.headers["x-agent-source"] == "none"
    assert first.headers["x-agent-id"] != second.headers["x-agent-id"]
    assert (await gateway.client.get("/v1/agents")).json()["data"] == [], "and has ended with its only task"


async def test_the_engines_own_errors_pass_through(gateway: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    async def refuse(body, send, engine) -> None:  # type: ignore[no-untyped-def]
        await start(send, b"application/json", status=404)
        await push(send, b'{"error": {"message": "no such model"}}', more=False)

    scripted.answers.append(refuse)
    answer = await gateway.chat()
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no such model"
    assert gateway.is_empty()
    assert gateway.app.flow.queue.agents["default/a"].arrived == 0, "a task that was refused costs nothing"


async def test_models_are_the_engines(gateway: GatewayUnderTest) -> None:
    assert (await gateway.client.get("/v1/models")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("content", "headers", "status", "param"),
    [
        (b"{", {}, 400, None),
        (b"[1]", {}, 400, None),
        (b"\xff\xfe", {}, 400, None),
        (b'{"stream": "yes"}', {}, 400, "stream"),
        (b'{"n": 0}', {}, 400, "n"),
        (b'{"n": 99999}', {}, 400, "n"),
        (b'{"vllm_xargs": 3}', {}, 400, "vllm_xargs"),
        (b'{"max_tokens": -4}', {}, 400, "max_tokens"),
        (b'{"agent_id": 5}', {}, 400, "agent_id"),
        (b"{}", {"X-Agent-Weight": "-1"}, 400, "x-agent-weight"),
        (b"{}", {"X-Agent-ID": "x" * 256}, 400, "x-agent-id"),
        (b"{}", {"X-Agent-ID": ""}, 400, "x-agent-id"),
        (b"{}", {"X-Agent-Class": "two words"}, 400, "x-agent-class"),
        (b"{}", {"X-Agent-Final": "perhaps"}, 400, "x-agent-final"),
        (b" " * 2_000_000, {}, 413, None),
    ],
)
async def test_bad_input_gets_a_clear_error_in_openais_shape(
    start: StartGateway,
    scripted: ScriptedEngine,
    content: bytes,
    headers: dict[str, str],
    status: int,
    param: str | None,
) -> None:
    gateway = await start(max_body_mib=1)
    answer = await gateway.client.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert scripted.bodies == []
    assert gateway.is_empty()


async def test_a_body_without_a_length_is_limited_too(start: StartGateway) -> None:
    gateway = await start(max_body_mib=1)

    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(100):
            yield b" " * 65536

    answer = await gateway.client.post("/v1/chat/completions", content=endless())
    assert answer.status_code == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)])
async def test_unknown_paths_are_answered_in_openais_shape(
    gateway: GatewayUnderTest, method: str, path: str, status: int
) -> None:
    answer = await gateway.client.request(method, path)
    assert answer.status_code == status
    assert "message" in answer.json()["error"]


async def test_sizes_of_a_batch_are_charged_by_sequence(gateway: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    body = {"model": "tiny", "prompt": ["one", "two"], "n": 2, "max_tokens": 5}
    await gateway.client.post("/v1/completions", json=body, headers={"X-Agent-ID": "a"})
    task = gateway.app.flow.agents.by_id["default/a"].tasks[0]
    assert (task.prompts, task.sequences) == (2, 4)
    assert task.cost == 4 * (5 * 1 + 1)  # usage: 10 prompt tokens over 2 prompts, 4 decoded over 4 sequences


async def test_many_connections_at_once(gateway: GatewayUnderTest) -> None:
    limits = httpx.Limits(max_connections=300)
    async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=60) as client:
        import asyncio

        async def one(number: int) -> int:
            body = {"model": "tiny", "messages": [], "stream": number % 2 == 0}
            return (
                await client.post("/v1/chat/completions", json=body, headers={"X-Agent-ID": f"a{number}"})
            ).status_code

        assert set(await asyncio.gather(*(one(number) for number in range(300)))) == {200}
    await gateway.until(gateway.is_empty)


async def test_agents_are_listed_in_the_order_of_their_turn(start: StartGateway, scripted: ScriptedEngine) -> None:
    import asyncio

    from tests.wire.scripted_engine import wait_for_word

    gateway = await start(max_in_flight=1, max_engine_waiting=0)
    scripted.default = wait_for_word
    requests = [asyncio.create_task(gateway.chat("first"))]
    await scripted.until(lambda engine: len(engine.bodies) == 1)
    for agent, length in (("large", 5000), ("small", 5)):
        requests.append(asyncio.create_task(gateway.chat(agent, messages=[{"role": "user", "content": "x" * length}])))
    await gateway.until(lambda: gateway.app.flow.queue.waiting == 2)
    listed = (await gateway.client.get("/v1/agents")).json()
    assert [(agent["id"], agent["state"], agent["position"]) for agent in listed["data"]] == [
        ("small", "waiting", 0),
        ("large", "waiting", 1),
        ("first", "running", None),
    ]
    scripted.go.set()
    assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200, 200, 200]
    assert [json.loads(raw)["vllm_xargs"]["justitia_agent"] for raw in scripted.raw] == [
        "default/first",
        "default/small",
        "default/large",
    ]
