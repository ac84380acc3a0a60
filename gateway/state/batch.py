"""Many steps as one: of each agent its last state, of each sum the total, and agents that began and ended as finished ones.

A batch is what a store is given. It has the id of its journal and a number, and can be turned into steps again: so a backlog is
compacted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from gateway.flowcontrol.records import AgentRecord, Step, UsageRow, finished
from gateway.state.blobs import pack
from gateway.state.frames import HEADER, framed
from gateway.state.types import StateError
from predictor.types import FinishedTask

Tasks = dict[int, FinishedTask]  # by their places


@dataclass(slots=True)
class Batch:
    """What a store applies as a whole, or not at all."""

    # Together its id; without a journal it has none, and is applied each time.
    journal: str = ""
    number: int = 0
    # Live agents, by run.
    agents: dict[str, AgentRecord] = field(default_factory=dict)
    # Runs of those that began in this batch, so that no store has them yet.
    began: set[str] = field(default_factory=set)
    # By run, of the agents in `agents` and `over`.
    tasks: dict[str, Tasks] = field(default_factory=dict)
    # Agents that have ended, and of which the store may have something, by run.
    over: dict[str, AgentRecord] = field(default_factory=dict)
    # Finished agents, packed.
    samples: list[bytes] = field(default_factory=list)
    # By tenant and hour.
    usage: dict[tuple[str, int], UsageRow] = field(default_factory=dict)


def fold(records: Iterable[Step], journal: str = "", number: int = 0) -> Batch:
    """The batch that comes to the same as these steps."""
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


def sample_of(agent: AgentRecord, tasks: Mapping[int, FinishedTask]) -> bytes | None:
    """An ended agent as a finished one, packed; None if there is nothing to learn from it, or tasks are missing."""
    if not agent.whole or not agent.answered or len(tasks) != agent.answered:
        return None
    try:
        return pack(finished(agent, [tasks[place] for place in sorted(tasks)]))
    except StateError:
        return None


def records_of(batch: Batch) -> Iterator[Step]:
    """The fewest steps that come to the same as a batch."""
    for row in batch.usage.values():
        yield Step(usage=row)
    for sample in batch.samples:
        yield Step(sample=sample)
    for run, tasks in batch.tasks.items():
        for place, task in tasks.items():
            yield Step(run=run, task=task, place=place)
    for run, agent in batch.agents.items():
        yield Step(agent=agent, first=run in batch.began)
    for agent in batch.over.values():
        yield Step(agent=agent, over=True)


def compact(records: Iterable[Step], *, kept_agents: int, limit_bytes: int) -> tuple[bytes, int]:
    """The fewest steps that come to the same, as a file; and how many agents were dropped to stay below the limit.

    Finished agents are dropped first, the oldest before the others: they are only learned from. Then the tasks of live agents,
    which then are not learned from. What was used, and the states of agents, stay whatever their size: a row for each tenant
    and hour, and one for each agent. More finished agents than a store keeps do not count as dropped."""
    batch = fold(records)
    del batch.samples[:-kept_agents]
    data, dropped = framed(records_of(batch)), 0
    if len(data) > limit_bytes:
        surplus = len(data) - limit_bytes
        while batch.samples and surplus > 0:
            surplus -= len(batch.samples.pop(0))
            dropped += 1
        if surplus > 0:
            dropped += len(batch.tasks)
            for run in batch.tasks:
                for agents in (batch.agents, batch.over):
                    if run in agents:
                        agents[run] = msgspec.structs.replace(agents[run], whole=False)
            batch.tasks.clear()
        data = framed(records_of(batch))
    return data if len(data) > len(HEADER) else b"", dropped


def _end(batch: Batch, agent: AgentRecord) -> None:
    """An agent that began and ended within this batch is a finished one, or nothing. The store has more of the others."""
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
