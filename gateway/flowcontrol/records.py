"""What is kept of agents, tasks and use, and the steps in which it comes to be.

A step is what the gateway's journal writes and its store takes: flow control returns steps, and does not know where they go.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gateway.flowcontrol.fairqueue import Standing
from predictor.types import AgentPrediction, FinishedAgent, FinishedTask

HOUR_S = 3600


class TenantUsage(msgspec.Struct, frozen=True):
    """What one task adds to its tenant's use."""

    requests: int = 0
    prompt_tokens: int = 0  # tokens as the engine's usage has them
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0  # charged, in KV token·iterations


class UsageRow(msgspec.Struct, frozen=True):
    """What a tenant has used in an hour."""

    tenant: str
    hour: int  # its start in UTC, in seconds since 1970
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0

    def plus(self, other: UsageRow) -> UsageRow:
        """The sum of two rows of the same tenant and hour."""
        return UsageRow(
            self.tenant,
            self.hour,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.kv_cost + other.kv_cost,
        )


class AgentRecord(msgspec.Struct, omit_defaults=True):
    """An agent that has not ended: what puts it back after a restart, and what makes it a finished agent when it ends."""

    run: str  # this agent and no other one; an id may come again
    journal: str  # of the gateway that wrote this
    id: str
    name: str  # the client's name for it
    tenant: str
    source: str  # where the client's request had the name
    standing: Standing | None
    arrived_at: float  # its first arrival, in seconds since 1970
    last_end_at: float  # when its last task ended, in seconds since 1970
    settled: int = 0  # tasks that have ended in any way
    answered: int = 0  # of those, the completed ones, which are kept
    agent_class: str | None = None
    final: bool = False  # the client says that no further task will come
    whole: bool = True  # every task so far was completed: only then its cost says what such an agent costs
    returns: int = 0  # how often it came back after it had nothing left to do
    expected_tasks: int | None = None
    predicted: float | None = None  # Ĉ at its first release, by `judged`
    prediction: AgentPrediction | None = None  # at its last arrival
    judged: AgentPrediction | None = None
    schema: str = ""  # of its tasks' rows, if they are all of one
    aliases: tuple[str, ...] = ()  # names of its sub-agents
    tasks: tuple[FinishedTask, ...] = ()  # empty, except in what a store returns


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the settlement of a task changes, or the end of an agent. All of it is to be written, or nothing."""

    agent: AgentRecord | None = None  # as it is now
    first: bool = False  # there was nothing of the agent before
    task: FinishedTask | None = None
    place: int = 0  # of the task among the completed ones of its agent
    over: bool = False  # the agent has ended
    usage: UsageRow | None = None  # to be added
    run: str = ""  # of the agent, where `agent` is absent
    sample: bytes = b""  # a finished agent, packed


def hour_of(seconds: float) -> int:
    """The start of the hour, in seconds since 1970."""
    return int(seconds // HOUR_S) * HOUR_S


def finished(agent: AgentRecord, tasks: Iterable[FinishedTask]) -> FinishedAgent:
    """What is learned from an agent that has ended."""
    return FinishedAgent(
        agent.agent_class,
        agent.tenant,
        sorted(tasks, key=lambda task: task.arrived_s),
        agent.schema,
        agent.arrived_at,
        1.0 if agent.standing is None else agent.standing.weight,
        agent.expected_tasks,
    )
