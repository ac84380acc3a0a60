"""The agent trace: JSON Lines, one agent a line, with all its tasks and how they depend on each other.

    {"agent_id":"a17","class":"map-reduce","tenant":"t1","weight":1.0,"arrival_s":12.5,
     "tasks":[{"id":"m1","prompt_tokens":700,"output_tokens":180},
              {"id":"r","after":["m1"],"think_s":0.4,"prompt_tokens":900,"output_tokens":300}]}

A task arrives `think_s` after the last of the tasks in `after` has ended; with no `after`, that long after its agent.
What its client says may be told too: the text of the user's messages (`prompt`), the system prompt (`system`), definitions
of tools as JSON (`tools`), a limit on the answer (`max_tokens`); of an agent, how many tasks to expect (`expected_tasks`,
the header `X-Agent-Tasks`). `prompt_tokens` counts system, tools and prompt together.
Nothing here is repaired or skipped: a line that does not fit is a `TraceError` with its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

# Far beyond any model's context; keeps a cost within what a float holds exactly.
MAX_TOKENS = 2**24

Seconds = Annotated[float, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
TokensAtLeastOne = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]


class TraceError(ValueError):
    """A trace that cannot be used. `line` counts from 1; it is None for a trace that did not come from lines."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")
        self.reason = reason
        self.line = line


class Prefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A beginning that tasks share: the first `tokens` tokens of every prompt with this id are the same. `parent`: the
    beginning of that beginning, shared with still more tasks."""

    id: Name
    tokens: Tokens
    parent: Prefix | None = None


class TaskTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One inference request. `cached_tokens` is what a recording observed, part of `prompt_tokens`; `max_tokens`: what the
    client sends as its limit, so no less than what came out; `tools`: each one's definition as JSON."""

    id: Name
    prompt_tokens: TokensAtLeastOne
    output_tokens: TokensAtLeastOne
    after: tuple[Name, ...] = ()
    think_s: Seconds = 0.0
    cached_tokens: Tokens = 0
    prompt: str | None = None
    prefix: Prefix | None = None
    system: str | None = None
    tools: tuple[str, ...] = ()
    max_tokens: TokensAtLeastOne | None = None

    @property
    def cost(self) -> int:
        """True cost in KV token·iterations, cached part included: `p·d + d(d+1)/2`."""
        return self.prompt_tokens * self.output_tokens + self.output_tokens * (self.output_tokens + 1) // 2


class AgentTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One agent; `arrival_s` counts from the start of the trace. An empty class or tenant means that none is told.
    `expected_tasks`: how many its client says there will be, rightly or not."""

    agent_id: Name
    arrival_s: Seconds
    tasks: Annotated[tuple[TaskTrace, ...], Meta(min_length=1)]
    agent_class: str = msgspec.field(name="class", default="")
    tenant: str = ""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    expected_tasks: Annotated[int, Meta(ge=1)] | None = None

    @property
    def cost(self) -> int:
        """True cost of all its tasks in KV token·iterations."""
        return sum(task.cost for task in self.tasks)


_decode = msgspec.json.Decoder(AgentTrace).decode
_encode = msgspec.json.Encoder().encode


def parse_trace(lines: Iterable[bytes | str]) -> Iterator[AgentTrace]:
    """Agents in the order of their lines. Empty lines are passed over. Raises `TraceError` at the first bad line."""
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            agent = _decode(line)
            check(agent)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise TraceError(str(error), number) from error
        except TraceError as error:
            raise TraceError(error.reason, number) from error
        if agent.agent_id in seen:
            raise TraceError(f"agent {agent.agent_id!r} was already on line {seen[agent.agent_id]}", number)
        seen[agent.agent_id] = number
        yield agent


def check(agent: AgentTrace) -> None:
    """What the field types cannot say. Raises `TraceError` without a line number."""
    for value in (agent.arrival_s, agent.weight, *(task.think_s for task in agent.tasks)):
        if not math.isfinite(value):
            raise TraceError(f"agent {agent.agent_id!r} has a number that is not finite")
    ids = {task.id for task in agent.tasks}
    if len(ids) < len(agent.tasks):
        raise TraceError(f"agent {agent.agent_id!r} has two tasks with the same id")
    for task in agent.tasks:
        if unknown := [name for name in task.after if name not in ids]:
            raise TraceError(
                f"task {task.id!r} comes after {unknown[0]!r}, which agent {agent.agent_id!r} does not have"
            )
        if task.cached_tokens > task.prompt_tokens:
            raise TraceError(f"task {task.id!r} has more cached tokens than prompt tokens")
        if task.max_tokens is not None and task.max_tokens < task.output_tokens:
            raise TraceError(f"task {task.id!r} has more output tokens than its limit of {task.max_tokens}")
        if task.prefix is not None and task.prefix.tokens > task.prompt_tokens:
            raise TraceError(f"task {task.id!r} has a prefix longer than its prompt")
        prefix = task.prefix
        while prefix is not None and prefix.parent is not None:
            if prefix.parent.tokens > prefix.tokens:
                raise TraceError(f"prefix {prefix.id!r} is shorter than its parent {prefix.parent.id!r}")
            prefix = prefix.parent
    try:
        TopologicalSorter({task.id: task.after for task in agent.tasks}).prepare()
    except CycleError as error:
        raise TraceError(f"tasks wait for each other: {' → '.join(error.args[1])}") from error


def read_trace(path: Path) -> list[AgentTrace]:
    """Raises `TraceError` (malformed, or no agent at all) and `OSError`."""
    with path.open("rb") as lines:
        agents = list(parse_trace(lines))
    if not agents:
        raise TraceError(f"{path} holds no agent")
    return agents


def encode(agent: AgentTrace) -> bytes:
    """One line, without its end. Raises `TraceError` for what a reader would refuse."""
    line = _encode(agent)
    # msgspec does not check structs made in Python, and writes NaN as null: the reader is the judge.
    for _ in parse_trace([line]):
        pass
    return line


def write_trace(agents: Iterable[AgentTrace], path: Path) -> None:
    """What `read_trace` would refuse is not written: raises `TraceError` first."""
    lines = [_encode(agent) for agent in agents]  # judged all together: two may have one name
    parsed = sum(1 for _ in parse_trace(lines))
    if parsed == 0:
        raise TraceError("a trace needs an agent")
    path.write_bytes(b"\n".join(lines) + b"\n")
