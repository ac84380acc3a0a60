"""What is kept, and the steps that change it."""

from __future__ import annotations

import msgspec

from gateway.fairness import Standing
from predictor.types import AgentPrediction, FinishedAgent, FinishedTask

HOUR_S = 3600


class StateError(Exception):
    """The store could not be read or written."""


class BatchRefused(StateError):
    """The store can never hold this batch: there is no use in trying again."""


class TenantUsage(msgspec.Struct, frozen=True):
    """What was used: tokens as the engine's usage counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0  # as charged, in KV token·iterations


class UsageRow(msgspec.Struct, frozen=True):
    """What a tenant has used in an hour; see `TenantUsage`."""

    tenant: str
    hour: int  # its start in UTC, in seconds since 1970
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0

    def plus(self, other: UsageRow) -> UsageRow:
        """The sum with another row of the same tenant and hour."""
        return UsageRow(
            self.tenant,
            self.hour,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.kv_cost + other.kv_cost,
        )


class AgentState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A live agent: what brings it back after a restart, and what makes it a finished one when it ends."""

    run: str  # names this agent alone, whereas an id may come again
    journal: str  # id of the journal of its gateway
    id: str
    name: str  # as the client calls it
    tenant: str
    source: str
    standing: Standing
    # Seconds since 1970.
    arrived_at: float
    last_end_at: float
    settled: int  # tasks that have ended
    answered: int  # those that ended with an answer, which are kept
    agent_class: str | None = None
    final: bool = False
    whole: bool = True  # every settled task was answered, and is kept: only then is it learned from
    returns: int = 0
    expected_tasks: int | None = None
    predicted: float | None = None  # cost of the whole agent at its first release, from `judged`
    prediction: AgentPrediction | None = None  # the latest
    judged: AgentPrediction | None = None  # the one at the first release
    schema: str = ""  # of all of its tasks' rows; empty if they differ
    aliases: list[str] = []
    tasks: list[FinishedTask] = []  # empty but where a store returns the agent


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step: what the settling of a task changes, or the end of an agent. It is written whole, or not at all."""

    agent: AgentState | None = None  # as it is now
    first: bool = False  # no step before had the agent
    task: FinishedTask | None = None
    place: int = 0  # of the task, among the answered ones of its agent
    over: bool = False  # the agent has ended
    usage: UsageRow | None = None  # is added
    run: str = ""  # of the task's agent, where there is no `agent`
    sample: bytes = b""  # a finished agent, packed


def hour_of(seconds: float) -> int:
    return int(seconds // HOUR_S) * HOUR_S


def finished(agent: AgentState, tasks: list[FinishedTask]) -> FinishedAgent:
    """An ended agent as it is learned from."""
    in_order = sorted(tasks, key=lambda task: task.arrived_s)
    return FinishedAgent(
        agent.agent_class,
        agent.tenant,
        in_order,
        agent.schema,
        agent.arrived_at,
        agent.standing.weight,
        agent.expected_tasks,
    )
