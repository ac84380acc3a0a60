"""What an agent that waits takes of memory, apart from its connection: `python -m tests.benchmarks.waiting_memory [AGENTS]`.

Each agent has one short task, in the queue of a whole gateway without an engine. Resident bytes of the process for each,
after as many as warm it up.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import msgspec

from gateway.app import create_app
from gateway.config.settings import GatewaySettings
from gateway.flowcontrol import Arriving
from gateway.flowcontrol.fairqueue import TaskId
from gateway.protocol.body import parse_body
from gateway.protocol.texts import content_of
from gateway.relay.dispatcher import now
from gateway.replay import environment

AGENTS, WARM = 20_000, 500
PAGE = 4096
BODY = b'{"model":"m","messages":[{"role":"user","content":"summarize chapter %d of the book, in three sentences"}]}'


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


async def measure(agents: int) -> float:
    """Bytes for each agent."""
    settings = GatewaySettings(engine="http://127.0.0.1:1", state="memory:", max_waiting=10**6, max_in_flight=1)
    app = await create_app(settings)
    app.flow.engine_checked(now(), is_up=True)
    before = 0
    for number in range(WARM + agents):
        if number == WARM:
            gc.collect()
            before = resident_bytes()
        body = parse_body(BODY % number)
        name = f"agent-{number:06d}"
        content = content_of(body)
        app.dispatcher.submit(Arriving(TaskId(number), "default", name, "x-agent-id", content, body_bytes=body.size))
    gc.collect()
    return (resident_bytes() - before) / agents


def main() -> None:
    agents = int(sys.argv[1]) if len(sys.argv) > 1 else AGENTS
    found = {"agents": agents, "bytes_each": round(asyncio.run(measure(agents)))}
    report = {**found, "versions": environment.versions(), "machine": environment.machine()}
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")


if __name__ == "__main__":
    main()
