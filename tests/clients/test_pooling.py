"""Embeddings, scores and rankings: tasks that read and write nothing.

The tiny model serves as a pooling model too: its embeddings mean nothing, but they are vLLM's own. It takes an engine of its
own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.launcher import EngineProcess, EngineSpec
from gateway.flowcontrol import agent_id_of
from gateway.protocol.identify import DEFAULT_TENANT
from predictor.types import FinishedTask
from tests.clients.comparing import plain
from tests.clients.conftest import RUN, openai_client
from tests.engine.live import START_TIMEOUT_S
from tests.loop_thread import LoopThread
from tests.wire.conftest import GatewayUnderTest, StartGateway, running_gateway
from tests.wire.scripted_engine import ScriptedEngine, push
from tests.wire.scripted_engine import start as start_answer

DOCUMENTS = ["a queue of tasks", "b", "every task belongs to an agent"]

# Path, body, and how many prompts it is.
ASKED: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/embeddings", {"input": "one"}, 1),
    ("/v1/embeddings", {"input": DOCUMENTS, "encoding_format": "base64"}, 3),
    ("/v1/embeddings", {"input": [[40, 69], [76]]}, 2),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "one"}]}, 1),
    ("/v2/embed", {"texts": DOCUMENTS, "embedding_types": ["float"]}, 3),
    ("/pooling", {"input": DOCUMENTS}, 3),
    ("/score", {"text_1": "task", "text_2": DOCUMENTS}, 3),
    ("/v1/score", {"queries": "task", "documents": DOCUMENTS}, 3),
    ("/rerank", {"query": "task", "documents": DOCUMENTS}, 3),
    ("/v1/rerank", {"query": "task", "documents": DOCUMENTS, "top_n": 2}, 3),
    ("/v2/rerank", {"query": "task", "documents": DOCUMENTS}, 3),
]


@pytest.fixture(scope="module")
def pooling_engine(session_dir: Path, tiny_model_dir: Path, loop_thread: LoopThread) -> Iterator[EngineSpec]:
    spec = EngineSpec(
        model=str(tiny_model_dir),
        runtime_dir=session_dir / "pooling",
        kv_blocks=128,
        block_size=32,
        max_num_seqs=64,
        max_model_len=2048,
        extra_args=("--served-model-name", "tiny", "--runner", "pooling", "--convert", "embed"),
    )
    process = EngineProcess(spec)
    loop_thread.call(process.start())
    try:
        loop_thread.call(process.wait_ready(START_TIMEOUT_S), START_TIMEOUT_S + 5)
        yield spec
    finally:
        loop_thread.call(process.stop())


@pytest.fixture
async def pooling(pooling_engine: EngineSpec) -> AsyncIterator[GatewayUnderTest]:
    async with running_gateway(engine=pooling_engine.url, link=pooling_engine.link_address) as one:
        await one.until(lambda: one.app.flow.engine.up and one.app.flow.engine.reporting)
        yield one


@pytest.fixture
async def direct(pooling_engine: EngineSpec) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(pooling_engine.socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
        yield client


def tasks_of(one: GatewayUnderTest) -> list[FinishedTask]:
    return one.app.flow.agents.by_id[agent_id_of(DEFAULT_TENANT, RUN)].tasks


@pytest.mark.engine
async def test_what_the_engine_says(pooling: GatewayUnderTest, direct: httpx.AsyncClient) -> None:
    for number, (path, fields, prompts) in enumerate(ASKED):
        body = {"model": "tiny", **fields}
        expected = await direct.post(path, json=body)
        answer = await pooling.client.post(path, json=body, headers={"X-Agent-ID": RUN})
        assert answer.status_code == expected.status_code == 200, (path, answer.text)
        assert plain(answer.json()) == plain(expected.json())
        task = tasks_of(pooling)[number]
        assert task.prompt_tokens == _prompt_tokens(answer.json()), path
        assert (task.sequences, task.decode_tokens) == (prompts, prompts), "each is held for one iteration"
        assert task.cost == pytest.approx(task.prompt_tokens + prompts)
    assert pooling.is_empty()
    best = [result["relevance_score"] for result in answer.json()["results"]]
    assert best == sorted(best, reverse=True)


def _prompt_tokens(answer: dict[str, Any]) -> int:
    if (meta := answer.get("meta")) is not None:  # as Cohere has it
        return int(meta["billed_units"]["input_tokens"])
    return int(answer["usage"]["prompt_tokens"])


@pytest.mark.engine
async def test_the_openai_sdk(pooling: GatewayUnderTest, direct: httpx.AsyncClient) -> None:
    expected = (await direct.post("/v1/embeddings", json={"model": "tiny", "input": DOCUMENTS})).json()
    async with openai_client(pooling.url, default_headers={"X-Agent-ID": RUN}) as sdk:
        answer = await sdk.embeddings.create(model="tiny", input=DOCUMENTS)
    assert [one.index for one in answer.data] == [0, 1, 2]
    for one, other in zip(answer.data, expected["data"], strict=True):
        assert one.embedding == pytest.approx(other["embedding"], abs=1e-6)
    (task,) = tasks_of(pooling)
    assert task.prompt_tokens == answer.usage.prompt_tokens > 0


@pytest.mark.engine
async def test_embeddings_in_bytes(pooling: GatewayUnderTest, direct: httpx.AsyncClient) -> None:
    """What tells of each where it is, and of all what they used, is in a header: a large one."""
    body = {"model": "tiny", "input": [f"text {number}" for number in range(200)], "encoding_format": "bytes"}
    expected = await direct.post("/v1/embeddings", json=body)
    answer = await pooling.client.post("/v1/embeddings", json=body, headers={"X-Agent-ID": RUN})
    assert answer.content == expected.content
    metadata = json.loads(answer.headers["metadata"])
    assert plain(metadata) == plain(json.loads(expected.headers["metadata"]))
    assert len(answer.headers["metadata"]) > 2**14
    (task,) = tasks_of(pooling)
    assert task.prompt_tokens == metadata["usage"]["prompt_tokens"] > 0

    body["encoding_format"] = "bytes_only"
    answer = await pooling.client.post("/v1/embeddings", json=body, headers={"X-Agent-ID": "untold"})
    assert answer.content == expected.content
    assert "metadata" not in answer.headers
    assert pooling.app.flow.queue.agents["default/untold"].arrived > 0, "nobody says what it used"  # type: ignore[index]


@pytest.mark.engine
async def test_what_the_engine_refuses(pooling: GatewayUnderTest, direct: httpx.AsyncClient) -> None:
    """In its words, which may quote the whole body, and so our priority."""
    for path, fields in (
        ("/v1/embeddings", {"input": "word " * 2000}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "none of these"}),
        ("/rerank", {"query": "a"}),
        ("/classify", {"input": "a"}),  # not what this model does
    ):
        expected = await direct.post(path, json={"model": "tiny", **fields})
        answer = await pooling.client.post(path, json={"model": "tiny", **fields})
        assert answer.status_code == expected.status_code >= 400
        assert answer.json().keys() == expected.json().keys()
        if "error" in answer.json():
            told, error = answer.json()["error"], expected.json()["error"]
            assert {**told, "message": told["message"][:60]} == {**error, "message": error["message"][:60]}
    assert pooling.is_empty()


async def test_they_wait_their_turn_with_a_priority(start: StartGateway, scripted: ScriptedEngine) -> None:
    """Of two agents that come while a third has the slot, the one with less to read goes first."""

    async def answer(body: dict[str, Any], send: Any, engine: ScriptedEngine) -> None:
        await engine.go.wait()
        await start_answer(send, b"application/json")
        await push(send, b'{"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}', more=False)

    scripted.default = answer
    gateway = await start(max_in_flight=1, max_engine_waiting=0)

    async def ask(agent: str, path: str, **fields: Any) -> httpx.Response:
        return await gateway.client.post(path, json={"model": "tiny", **fields}, headers={"X-Agent-ID": agent})

    asking = [asyncio.create_task(ask("first", "/v1/embeddings", input="x"))]
    await gateway.until(lambda: gateway.app.flow.queue.in_flight == 1, *asking)
    for waiting, (agent, words) in enumerate((("large", 500), ("small", 5)), 1):
        asking.append(asyncio.create_task(ask(agent, "/rerank", query="x", documents=["word " * words] * 3)))
        await gateway.until(lambda so_many=waiting: gateway.app.flow.queue.waiting == so_many, *asking)  # type: ignore[misc]
    scripted.go.set()
    assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
    assert [len(str(body.get("documents", ""))) > 1000 for body in scripted.bodies] == [False, False, True]
    assert scripted.bodies[1]["priority"] < scripted.bodies[2]["priority"]
    assert all("vllm_xargs" not in body for body in scripted.bodies), "the engine would warn of what it does not know"
