"""Agents as their owners see them: nobody sees another tenant's, and an agent that is ended lets go of all that it has."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.config.settings import TenantSettings
from gateway.flowcontrol.fairqueue import AgentId
from gateway.supervise import KEYS_S
from gateway.tenancy.keys import Keys, KeysError, add_key, revoke_key
from tests.wire.conftest import GatewayUnderTest, StartGateway
from tests.wire.scripted_engine import ScriptedEngine, chunk, push, wait_for_word
from tests.wire.scripted_engine import start as start_answer


async def stream_without_end(body, send, engine) -> None:  # type: ignore[no-untyped-def]
    await start_answer(send)
    await push(send, chunk("first"))
    await engine.go.wait()


@pytest.fixture
async def busy(start: StartGateway, scripted: ScriptedEngine) -> GatewayUnderTest:
    """One slot at the engine, which answers when it is told to."""
    scripted.default = wait_for_word
    return await start(max_in_flight=1, max_engine_waiting=0)


async def in_the_queue(gateway: GatewayUnderTest, scripted: ScriptedEngine, *agents: str) -> list[asyncio.Task]:  # type: ignore[type-arg]
    """A task each: the first at the engine, the others waiting."""
    tasks = []
    for place, agent in enumerate(agents):
        tasks.append(asyncio.create_task(gateway.chat(agent)))
        if place:
            await gateway.until(lambda place=place: gateway.app.flow.queue.waiting == place)
        else:
            await scripted.until(lambda engine: len(engine.bodies) == 1)
    return tasks


async def test_one_agent_can_be_read(busy: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    tasks = await in_the_queue(busy, scripted, "a", "b/with?odd#signs")
    listed = (await busy.client.get("/v1/agents")).json()["data"]
    views = [(await busy.client.get(f"/v1/agents/{path}")).json() for path in ("b/with%3Fodd%23signs", "a")]
    assert views == listed
    waits, runs = views
    assert (waits["id"], waits["state"], waits["position"]) == ("b/with?odd#signs", "waiting", 0)
    assert (runs["id"], runs["state"], runs["position"]) == ("a", "running", None)
    assert waits["tasks"] == {"arrived": 1, "waiting": 1, "in_flight": 0, "ended": 0}
    assert waits["estimated_finish_s"] is None, "the engine has not done anything yet"
    assert waits["predicted_cost"] > 0 and waits["finish_tag"] >= waits["backlog_tag"]
    for path in ("nobody", "default/nobody", "", "b"):
        answer = await busy.client.get(f"/v1/agents/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    scripted.go.set()
    await asyncio.gather(*tasks)


async def test_when_agents_should_be_done(busy: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    """The engine does 50 iterations whenever we look, with half of its cache held."""
    tasks = await in_the_queue(busy, scripted, "a", "b")
    begin = scripted.metrics.replace("perc 0\n", "perc 0.5\n")
    iterations = 100
    async with asyncio.timeout(20):
        while busy.app.flow.engine.rate.per_s() is None:
            iterations += 50
            scripted.metrics = begin.replace("count 100\n", f"count {iterations}\n")
            await asyncio.sleep(0.1)
    waits, runs = (await busy.client.get("/v1/agents")).json()["data"]
    rate = busy.app.flow.engine.rate.per_s()
    assert rate is not None
    predicted = {agent.id: agent.predicted for agent in busy.app.flow.queue.agents.values()}
    assert runs["estimated_finish_s"] == pytest.approx(predicted[AgentId("default/a")] / rate, rel=0.2)
    assert waits["estimated_finish_s"] == pytest.approx(sum(predicted.values()) / rate, rel=0.2)
    scripted.go.set()
    await asyncio.gather(*tasks)


async def test_an_agent_that_is_ended_lets_go_of_the_queue_and_the_engine(
    busy: GatewayUnderTest, scripted: ScriptedEngine
) -> None:
    in_flight, waiting, other = await in_the_queue(busy, scripted, "a", "a", "b")
    answer = await busy.client.delete("/v1/agents/a")
    assert answer.status_code == 200
    assert answer.json() == {"object": "agent.deleted", "id": "a", "deleted": True, "tasks_cancelled": 2}
    assert (await busy.client.get("/v1/agents/a")).status_code == 404
    await scripted.until(lambda engine: engine.left == 1)
    for task in (in_flight, waiting):
        ended = await task
        assert (ended.status_code, ended.json()["error"]["code"]) == (410, "agent_cancelled")
        assert "retry-after" not in ended.headers
    await scripted.until(lambda engine: len(engine.bodies) == 2)
    scripted.go.set()
    assert (await other).status_code == 200
    assert len(scripted.bodies) == 2, "what waited never got there"
    load = busy.app.flow.quotas.load
    assert (load.waiting, load.in_flight, load.waiting_bytes) == (0, 0, 0)
    assert (await busy.chat("a")).status_code == 200, "a new agent"
    assert busy.app.flow.agents.by_id[AgentId("default/a")].arrived == 1


async def test_a_stream_that_is_ended_says_so_and_what_it_held_is_charged(
    start: StartGateway, scripted: ScriptedEngine
) -> None:
    gateway = await start()
    scripted.default = stream_without_end
    body = {"stream": True, "messages": []}
    seen = b""
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers={"X-Agent-ID": "a"}) as answer:
        async for data in answer.aiter_bytes():
            if not seen:
                agent = gateway.app.flow.queue.agents[AgentId("default/a")]
                assert (await gateway.client.delete("/v1/agents/a")).status_code == 200
            seen += data
    assert seen.startswith(chunk("first"))
    assert b'"code":"agent_cancelled"' in seen
    assert seen.endswith(b"data: [DONE]\n\n")
    await scripted.until(lambda engine: engine.left == 1)
    assert 0 < agent.arrived < 100, "one token of a prompt of a few bytes"
    assert gateway.is_empty()
    scripted.go.set()


async def test_an_agent_that_waits_for_its_tool_can_be_ended(gateway: GatewayUnderTest) -> None:
    assert (await gateway.chat("a")).status_code == 200
    answer = await gateway.client.delete("/v1/agents/a")
    assert answer.json()["deleted"] is True and answer.json()["tasks_cancelled"] == 0
    assert AgentId("default/a") not in gateway.app.flow.agents.by_id
    assert AgentId("default/a") not in gateway.app.flow.queue.agents
    await gateway.app.journal.flush()
    assert (await gateway.client.delete("/v1/agents/a")).status_code == 404


async def test_two_who_end_the_same_agent_do_it_once(busy: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    (task,) = await in_the_queue(busy, scripted, "a")
    answers = await asyncio.gather(*(busy.client.delete("/v1/agents/a") for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {200, 404}
    assert answers[0].status_code == 200
    assert (await task).status_code == 410
    assert busy.is_empty()


async def test_sdks_do_not_begin_an_ended_agent_again(busy: GatewayUnderTest, scripted: ScriptedEngine) -> None:
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(
        base_url=f"{busy.url}/v1", api_key="none", max_retries=3, default_headers={"X-Agent-ID": "a"}
    ) as client:
        request = asyncio.create_task(
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
        )
        await scripted.until(lambda engine: len(engine.bodies) == 1)
        await busy.client.delete("/v1/agents/a")
        with pytest.raises(openai.APIStatusError) as error:
            await request
    assert error.value.status_code == 410
    assert len(scripted.bodies) == 1
    assert AgentId("default/a") not in busy.app.flow.agents.by_id


# Tenants


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Keys of three tenants, in `keys.json`."""
    return {name: add_key(tmp_path / "keys.json", name, "", datetime.now(UTC))[1] for name in ("red", "blue", "boss")}


@pytest.fixture
async def keyed(start: StartGateway, tmp_path: Path, secrets: dict[str, str]) -> GatewayUnderTest:
    """Red and blue have an agent `a` each, which waits for its tool."""
    gateway = await start(keys=tmp_path / "keys.json", tenants={"boss": TenantSettings(admin=True)})
    for tenant in ("red", "blue"):
        assert (await gateway.chat("a", headers=bearer(secrets[tenant]))).status_code == 200
    return gateway


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def agents(gateway: GatewayUnderTest, secret: str) -> list[tuple[str, str]]:
    answer = await gateway.client.get("/v1/agents", headers=bearer(secret))
    assert answer.status_code == 200
    return [(agent["tenant"], agent["id"]) for agent in answer.json()["data"]]


async def test_a_tenant_sees_its_own_agents(keyed: GatewayUnderTest, secrets: dict[str, str]) -> None:
    assert await agents(keyed, secrets["red"]) == [("red", "a")]
    assert await agents(keyed, secrets["blue"]) == [("blue", "a")]
    assert await agents(keyed, secrets["boss"]) == [("red", "a"), ("blue", "a")]
    for headers in ({}, bearer("jk_00000000_" + 64 * "0"), bearer("none")):
        for method, path in (("GET", "/v1/agents"), ("GET", "/v1/agents/a"), ("DELETE", "/v1/agents/a")):
            answer = await keyed.client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/metrics"):
        assert (await keyed.client.get(path)).status_code == 200


async def test_anothers_agent_is_as_if_it_were_not_there(keyed: GatewayUnderTest, secrets: dict[str, str]) -> None:
    red = bearer(secrets["red"])
    no_such = (await keyed.client.get("/v1/agents/nobody", headers=red)).json()
    for method in ("GET", "DELETE"):
        for path in ("a?tenant=blue", "blue/a", "blue%2Fa", "a?tenant=nobody"):
            answer = await keyed.client.request(method, f"/v1/agents/{path}", headers=red)
            assert answer.status_code == 404
            assert answer.json()["error"].keys() == no_such["error"].keys()
            assert answer.json()["error"]["code"] == "not_found"
    assert AgentId("blue/a") in keyed.app.flow.agents.by_id
    assert (await keyed.client.get("/v1/agents/a?tenant=red", headers=red)).json()["tenant"] == "red"
    assert (await keyed.client.delete("/v1/agents/a", headers=red)).status_code == 200
    assert await agents(keyed, secrets["boss"]) == [("blue", "a")]
    boss = bearer(secrets["boss"])
    assert (await keyed.client.get("/v1/agents/a", headers=boss)).status_code == 404, "it has none itself"
    assert (await keyed.client.get("/v1/agents/a?tenant=blue", headers=boss)).json()["id"] == "a"
    assert (await keyed.client.delete("/v1/agents/a?tenant=blue", headers=boss)).status_code == 200
    assert await agents(keyed, secrets["boss"]) == []


async def test_keys_that_change_count_within_seconds(
    keyed: GatewayUnderTest, secrets: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"

    async def status(secret: str) -> int:
        return (await keyed.client.get("/v1/agents", headers=bearer(secret))).status_code

    async def becomes(secret: str, expected: int) -> None:
        async with asyncio.timeout(KEYS_S + 5):
            while await status(secret) != expected:
                await asyncio.sleep(0.05)

    assert await status(secrets["red"]) == 200
    revoke_key(path, secrets["red"].split("_")[1], datetime.now(UTC))
    _, green = add_key(path, "green", "", datetime.now(UTC))
    await becomes(secrets["red"], 401)
    assert await status(green) == 200
    text = path.read_text()
    for broken in ("{", None):
        caplog.clear()
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        async with asyncio.timeout(KEYS_S + 5):
            while "the keys have not changed" not in caplog.text:
                await asyncio.sleep(0.05)
        assert (await status(green), await status("none")) == (200, 401)
    path.write_text(text)
    revoke_key(path, green.split("_")[1], datetime.now(UTC))
    await becomes(green, 401)


async def test_another_file_of_keys_is_followed_after_a_reload(
    keyed: GatewayUnderTest, secrets: dict[str, str], tmp_path: Path
) -> None:
    tenants, other = keyed.app.tenants, tmp_path / "other.json"
    _, green = add_key(other, "green", "", datetime.now(UTC))
    tenants.replace(Keys.load(other), tenants.settings)
    _, more = add_key(other, "green", "", datetime.now(UTC))
    await keyed.until(lambda: len(list(tenants.keys)) == 2)
    assert await agents(keyed, green) == await agents(keyed, more) == []
    answer = await keyed.client.get("/v1/agents", headers=bearer(secrets["red"]))
    assert answer.status_code == 401


async def test_a_gateway_with_no_usable_keys_does_not_start(start: StartGateway, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    with pytest.raises(KeysError, match=str(path)):
        await start(keys=path)
