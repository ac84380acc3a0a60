"""What is kept, and the steps in which it comes to be."""

from __future__ import annotations

import msgspec

from gateway.flowcontrol.fairqueue import Standing
from predictor.types import AgentPrediction, FinishedAgent, FinishedTask

HOUR_S = 3600


class StateError(Exception):
    """The store could not be read or written."""


class BatchRefused(StateError):
    """What was to be written is what no store can hold: there is no use in trying again."""


class TenantUsage(msgspec.Struct, frozen=True):
    """Tokens as the engine's usage has them; kv_cost: what was charged, in KV token·iterations."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0


class UsageRow(msgspec.Struct, frozen=True):
    """What a tenant has used in an hour. hour: seconds since 1970, the start of an hour in UTC."""

    tenant: str
    hour: int
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    kv_cost: float = 0.0

    def plus(self, other: UsageRow) -> UsageRow:
        """Of the same tenant and hour."""
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
    """A live agent: what brings it back after a restart, and what makes it a finished one when it ends.

    run: this agent and no other one, whereas an id may come again. journal: of the gateway that has written it. name: the
    client's word for it. settled: its tasks that are over; answered: those of them that were answered, and are kept.
    arrived_at, last_end_at: seconds since 1970. predicted: Ĉ at its first release, by what `judged` says; prediction: the
    last one. schema: of its tasks' rows, if they are of one. tasks: empty but where a store gives it back.
    """

    run: str
    journal: str
    id: str
    name: str
    tenant: str
    source: str
    standing: Standing
    arrived_at: float
    last_end_at: float
    settled: int
    answered: int
    agent_class: str | None = None
    final: bool = False
    whole: bool = True
    returns: int = 0
    expected_tasks: int | None = None
    predicted: float | None = None
    prediction: AgentPrediction | None = None
    judged: AgentPrediction | None = None
    schema: str = ""
    aliases: list[str] = []
    tasks: list[FinishedTask] = []


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A step: what the settling of a task changes, or the end of an agent. Everything in it is to be written, or nothing.

    agent: as it is now; `first`, when there was nothing of it before; `over`, when it has ended. task: its task number `place`,
    among the answered ones; run: whose, where there is no `agent`. usage: is added. sample: a finished agent, packed.
    """

    agent: AgentState | None = None
    first: bool = False
    task: FinishedTask | None = None
    place: int = 0
    over: bool = False
    usage: UsageRow | None = None
    run: str = ""
    sample: bytes = b""


def hour_of(seconds: float) -> int:
    return int(seconds // HOUR_S) * HOUR_S


def finished(agent: AgentState, tasks: list[FinishedTask]) -> FinishedAgent:
    """What is learned from, when it has ended."""
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
