"""The real engine: vLLM with our scheduler, the link and the forced lengths, over HTTP on its Unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from engine.hints import INT64_MAX, INT64_MIN, Hints, to_fields
from engine.lab.forced_length import KEY_XARG
from engine.launcher import EngineState
from engine.link import GatewayLink, Hello, Report
from tests.engine.live import LiveEngine

pytestmark = pytest.mark.engine

ANSWER_S = 60.0
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "How long is a queue?"}]},
    "/v1/completions": {"prompt": "How long is a queue?"},
}


class Client:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self._session.post(f"http://engine{path}", json={"model": LiveEngine.model, **body}) as answer:
            return answer.status, await answer.json()

    async def stream(self, path: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        body = {"model": LiveEngine.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        async with self._session.post(f"http://engine{path}", json=body) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    async def task(self, hints: Hints, prompt: str, key: str | None = None, **body: Any) -> int:
        """Tokens that were put out."""
        priority, xargs = to_fields(hints)
        if key is not None:
            xargs[KEY_XARG] = key
        status, answer = await self.post(
            "/v1/completions", prompt=prompt, priority=priority, vllm_xargs=xargs, **{"max_tokens": 1500, **body}
        )
        assert status == 200, answer
        return int(answer["usage"]["completion_tokens"])


@pytest.fixture
async def client(engine: LiveEngine) -> AsyncIterator[Client]:
    connector = aiohttp.UnixConnector(engine.socket, limit=0)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session)


class Gateway:
    """Listens on the link, and keeps what a gateway would."""

    def __init__(self, address: str) -> None:
        self._link = GatewayLink(address)
        self._came = asyncio.Event()
        self.hello: Hello | None = None
        self.reports: list[Report] = []
        self._task = asyncio.create_task(self._listen())

    @property
    def now(self) -> Report:
        return self.reports[-1]

    async def until(self, seen: Any, timeout_s: float = ANSWER_S) -> Report:
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.reports and seen(self.now)):
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"{len(self.reports)} reports, the last {self.reports[-3:]}; {self._task}") from None
        return self.now

    async def until_idle(self) -> Report:
        hello = self.hello
        assert hello is not None
        return await self.until(
            lambda report: (report.running, report.waiting, report.free_blocks) == (0, 0, hello.total_blocks)
        )

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        self._link.close()

    async def _listen(self) -> None:
        async for message in self._link.messages():
            if isinstance(message, Hello):
                self.hello = message
            elif isinstance(message, Report):
                self.reports.append(message)
            self._came.set()


@pytest.fixture
async def gateway(engine: LiveEngine) -> AsyncIterator[Gateway]:
    one = Gateway(engine.link_address)
    await one.until(lambda _: one.hello is not None)
    await one.until_idle()
    yield one
    await one.close()


# Forced lengths


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [1, 2, 33, 300])
async def test_an_answer_is_as_long_as_told(engine: LiveEngine, client: Client, path: str, length: int) -> None:
    key = f"exact-{path}-{length}"
    engine.lengths({key: length})  # while the engine runs
    status, answer = await client.post(path, **PATHS[path], max_tokens=1500, vllm_xargs={KEY_XARG: key})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == length
    assert answer["choices"][0]["finish_reason"] == "stop"

    *_, last = [
        chunk async for chunk in client.stream(path, **PATHS[path], max_tokens=1500, vllm_xargs={KEY_XARG: key})
    ]
    assert last["usage"]["completion_tokens"] == length


@pytest.mark.parametrize("temperature", [0, 1.5])
async def test_it_is_so_however_tokens_are_chosen(engine: LiveEngine, client: Client, temperature: float) -> None:
    engine.lengths({"chosen": 40})
    hints = Hints(0, "a", 1)
    assert await client.task(hints, "x", "chosen", temperature=temperature, top_p=0.5, min_tokens=5) == 40


async def test_max_tokens_still_ends_it_sooner(engine: LiveEngine, client: Client) -> None:
    engine.lengths({"long": 400})
    assert await client.task(Hints(0, "a", 1), "x", "long", max_tokens=9) == 9


async def test_it_is_so_when_the_task_was_preempted(engine: LiveEngine, client: Client, gateway: Gateway) -> None:
    """60 tasks of about 8 blocks each, in 127 blocks."""
    before = gateway.now.preempted
    engine.lengths({f"crowd-{i}": 90 + i for i in range(60)})
    lengths = await asyncio.gather(
        *(client.task(Hints(i // 5, f"a{i // 5}", i), f"{i} " + "wait " * 40, f"crowd-{i}") for i in range(60))
    )
    assert lengths == [90 + i for i in range(60)]
    after = await gateway.until_idle()
    assert after.preempted > before


async def test_an_unknown_key_is_refused(client: Client) -> None:
    status, answer = await client.post("/v1/completions", prompt="x", vllm_xargs={KEY_XARG: "never heard of"})
    assert status == 400
    assert "never heard of" in answer["error"]["message"]
    status, answer = await client.post("/v1/completions", prompt="x", vllm_xargs={KEY_XARG: 5})
    assert status == 400


async def test_a_key_needs_an_end(engine: LiveEngine, client: Client) -> None:
    engine.lengths({"endless": 5})
    status, answer = await client.post("/v1/completions", prompt="x", ignore_eos=True, vllm_xargs={KEY_XARG: "endless"})
    assert status == 400
    assert "ignore_eos" in answer["error"]["message"]


async def test_without_a_key_nothing_is_forced(client: Client) -> None:
    assert await client.task(Hints(0, "a", 1), "x", ignore_eos=True, max_tokens=17) == 17


# The link


async def test_the_greeting_tells_the_size(engine: LiveEngine, gateway: Gateway) -> None:
    assert gateway.hello is not None
    assert (gateway.hello.total_blocks, gateway.hello.block_size) == (127, 32)
    assert (gateway.hello.max_num_seqs, gateway.hello.max_model_len) == (64, 2048)
    assert gateway.hello.engine_version.startswith("0.32.")
    assert gateway.now.engine_id == gateway.hello.engine_id


async def test_reports_follow_a_task(engine: LiveEngine, client: Client, gateway: Gateway) -> None:
    engine.lengths({"followed": 200})
    start = await gateway.until_idle()
    gateway.reports = [start]
    assert await client.task(Hints(5, "agent", 4711), "word " * 20, "followed") == 200
    end = await gateway.until_idle()
    held = [report.held[4711] for report in gateway.reports if 4711 in report.held]
    assert len(held) > 2  # how many of 200 the gateway gets to see is a question of time; the newest it always sees
    assert held == sorted(held, key=lambda one: (one.kv_tokens, one.output_tokens))
    assert 0 < held[-1].output_tokens < 200
    # A task alone: one iteration for each token, plus what was in flight when it ended.
    assert 200 <= end.iteration - start.iteration <= 202
    assert end.held == {}


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_frees_the_memory(client: Client, gateway: Gateway, stream: bool) -> None:
    """Also the last ones, after which the engine makes no step any more."""

    async def answer(task: int) -> None:
        priority, xargs = to_fields(Hints(1, "a", task))
        body = {"prompt": "word " * 60, "max_tokens": 1800, "ignore_eos": True, "priority": priority}
        if stream:
            async for _ in client.stream("/v1/completions", vllm_xargs=xargs, **body):
                pass
        else:
            await client.post("/v1/completions", vllm_xargs=xargs, **body)

    tasks = [asyncio.create_task(answer(number)) for number in (1, 2, 3)]
    await gateway.until(lambda report: set(report.held) == {1, 2, 3})
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    idle = await gateway.until_idle()
    assert idle.held == {}


async def test_a_killed_engine_is_replaced(engine: LiveEngine, gateway: Gateway) -> None:
    """The gateway stays connected: the new engine greets it, under a new id and from zero."""
    before, pid, restarts = gateway.hello, engine.process.pid, engine.process.restarts
    assert before is not None
    gateway.reports.clear()
    await asyncio.to_thread(engine.kill)
    assert engine.process.state is EngineState.READY
    assert engine.process.restarts == restarts + 1
    assert engine.process.pid != pid
    await gateway.until(lambda report: report.engine_id != before.engine_id)
    assert gateway.hello is not None
    assert gateway.hello.engine_id == gateway.now.engine_id != before.engine_id
    assert (gateway.now.iteration, gateway.now.free_blocks) == (0, 127)


# The order


async def test_a_small_agent_passes_a_large_one(engine: LiveEngine, client: Client, gateway: Gateway) -> None:
    """40 tasks of an agent with a large tag fill the memory. One with a small tag comes, and ends before most of them."""
    engine.lengths({f"large-{i}": 150 for i in range(40)} | {"small": 20})
    large = [
        asyncio.create_task(client.task(Hints(10**15, "large", i), f"{i} " + "wait " * 100, f"large-{i}"))
        for i in range(40)
    ]
    await gateway.until(lambda report: report.waiting > 10)
    assert await client.task(Hints(10**9, "small", 99), "short", "small") == 20
    assert sum(task.done() for task in large) < 20
    assert await asyncio.gather(*large) == [150] * 40


@pytest.mark.parametrize("tag", [INT64_MIN, -1, 2**53 + 1, INT64_MAX])
async def test_every_tag_is_taken(client: Client, tag: int) -> None:
    assert await client.task(Hints(tag, "a", 1), "x", max_tokens=3, ignore_eos=True) == 3
