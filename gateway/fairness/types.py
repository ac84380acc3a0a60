"""Units, and the things that the fair queue holds."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NewType

AgentId = NewType("AgentId", str)
TaskId = NewType("TaskId", int)  # grows with arrival

KvTokenIterations = NewType("KvTokenIterations", float)  # work: one token of KV held for one engine iteration
Iterations = NewType("Iterations", float)  # the service clock τ
VirtualTime = NewType("VirtualTime", float)  # work per unit of weight


class QueueError(ValueError):
    """A call that the queue does not allow in its present state. Nothing has changed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One inference request, as predicted at its arrival."""

    id: TaskId
    agent_id: AgentId
    cost: KvTokenIterations  # ĉ
    memory_tokens: float  # p + d̂: the KV it will hold at its end


@dataclass(frozen=True, slots=True)
class Release:
    """A task to be sent to the engine now, with the rank that the engine is to honour: the smallest first."""

    task: Task
    rank: float


@dataclass(frozen=True, slots=True)
class ReleaseLimits:
    """When the engine is full enough.

    beta: the share of the KV cache that the predicted memory of what is in flight may take. Above 1, since not all tasks
        are at their end at once; 1.1 measured best.
    engine_waiting: tasks in the engine's own queue above which none is released.
    in_flight: tasks at the engine at once (its `max_num_seqs`); None for no limit.
    """

    beta: float = 1.1
    engine_waiting: int = 4
    in_flight: int | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.engine_waiting < 0 or (self.in_flight is not None and self.in_flight < 1):
            raise ValueError(f"release limits out of range: {self}")


@dataclass(slots=True, eq=False)
class Agent:
    """The tasks of one run of one program: the unit of fairness."""

    id: AgentId
    seq: int  # arrival order among agents
    weight: float
    predicted: KvTokenIterations  # Ĉ
    arrived: KvTokenIterations = KvTokenIterations(0.0)  # A: predicted costs of its tasks, true ones as they end
    finish_tag: VirtualTime = VirtualTime(0.0)  # F
    forming: bool = True  # none of its tasks has been released yet
    waiting: dict[TaskId, Task] = field(default_factory=dict)
    in_flight: dict[TaskId, Task] = field(default_factory=dict)
    place: tuple[float, int] | None = None  # where it stands in the queue's order; None: nothing waits
    _arrivals: list[TaskId] = field(default_factory=list)  # heap over `waiting`; ids of tasks that left are skipped

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.in_flight)

    def head(self) -> Task | None:
        """The task of this agent that goes next: the one that arrived first."""
        while self._arrivals and self._arrivals[0] not in self.waiting:
            heapq.heappop(self._arrivals)
        return self.waiting[self._arrivals[0]] if self._arrivals else None

    def wait(self, task: Task) -> None:
        self.waiting[task.id] = task
        heapq.heappush(self._arrivals, task.id)
