"""What flow control takes and returns: times, the facts of a request, how a task ended, and what is then to be done."""

from __future__ import annotations

from typing import NamedTuple, NewType

import msgspec

from gateway.flowcontrol.fairqueue import Release, TaskId
from gateway.flowcontrol.records import AgentRecord, Step
from gateway.protocol.errors import GatewayError, Outcome
from gateway.protocol.usage import Usage
from predictor.types import FinishedAgent, FinishedTask, TaskContent

EngineId = NewType("EngineId", str)
# The engine of a gateway that has one.
ENGINE = EngineId("engine")


class Now(NamedTuple):
    """The time of a call, as its driver reads it."""

    ns: int  # of a monotonic clock
    wall_s: float  # since 1970

    @property
    def s(self) -> float:
        return self.ns / 1e9


class Arriving(msgspec.Struct, frozen=True):
    """The facts of one request."""

    id: TaskId  # grows with arrival, also over restarts
    tenant: str
    agent: str  # the root that its tenant's client names
    source: str  # where that name stood
    content: TaskContent
    alias: str | None = None  # the sub-agent, where the request is a sub-agent's
    agent_class: str | None = None
    weight: float = 1.0  # of the agent, if it is new
    expected_tasks: int | None = None
    final: bool = False  # no further task of this agent will come
    prompts: int = 1
    decodes: bool = True  # else the prompt is only read
    counted: bool = True  # the engine reports it by its number
    body_bytes: int = 0
    arrived_s: float | None = None  # on the monotonic clock; None: now


class Ending(msgspec.Struct, frozen=True):
    """How a task ended, as far as its driver has seen."""

    outcome: Outcome
    usage: Usage | None = None
    events: int = 0  # of a stream, that were relayed
    made: bool = False  # the engine finished the answer, though it has not all been passed on
    prompt: str | None = None  # texts to be kept with the task
    system: str | None = None


class Settlement(msgspec.Struct, frozen=True):
    """What a task turned out to cost."""

    cost: float  # charged, in KV token·iterations
    finished: FinishedTask | None  # None for a task that was not completed


class Charged(NamedTuple):
    """A completed task of an agent, for the metrics."""

    tenant: str
    agent_class: str | None
    task: FinishedTask


class Ended(NamedTuple):
    """An agent that has ended."""

    record: AgentRecord
    jct_s: float  # from its first arrival to the end of its last task
    backlog_tag: float  # the virtual time at which the reference has served all of it
    finished: FinishedAgent | None  # None where a task was not completed: there is nothing to learn from it


class Rejected(NamedTuple):
    """A task that is handed back while it waits."""

    task_id: TaskId
    error: GatewayError


class Effects(msgspec.Struct):
    """What a call wants done. The driver does all of it before it calls again."""

    releases: list[Release] = []  # tasks to be sent to the engine, in order
    revised: list[Release] = []  # tasks at the engine whose rank has changed
    keep: dict[str, int] = {}  # agents, and iterations for which to keep their KV
    steps: list[Step] = []  # for the journal, before the end of an answer is sent
    completed: list[Charged] = []  # tasks, as their usage reports them
    charged: list[Charged] = []  # tasks whose cost will not change any more
    ended: list[Ended] = []
