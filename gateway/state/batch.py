"""Many steps as one: of each agent its last state, of each sum the total, and who has come and gone as a finished agent.

A batch is what a store is given. It has the id of its journal and a number, and can be taken apart into steps again: so what
has to wait is written anew as less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from gateway.state.blobs import pack
from gateway.state.frames import HEADER, framed
from gateway.state.types import AgentState, Record, StateError, UsageRow, finished
from predictor.types import FinishedTask

Tasks = dict[int, FinishedTask]  # by their places


@dataclass(slots=True)
class Batch:
    """journal, number: its id; no journal, no id. agents: those that live, by run; began: of which no store can know yet.
    tasks: by run, of those that live and of `over`. over: those that have ended, and of which the store may have something.
    samples: finished agents, packed."""

    journal: str = ""
    number: int = 0
    agents: dict[str, AgentState] = field(default_factory=dict)
    began: set[str] = field(default_factory=set)
    tasks: dict[str, Tasks] = field(default_factory=dict)
    over: dict[str, AgentState] = field(default_factory=dict)
    samples: list[bytes] = field(default_factory=list)
    usage: dict[tuple[str, int], UsageRow] = field(default_factory=dict)


def fold(records: Iterable[Record], journal: str = "", number: int = 0) -> Batch:
    batch = Batch(journal, number)
    for record in records:
        if (usage := record.usage) is not None:
            key = usage.tenant, usage.hour
            known = batch.usage.get(key)
            batch.usage[key] = usage if known is None else known.plus(usage)
        if record.sample:
            batch.samples.append(record.sample)
        agent = record.agent
        run = agent.run if agent is not None else record.run
        if record.task is not None:
            batch.tasks.setdefault(run, {})[record.place] = record.task
        if agent is None:
            continue
        if record.first:
            batch.began.add(run)
        if record.over:
            _end(batch, agent)
        else:
            batch.agents[run] = agent
    return batch


def sample_of(agent: AgentState, tasks: Mapping[int, FinishedTask]) -> bytes | None:
    """Of an agent that has ended; None if there is nothing to learn from, or not all of it is here. Packed."""
    if not agent.whole or not agent.answered or len(tasks) != agent.answered:
        return None
    try:
        return pack(finished(agent, [tasks[place] for place in sorted(tasks)]))
    except StateError:
        return None


def records_of(batch: Batch) -> Iterator[Record]:
    """Steps that come to the same."""
    for row in batch.usage.values():
        yield Record(usage=row)
    for sample in batch.samples:
        yield Record(sample=sample)
    for run, tasks in batch.tasks.items():
        for place, task in tasks.items():
            yield Record(run=run, task=task, place=place)
    for run, agent in batch.agents.items():
        yield Record(agent=agent, first=run in batch.began)
    for agent in batch.over.values():
        yield Record(agent=agent, over=True)


def compact(records: Iterable[Record], *, kept_agents: int, limit_bytes: int) -> tuple[bytes, int]:
    """As little as it takes, as a file; and how many agents had to be given up to stay below the limit.

    Finished agents go first, the oldest before the others: they are only learned from. Then the tasks of those that live, who
    then are not learned from. What was used, and where agents stand, stays whatever it takes: a row for each tenant and
    hour, and one for each agent."""
    batch = fold(records)
    del batch.samples[:-kept_agents]
    data, given_up = framed(records_of(batch)), 0
    if len(data) > limit_bytes:
        surplus = len(data) - limit_bytes
        while batch.samples and surplus > 0:
            surplus -= len(batch.samples.pop(0))
            given_up += 1
        if surplus > 0:
            given_up += len(batch.tasks)
            for run in batch.tasks:
                for agents in (batch.agents, batch.over):
                    if run in agents:
                        agents[run] = msgspec.structs.replace(agents[run], whole=False)
            batch.tasks.clear()
        data = framed(records_of(batch))
    return data if len(data) > len(HEADER) else b"", given_up


def _end(batch: Batch, agent: AgentState) -> None:
    """Who came and went within this batch is a finished agent, or nothing. Of the others the store knows more."""
    run = agent.run
    batch.agents.pop(run, None)
    tasks = batch.tasks.get(run, {})
    sample = sample_of(agent, tasks)
    if sample is not None:
        batch.samples.append(sample)
        agent = msgspec.structs.replace(agent, whole=False)
    if not agent.whole:
        batch.tasks.pop(run, None)
    if run in batch.began:
        batch.began.discard(run)
    else:
        batch.over[run] = agent
