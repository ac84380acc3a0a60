"""Processes that are killed, stopped for a while, and started again, while agents wait, run, and use their tools.

However it went: nothing hangs, the engine is idle and all its memory free, the gateway knows of no task and no agent, and the
next agents are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq

import gateway.relay.engine_client
from engine.launcher import EngineState
from engine.link import PROTOCOL, Report, inbox
from gateway.demo.processes import free_port
from tests.benchmarks.inversions import Recorder, recording
from tests.engine.live import LiveEngine
from tests.wire.conftest import GatewayUnderTest, running_gateway
from tests.wire.test_real_engine import engine_core_pid

pytestmark = pytest.mark.engine

END_S = 120.0
SLOTS = 8
RUNNING, WAITING, IDLE = SLOTS, 8, 3


async def until(condition: Callable[[], bool], limit_s: float = END_S) -> None:
    """Of what processes do by themselves."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.02)


class Crowd:
    """Agents that do not give up: 8 at the engine, 8 in the queue, 3 waiting for their tools. outcomes: of all attempts."""

    def __init__(self, client: httpx.AsyncClient, name: str, length: str) -> None:
        self._client, self._name, self._length = client, name, length
        self._busy: list[asyncio.Task[None]] = []
        self._asking = asyncio.Lock()
        self.outcomes: Counter[str] = Counter()

    async def gather(self) -> None:
        """Returns when all are where they should be."""
        for agent in range(IDLE):
            await self._persist(f"{self._name}-tool-{agent}", "short", final=False)
        self._busy = [
            asyncio.create_task(self._persist(f"{self._name}-{agent}", self._length, stream=agent % 2 == 0))
            for agent in range(RUNNING + WAITING)
        ]
        async with asyncio.timeout(END_S):
            while await states(self._client) != {"running": RUNNING, "waiting": WAITING, "idle": IDLE}:
                assert not any(task.done() for task in self._busy), "they were served too soon"
                await asyncio.sleep(0.02)

    async def finish(self) -> None:
        """All are served, and the tools of the others return."""
        async with asyncio.timeout(END_S):
            await asyncio.gather(*self._busy)
            await asyncio.gather(*(self._persist(f"{self._name}-tool-{agent}", "short") for agent in range(IDLE)))

    async def _persist(self, agent: str, length: str, *, final: bool = True, stream: bool = False) -> None:
        while (outcome := await ask(self._client, agent, length, final=final, stream=stream)) != "answered":
            self.outcomes[outcome] += 1
            async with asyncio.timeout(END_S), self._asking:  # one asks for all, and leaves the engine time to start
                while not await is_ready(self._client):
                    await asyncio.sleep(0.1)
        self.outcomes["answered"] += 1


async def ask(client: httpx.AsyncClient, agent: str, length: str, *, final: bool = True, stream: bool = False) -> str:
    """`answered`, the code of a clean error, or `cut off` if the gateway itself is gone."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"{agent} " + "word " * 20}],
        "stream": stream,
        "vllm_xargs": {"forced_length_key": length},
    }
    headers = {"X-Agent-ID": agent} | ({"X-Agent-Final": "true"} if final else {})
    try:
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    except httpx.TransportError:
        return "cut off"
    if answer.status_code != 200:
        assert answer.status_code in (502, 503), answer.text
        return str(answer.json()["error"]["code"])
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] > 0
        return "answered"
    assert answer.content.endswith(b"data: [DONE]\n\n")
    return "broken off" if b'"error"' in answer.content else "answered"


async def is_ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/ready")).status_code == 200
    return False


async def states(client: httpx.AsyncClient) -> Counter[str]:
    agents = (await client.get("/v1/agents")).json()["data"]
    return Counter(agent["state"] for agent in agents)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    exposition = (await client.get("/metrics")).text
    found = re.findall(rf"^justitia_{re.escape(name)} (\S+)$", exposition, re.MULTILINE)
    assert len(found) == 1, f"{name} in {exposition}"
    return float(found[0])


async def nothing_is_left(client: httpx.AsyncClient, recorder: Recorder) -> None:
    """And the next agents are served."""
    for number in range(3):
        assert await ask(client, f"next-{number}", "short") == "answered"
    await until(lambda: is_idle(recorder))
    async with asyncio.timeout(END_S):
        # An agent ends when the engine has said what its last task held, which may come after the answer.
        while await states(client):
            await asyncio.sleep(0.02)
    for state in ("waiting", "in_flight"):
        assert await metric(client, f'tasks{{state="{state}"}}') == 0
    last = recorder.last
    assert last is not None
    assert await metric(client, "kv_predicted_tokens") == 0
    async with asyncio.timeout(END_S):
        while await metric(client, "kv_held_tokens") or await metric(client, "engine_running"):
            await asyncio.sleep(0.02)


def is_idle(recorder: Recorder) -> bool:
    hello, last = recorder.hello, recorder.last
    return (
        hello is not None
        and last is not None
        and hello.engine_id == last.engine_id
        and (last.running, last.waiting, last.free_blocks) == (0, 0, hello.total_blocks)
    )


def told(recorder: Recorder) -> Report:
    assert recorder.last is not None
    return recorder.last


def heard(recorder: Recorder) -> dict[str, int]:
    """By gateway other than the recorder."""
    return {name: number for name, number in told(recorder).heard.items() if name != recorder.name}


@pytest.fixture(autouse=True)
async def recorder(engine: LiveEngine) -> AsyncIterator[Recorder]:
    engine.wait_ready()
    engine.lengths({"short": 5, "some": 600, "many": 900})
    async with recording(engine.link_address) as recorder:
        await until(lambda: is_idle(recorder))
        yield recorder


async def new_tags_are_heard(client: httpx.AsyncClient, recorder: Recorder, former: dict[str, int]) -> None:
    """By the engine, of a gateway that it had not known: one task of an agent is dearer than thought, and the other, which
    runs, gets another tag."""
    new = "new-tags"
    runs = asyncio.create_task(ask(client, new, "many", final=False))
    await until(lambda: told(recorder).running > 0)
    before = {name: number for name, number in heard(recorder).items() if name not in former}
    assert await ask(client, new, "short", final=False) == "answered"
    await until(
        lambda: any(number > before.get(name, 0) for name, number in heard(recorder).items() if name not in former)
    )
    assert not runs.done()
    assert await runs == "answered"
    assert await ask(client, new, "short") == "answered"
    await until(lambda: is_idle(recorder))


class GatewayProcess:
    """`justitia gateway`, on one port for all of its lives."""

    def __init__(self, engine: LiveEngine, log: Path, *arguments: str) -> None:
        self._port, self._log = free_port(), log
        self._arguments = (
            *("--engine", engine.url, "--link", engine.link_address, "--port", str(self._port), "--state", "memory:"),
            *("--max-in-flight", str(SLOTS), "--drain-s", "1", *arguments),
        )
        self._process: asyncio.subprocess.Process | None = None
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", timeout=END_S)

    async def start(self, *, ready: bool = True) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.cli", "gateway", *self._arguments, stdout=log, stderr=log
            )
        async with asyncio.timeout(END_S):
            while not (await is_ready(self.client) if ready else await self._listens()):
                assert self._process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.05)

    async def reports(self) -> None:
        """Until it has heard of the engine on the link."""
        async with asyncio.timeout(END_S):
            while (await self.client.get("/health")).json()["link"] != "reporting":
                await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process is not None
        await self._process.wait()

    async def close(self) -> None:
        await self.client.aclose()
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    async def _listens(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await self.client.get("/health")).status_code == 200
        return False


@asynccontextmanager
async def gateway_process(engine: LiveEngine, log: Path, *arguments: str) -> AsyncIterator[GatewayProcess]:
    gateway = GatewayProcess(engine, log, *arguments)
    try:
        await gateway.start()
        await gateway.reports()
        yield gateway
    finally:
        await gateway.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gateway.log"


def engine_pid(engine: LiveEngine) -> int:
    assert engine.process.pid is not None
    return engine.process.pid


async def until_starting(engine: LiveEngine) -> None:
    await asyncio.to_thread(engine.wait_for_state, EngineState.STARTING, END_S)


# The engine is stopped for a while


@asynccontextmanager
async def stopped(*pids: int) -> AsyncIterator[None]:
    """Processes, or groups of them if negative."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def gateway_here(engine: LiveEngine) -> AsyncIterator[GatewayUnderTest]:
    """In this process, where its tasks can be counted."""
    async with running_gateway(engine=engine.url, link=engine.link_address, max_in_flight=SLOTS) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        yield gateway


async def as_many_tasks_as(before: int) -> None:
    await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_stopped_engine_counts_as_down_and_its_tasks_survive(
    engine: LiveEngine, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.relay.engine_client, "CONTROL_S", 1.0)  # else it takes ten seconds to be noticed
    async with gateway_here(engine) as here:
        tasks = len(asyncio.all_tasks())
        view = here.app.flow.engine
        crowd = Crowd(here.client, "stopped", "some")
        await crowd.gather()
        await here.until(lambda: view.running > 0)
        iterations = view.iterations
        async with stopped(-engine_pid(engine)):
            await here.until(lambda: not view.up)
            assert (view.running, view.held_tokens) == (0, 0)
            assert await ask(here.client, "new", "short") == "no_engine"
            await here.until(lambda: not view.reporting)
            assert here.app.flow.queue.in_flight == SLOTS, "they may still be answered"
        await here.until(lambda: view.up and view.reporting)
        await crowd.finish()
        assert crowd.outcomes == {"answered": RUNNING + WAITING + 2 * IDLE}
        assert view.restarts == 0
        assert view.iterations > iterations
        await nothing_is_left(here.client, recorder)
        assert here.is_empty()
        assert here.app.flow.queue.agents == {}
        assert here.app.flow.agents.by_id == {}
        await as_many_tasks_as(tasks)


async def test_a_stopped_core_is_silent_on_the_link_and_its_tasks_survive(
    engine: LiveEngine, recorder: Recorder
) -> None:
    """The server goes on to say that all is well."""
    async with gateway_here(engine) as here:
        tasks = len(asyncio.all_tasks())
        view = here.app.flow.engine
        crowd = Crowd(here.client, "core-stopped", "some")
        await crowd.gather()
        async with stopped(engine_core_pid(engine_pid(engine))):
            await here.until(lambda: not view.reporting)
            assert view.up
            assert (await here.client.get("/health")).json()["link"] == "silent"
        await crowd.finish()
        assert view.reporting
        assert crowd.outcomes == {"answered": RUNNING + WAITING + 2 * IDLE}
        await nothing_is_left(here.client, recorder)
        assert here.app.flow.queue.agents == {}
        await as_many_tasks_as(tasks)


# The gateway is stopped, or killed, and the engine goes on


async def test_a_stopped_gateway_catches_up(engine: LiveEngine, recorder: Recorder, log: Path) -> None:
    """It is told of more memory than there is, so that the engine preempts."""
    start = told(recorder)
    async with gateway_process(engine, log, "--capacity-tokens", "1000000") as process:
        crowd = Crowd(process.client, "catches-up", "many")
        await crowd.gather()
        await until(lambda: told(recorder).running > 0)
        process.send(signal.SIGSTOP)
        before = told(recorder).iteration
        await until(lambda: told(recorder).iteration > before + 100)  # the engine does not wait for it
        process.send(signal.SIGCONT)
        await crowd.finish()
        assert crowd.outcomes == {"answered": RUNNING + WAITING + 2 * IDLE}
        await nothing_is_left(process.client, recorder)
        end = told(recorder)
        assert end.preempted > start.preempted
        assert await metric(process.client, "service_iterations") == end.iteration - start.iteration
        assert await metric(process.client, "preemptions_total") == end.preempted - start.preempted
        recomputed = end.recomputed_tokens - start.recomputed_tokens
        assert await metric(process.client, "recomputed_tokens_total") == recomputed


async def test_a_killed_gateway_leaves_an_idle_engine_and_the_next_one_knows_it(
    engine: LiveEngine, recorder: Recorder, log: Path
) -> None:
    async with gateway_process(engine, log) as process:
        crowd = Crowd(process.client, "killed", "some")
        await crowd.gather()
        await until(lambda: told(recorder).running > 0)
        former, refused = heard(recorder), told(recorder).refused
        assert len(former) >= 1
        await process.kill()
        await until(lambda: is_idle(recorder))
        assert told(recorder).engine_id == recorder.hello.engine_id  # type: ignore[union-attr]
        await process.start()
        await process.reports()
        health = (await process.client.get("/health")).json()
        assert health["capacity_tokens"] == 127 * 32
        await crowd.finish()
        assert crowd.outcomes["cut off"] >= RUNNING + WAITING
        await nothing_is_left(process.client, recorder)
        await new_tags_are_heard(process.client, recorder, former)
        assert told(recorder).refused == refused
        assert await metric(process.client, "engine_restarts_total") == 0
        assert await metric(process.client, "link_refused_total") == 0


# The engine is killed, before the gateway, after it, or with it


async def test_a_gateway_greets_the_engine_that_takes_the_place_of_a_killed_one(
    engine: LiveEngine, recorder: Recorder, log: Path
) -> None:
    """Tasks that had no byte yet go again, in their old places; old tags are forgotten, and its counters go on."""
    async with gateway_process(engine, log) as process:
        first = recorder.hello
        assert first is not None
        crowd = Crowd(process.client, "engine", "some")
        await crowd.gather()
        await until(lambda: told(recorder).running > 0)
        iterations = await metric(process.client, "service_iterations")
        os.kill(engine_core_pid(engine_pid(engine)), signal.SIGKILL)
        await until_starting(engine)
        await crowd.finish()
        assert crowd.outcomes["cut off"] == 0
        assert recorder.hello is not None
        assert recorder.hello.engine_id != first.engine_id
        await nothing_is_left(process.client, recorder)
        assert await metric(process.client, "engine_restarts_total") == 1
        assert await metric(process.client, "service_iterations") > iterations
        assert await metric(process.client, "link_up") == 1
        await new_tags_are_heard(process.client, recorder, former={})
        assert told(recorder).refused == 0


async def test_both_are_killed_at_once(engine: LiveEngine, recorder: Recorder, log: Path) -> None:
    async with gateway_process(engine, log) as process:
        crowd = Crowd(process.client, "both", "some")
        await crowd.gather()
        process.send(signal.SIGKILL)
        os.killpg(engine_pid(engine), signal.SIGKILL)
        await process.kill()
        await until_starting(engine)
        await process.start(ready=False)
        assert await ask(process.client, "too-early", "short") == "no_engine"
        assert not await is_ready(process.client)
        await crowd.finish()
        assert crowd.outcomes["cut off"] >= RUNNING + WAITING
        await nothing_is_left(process.client, recorder)
        assert await metric(process.client, "engine_restarts_total") == 0, "it has known one engine only"
        assert len(heard(recorder)) == 1


# The link alone


class LyingPeer:
    """Pushes 10,000 messages a second at the engine: rubbish, changes of a stranger and out of turn, and changes in turn
    that give random tags to all tasks that it has heard of."""

    def __init__(self, address: str, recorder: Recorder) -> None:
        self._address, self._recorder = address, recorder
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._lie, name="lying-peer")
        self.offered = self.sent = 0
        self.seconds = 0.0

    def __enter__(self) -> LyingPeer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _lie(self) -> None:
        start = time.monotonic()
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(inbox(self._address))
            messages = self._messages()
            while not self._end.wait(max(0.0, start + self.offered / 10_000 - time.monotonic())):
                for _ in range(100):
                    self.offered += 1
                    with contextlib.suppress(zmq.Again):
                        socket.send(next(messages), zmq.NOBLOCK)
                        self.sent += 1
        self.seconds = time.monotonic() - start

    def _messages(self) -> Iterator[bytes]:
        rng = random.Random(1)
        pack = msgspec.msgpack.encode
        number = 0
        while True:
            yield pack({"type": "greeting", "protocol": PROTOCOL, "gateway": "liar", "number": number + 1})
            yield rng.randbytes(rng.randrange(200))
            yield pack({"type": "change", "gateway": "stranger", "number": 1, "tags": {1: 1}})
            yield pack({"type": "change", "gateway": "liar", "number": number + 7, "tags": {1: 1}})
            yield pack({"type": "greeting", "protocol": PROTOCOL + 1, "gateway": "liar", "number": 1})
            yield b"\x81" * 1000
            report = told(self._recorder)
            for _ in range(20):
                number += 1
                tags = {task: rng.randrange(-(2**63), 2**63) for task in (*report.tasks, *report.waiting_tasks)[:50]}
                yield pack({"type": "change", "gateway": "liar", "number": number, "tags": tags})


async def test_a_lying_peer_on_the_link_keeps_nobody_from_being_served(engine: LiveEngine, recorder: Recorder) -> None:
    async with gateway_here(engine) as here:
        tasks = len(asyncio.all_tasks())
        start = told(recorder).refused
        with LyingPeer(engine.link_address, recorder) as peer:
            crowd = Crowd(here.client, "lied-to", "some")
            await crowd.gather()
            await crowd.finish()
        assert crowd.outcomes == {"answered": RUNNING + WAITING + 2 * IDLE}
        assert peer.offered > 5_000 * peer.seconds, "on a busy machine it lags behind"
        await nothing_is_left(here.client, recorder)
        assert told(recorder).refused > start
        async with asyncio.timeout(END_S):
            while not await metric(here.client, "link_refused_total"):
                await asyncio.sleep(0.02)
        print(
            f"{peer.offered} offered in {peer.seconds:.1f} s, {peer.sent} sent, {told(recorder).refused - start} refused"
        )
        await as_many_tasks_as(tasks)
