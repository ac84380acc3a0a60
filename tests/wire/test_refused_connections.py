"""An engine that answers health checks and takes no connections: it is tried ever more seldom, and not in a busy loop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.wire.conftest import running_gateway
from tests.wire.scripted_engine import ScriptedEngine, serving_server, url_of, wait_for_word

CLIENTS = 20
MAX_QUEUE_S = 2
# After the back-off of 0.25, 0.5 and 1 s, the next one ends after more than two seconds. One is for a check that was late.
MOST_TRIES = 5


async def test_attempts_are_bounded_while_connections_are_refused(tmp_path: Path) -> None:
    scripted, log = ScriptedEngine(default=wait_for_word), tmp_path / "log"
    async with serving_server(scripted) as server:
        settings = {"max_queue_s": MAX_QUEUE_S, "request_log": str(log)}
        async with running_gateway(engine=url_of(server), **settings) as gateway:
            engine = gateway.app.flow.engine
            await gateway.until(lambda: engine.up and engine.reporting)
            for listening in server.servers:
                listening.close()  # connections that are open stay so: health checks have one
            # A request takes the connection that is open to the engine; the others find none.
            first = asyncio.create_task(gateway.chat("first"))
            await scripted.until(lambda scripted: len(scripted.bodies) == 1)
            answers = await asyncio.gather(*(gateway.chat(f"a{number}") for number in range(CLIENTS)))
            assert engine.up, "its health is as good as ever"
            assert {answer.status_code for answer in answers} == {504}
            scripted.go.set()
            assert (await first).status_code == 200
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    retries = [line["retries"] for line in lines if line["status"] == 504]
    assert len(retries) == CLIENTS
    assert any(retries), "the engine was tried again"
    assert max(retries) <= MOST_TRIES
