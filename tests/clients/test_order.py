"""The tag that the gateway gives a task is the one by which the engine's scheduler orders it, in whatever dialect it came."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from engine.hints import Hints, to_fields
from gateway.flowcontrol import agent_id_of
from gateway.protocol.identify import DEFAULT_TENANT
from tests.engine.live import LiveEngine
from tests.wire.conftest import running_gateway

pytestmark = pytest.mark.engine

FIRST, LAST = 1, 10**15


async def test_between_a_smaller_tag_and_a_larger_one(engine: LiveEngine) -> None:
    """Two tasks hold half of the engine's memory, and more with each token. Each of the others needs more than the other half:
    they run one after the other. Some are not the gateway's, and their tags are known."""
    engine.lengths({"fills": 900, "waits": 3})
    engine.wait_ready()
    ended: list[str] = []
    transport = httpx.AsyncHTTPTransport(uds=engine.socket)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as direct,
        running_gateway(engine=engine.url, link=engine.link_address, max_engine_waiting=10, beta=10) as gateway,
    ):
        view = gateway.app.flow.engine
        await gateway.until(lambda: view.up and view.reporting)

        async def at_once(name: str, tag: int, tokens: list[int], key: str) -> None:
            priority, xargs = to_fields(Hints(tag, name, -1))
            xargs["forced_length_key"] = key
            body = {"model": "tiny", "prompt": tokens, "priority": priority, "vllm_xargs": xargs}
            answer = await direct.post("/v1/completions", json={**body, "max_tokens": 1000 if key == "fills" else 5})
            assert answer.status_code == 200, answer.text
            ended.append(name)

        async def in_turn(path: str, **fields: Any) -> httpx.Response:
            body = {"model": "tiny", "vllm_xargs": {"forced_length_key": "waits"}, **fields}
            answer = await gateway.client.post(path, json=body, headers={"X-Agent-ID": path})
            assert answer.status_code == 200, answer.text
            ended.append(path)
            return answer

        running = [asyncio.create_task(at_once("fills", 0, [token] * 1000, "fills")) for token in (110, 111)]
        await gateway.until(lambda: view.running == 2, *running)
        waiting = [asyncio.create_task(at_once("last", LAST, [112] * 2025, "waits"))]
        waiting.append(asyncio.create_task(at_once("first", FIRST, [113] * 2025, "waits")))
        long = "Q" * 2020  # as many tokens
        asked = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": f"1{long}"}]},
            "/v1/responses": {"input": f"2{long}"},
            "/v1/messages": {"messages": [{"role": "user", "content": f"3{long}"}], "max_tokens": 5},
        }
        answers = [asyncio.create_task(in_turn(path, **fields)) for path, fields in asked.items()]
        await gateway.until(lambda: view.waiting == 5, *running, *waiting, *answers)
        told = [await answer for answer in answers]
        await asyncio.gather(*running, *waiting)
        assert ended[:3] == ["fills", "fills", "first"]
        assert set(ended[3:6]) == set(asked)
        assert ended[6:] == ["last"]
        assert all(FIRST < int(answer.headers["x-justitia-finish-tag"]) < LAST for answer in told)
        for path in asked:
            (task,) = gateway.app.flow.agents.by_id[agent_id_of(DEFAULT_TENANT, path)].tasks
            await gateway.until(lambda path=path: _held(gateway, path))  # type: ignore[misc]
            assert task.decode_tokens == 3


def _held(gateway: Any, path: str) -> bool:
    return bool(gateway.app.flow.agents.by_id[agent_id_of(DEFAULT_TENANT, path)].tasks[0].held)
