"""The end of a gateway under load, as a process: what it has accepted it serves, and nothing hangs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.demo.processes import free_port
from tests.wire.scripted_engine import ScriptedEngine, Send, answer_at_once, chunk, push, start
from tests.wire.test_commands import Command, justitia

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = 200
SLOTS = 8
# Far beyond what any of it takes.
PATIENCE_S = 40.0


async def answer_after_a_while(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    await asyncio.sleep(0.05)
    await answer_at_once(body, send, engine)


async def begin_and_never_end(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    if body.get("stream"):
        await start(send)
        await push(send, chunk("hel"))
    await asyncio.Event().wait()


class Load:
    """Tasks of many agents, one half of them streamed, each on a connection of its own."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.tasks: list[asyncio.Task[httpx.Response]] = []

    def add(self, count: int) -> None:
        self.tasks += [asyncio.create_task(self.one(number)) for number in range(count)]

    async def one(self, number: int) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": number % 2 == 0}
        headers = {"X-Agent-ID": f"agent-{number % 20}"}
        return await self._client.post("/v1/chat/completions", json=body, headers=headers)

    async def ends(self) -> list[str]:
        async with asyncio.timeout(PATIENCE_S):
            return [end_of(answer) for answer in await asyncio.gather(*self.tasks)]


def end_of(answer: httpx.Response) -> str:
    """served, refused, or broken off; whatever else it may be is none of an orderly end."""
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "shutting_down"
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"
        return "refused"
    assert answer.status_code == 200
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.json()["choices"]
        return "served"
    *_, last, done = answer.text.rstrip().split("\n\n")
    assert done == "data: [DONE]"
    if '"error"' not in last:
        return "served"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    return "broken off"


@asynccontextmanager
async def loaded(engine: ScriptedEngine, **settings: float) -> AsyncIterator[tuple[Command, Load, httpx.AsyncClient]]:
    """A gateway with 200 tasks that it has accepted, and of which most wait."""
    port = free_port()
    given = {"engine": engine.url, "port": port, "state": "memory:", "max_in_flight": SLOTS, **settings}
    environment = {f"JUSTITIA_{name.upper()}": str(value) for name, value in given.items()}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        justitia("gateway", **environment) as command,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, limits=limits) as client,
    ):
        await command.until_said("the engine is up")
        load = Load(client)
        load.add(TASKS)
        async with asyncio.timeout(PATIENCE_S):
            while len(engine.bodies) + await waiting(client) < TASKS:
                await asyncio.sleep(0.02)
        yield command, load, client


async def ends_well(command: Command) -> None:
    assert command.process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        command.said += (await command.process.stderr.read()).decode()
        assert await command.process.wait() == 0
    assert "Traceback" not in command.said
    assert " ERROR " not in command.said


async def waiting(client: httpx.AsyncClient) -> int:
    metrics = (await client.get("/metrics")).text
    return int(float(metrics.partition('justitia_tasks{state="waiting"} ')[2].split()[0]))


async def test_all_that_was_accepted_is_served_though_most_of_it_waited() -> None:
    async with (
        ScriptedEngine(default=answer_after_a_while).serving() as engine,
        loaded(engine, drain_s=30) as (command, load, client),
    ):
        command.process.send_signal(signal.SIGTERM)
        await command.until_said("shutting down: ")
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).json()["status"] == "draining"
        late = [await load.one(number) for number in range(4)]
        assert Counter(map(end_of, late)) == {"refused": 4}
        assert Counter(await load.ends()) == {"served": TASKS}
        await ends_well(command)


async def test_a_limit_that_is_too_short_hands_back_the_rest_and_nothing_hangs() -> None:
    async with (
        ScriptedEngine(default=begin_and_never_end).serving() as engine,
        loaded(engine, drain_s=0.5) as (command, load, _),
    ):
        await engine.until(lambda engine: len(engine.bodies) == SLOTS)
        command.process.send_signal(signal.SIGTERM)
        ends = Counter(await load.ends())
        assert ends["refused"] + ends["broken off"] == TASKS
        assert 1 <= ends["broken off"] <= SLOTS
        await ends_well(command)
        assert f"{SLOTS} tasks in flight are cut off" in command.said


async def test_an_engine_that_dies_in_a_drain_and_comes_back_serves_the_rest() -> None:
    async with (
        ScriptedEngine(default=answer_after_a_while).serving() as engine,
        loaded(engine, drain_s=30) as (command, load, _),
    ):
        command.process.send_signal(signal.SIGTERM)
        await command.until_said("shutting down: ")
        engine.healthy = False
        engine.default = lose
        await command.until_said("the engine is down")
        engine.healthy = True
        engine.default = answer_at_once
        assert Counter(await load.ends()) == {"served": TASKS}
        await ends_well(command)


async def test_an_engine_that_dies_in_a_drain_and_stays_away_keeps_nobody_waiting() -> None:
    async with (
        ScriptedEngine(default=answer_after_a_while).serving() as engine,
        loaded(engine, drain_s=3) as (command, load, _),
    ):
        command.process.send_signal(signal.SIGTERM)
        await command.until_said("shutting down: ")
        engine.healthy = False
        engine.default = lose
        ends = Counter(await load.ends())
        assert ends["refused"] > 0
        assert ends["refused"] + ends["served"] == TASKS
        await ends_well(command)


async def lose(body: dict[str, Any], send: Send, engine: ScriptedEngine) -> None:
    send.__self__.transport.abort()  # type: ignore[attr-defined]  # the connection is gone, as when a process is killed


async def test_a_second_signal_does_not_wait() -> None:
    async with (
        ScriptedEngine(default=begin_and_never_end).serving() as engine,
        loaded(engine, drain_s=300) as (command, load, _),
    ):
        command.process.send_signal(signal.SIGTERM)
        await command.until_said("shutting down: ")
        command.process.send_signal(signal.SIGTERM)
        ends = Counter(await load.ends())
        assert ends["refused"] + ends["broken off"] == TASKS
        await ends_well(command)


# `justitia serve` with a process of ours in the place of vLLM's.
SERVE = """
import sys
from engine.launcher import EngineSpec
from gateway.cli.main import main

ENGINE = '''
import sys
sys.path.insert(0, sys.argv[2])
import uvicorn
from tests.benchmarks.stand_in import StandIn
uvicorn.run(StandIn(token_s=0.04), uds=sys.argv[1], log_level="warning")
'''
root, sys.argv = sys.argv[1], ["justitia", "serve"]
EngineSpec.command = lambda spec: [sys.executable, "-c", ENGINE, str(spec.socket), root]
main()
"""


async def test_the_engine_of_serve_outlives_the_drain() -> None:
    port = free_port()
    given = {"port": port, "model": "org/none", "engine_scheduler": "stock", "max_in_flight": 4, "state": "memory:"}
    environment = {f"JUSTITIA_{name.upper()}": str(value) for name, value in given.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(ROOT), stderr=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )
    command = Command(process)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            await command.until_said("stop: Ctrl-C")
            await command.until_said("the engine is up")
            load = Load(client)
            load.add(24)
            async with asyncio.timeout(PATIENCE_S):
                while await waiting(client) < 12:
                    await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert Counter(await load.ends()) == {"served": 24}
        await ends_well(command)
        assert command.said.index("shutting down: ") < command.said.index("stopping the engine")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
