"""The commands `justitia predictor …` and `justitia export`: what was learned, for people."""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field
from rich.console import Console

from gateway.learning.export import traced
from gateway.settings import StateSettings
from gateway.state import StateError, Store, open_store
from gateway.trace import AgentTrace, TraceError, encode

console = Console(stderr=True, highlight=False, soft_wrap=True)


class ExportSettings(StateSettings):
    """`justitia export`: the agents that a gateway served, as a trace for `justitia replay`."""

    out: Path | None = Field(None, description="File for the trace; default: standard output.")
    text: bool = Field(False, description="With the texts of requests, where the gateway kept them (--keep-text).")
    since: datetime | None = Field(
        None, description="Only agents that arrived then or later: a date, or a date and time, in UTC unless it says."
    )


async def run_export(settings: ExportSettings) -> int:
    """0; 1 when there is nothing to write, or it cannot be read or written; 2 when there can be no such state."""
    since = -math.inf
    if settings.since is not None:
        since = (settings.since if settings.since.tzinfo else settings.since.replace(tzinfo=UTC)).timestamp()
    if (store := _kept("export", settings)) is None:
        return 2
    try:
        agents = await traced(store.read(), text=settings.text, since=since)
        if not agents:
            console.print("justitia export: no agents are kept" + ("" if settings.since is None else " since then"))
            return 1
        _write(agents, settings.out)
    except (StateError, TraceError, OSError) as error:
        console.print(f"justitia export: {error}", markup=False)
        return 1
    finally:
        await store.close()
    tasks = sum(len(agent.tasks) for agent in agents)
    console.print(f"{len(agents)} agents, {tasks} tasks", markup=False)
    return 0


def _write(agents: list[AgentTrace], out: Path | None) -> None:
    """A file is there as a whole or not at all. Raises `TraceError` and `OSError`."""
    lines = (encode(agent) + b"\n" for agent in agents)
    if out is None:
        sys.stdout.buffer.writelines(lines)
        sys.stdout.buffer.flush()
        return
    new = out.with_name(out.name + ".new")
    try:
        with new.open("wb") as file:
            file.writelines(lines)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)


def _kept(command: str, settings: StateSettings) -> Store | None:
    """The store, if it can hold anything; else it is said why not."""
    if settings.state == "memory:":
        console.print(
            f"justitia {command}: what is kept in memory ends with its gateway: --state names a file or a Redis"
        )
        return None
    path = settings.state.removeprefix("sqlite:///")
    if path != settings.state and not Path(path).expanduser().exists():
        console.print(f"justitia {command}: there is no state {path}", markup=False)
        return None
    return open_store(settings.state)
