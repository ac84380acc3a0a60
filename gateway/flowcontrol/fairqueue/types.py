"""Units, and the objects that the fair queue holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, NewType

from gateway.flowcontrol.fairqueue.order import Order

TenantId = NewType("TenantId", str)
AgentId = NewType("AgentId", str)
TaskId = NewType("TaskId", int)  # grows with arrival

KvTokenIterations = NewType("KvTokenIterations", float)  # work: one token of KV held for one engine iteration
Iterations = NewType("Iterations", float)  # the service clock τ
VirtualTime = NewType("VirtualTime", float)  # work per unit of weight

NO_TENANT = TenantId("")


class QueueError(ValueError):
    """A call that the queue does not allow in its present state. Nothing has changed."""


class Task(NamedTuple):
    """One inference request, as predicted at its arrival."""

    id: TaskId
    agent_id: AgentId
    cost: KvTokenIterations  # ĉ
    memory_tokens: float  # p + d̂: the KV that it will hold at its end
    prompt_tokens: float = 0.0  # p
    sequences: int = 1  # decoded side by side


class Spent(NamedTuple):
    """What a task really took. Tokens are None where no more is known than the engine's reports so far."""

    cost: KvTokenIterations
    prompt_tokens: float | None = None
    output_tokens: float | None = None


class Release(NamedTuple):
    """A task that goes to the engine now, with the rank that the engine is to order by: the smallest first."""

    task: Task
    rank: float


@dataclass(frozen=True, slots=True)
class ReleaseLimits:
    """The limits up to which tasks are released to the engine."""

    # Share of the KV cache that the tasks in flight may hold.
    beta: float = 1.0
    # True: their predicted peak counts. False: only what they hold now, as for an engine that knows no lengths.
    foresight: bool = True
    # Tasks in the engine's own queue above which none is released; None for no limit.
    engine_waiting: int | None = 4
    # Tasks at the engine at once (its `max_num_seqs`); None for no limit.
    in_flight: int | None = None
    # Ranks by which a task in flight has to come later for an urgent one to be released though it does not fit, since the
    # engine will displace the later one; None if the engine does not displace.
    displace_margin: float | None = None

    def __post_init__(self) -> None:
        if not (
            self.beta > 0
            and (self.engine_waiting is None or self.engine_waiting >= 0)
            and (self.in_flight is None or self.in_flight >= 1)
        ):
            raise ValueError(f"release limits out of range: {self}")


@dataclass(slots=True, eq=False)
class Flight:
    """A task at the engine, with what has been counted for it so far."""

    task: Task
    rank: float  # as the engine knows it
    lasting_rank: float  # its rank under a policy that does not revise
    tenant_tag: VirtualTime  # S of its tenant when it was released
    agent_released: KvTokenIterations  # work of its agent that was released before it
    prompt_tokens: float
    output_tokens: float = 0.0
    attained: KvTokenIterations = KvTokenIterations(0.0)


@dataclass(slots=True, eq=False)
class Tenant:
    """The owner of agents: the outer level of sharing."""

    id: TenantId
    seq: int
    weight: float
    start_tag: VirtualTime = VirtualTime(0.0)  # outer virtual time that its released work amounts to
    order: Order[AgentId] = field(default_factory=Order)  # its agents with waiting tasks


@dataclass(slots=True, eq=False)
class Agent:
    """The tasks of one run of one program: the unit of fairness."""

    id: AgentId
    seq: int  # arrival order among agents
    tenant: Tenant
    weight: float
    predicted: KvTokenIterations  # Ĉ
    arrived: KvTokenIterations = KvTokenIterations(0.0)  # A: predicted costs of its tasks, true ones as they end
    released: KvTokenIterations = KvTokenIterations(0.0)  # of A: what has been released
    attained: KvTokenIterations = KvTokenIterations(0.0)  # of that: what the engine has done, by its reports
    unfinished: KvTokenIterations = KvTokenIterations(
        0.0
    )  # of A: predicted costs of its tasks that wait or are in flight
    prompt_tokens: float = 0.0  # released
    output_tokens: float = 0.0  # produced, by the engine's reports
    lift: float = 0.0  # used by one policy: see `vtc`
    start_tag: VirtualTime = VirtualTime(0.0)  # S
    idle_since: VirtualTime = VirtualTime(0.0)  # V when its last task ended
    finish_tag: VirtualTime = VirtualTime(0.0)  # F
    forming: bool = True  # none of its tasks has been released yet
    waiting: dict[TaskId, Task] = field(default_factory=dict)
    in_flight: dict[TaskId, Flight] = field(default_factory=dict)
    order: Order[TaskId] | None = None  # of its waiting tasks; made when a second one waits

    @property
    def left_to_release(self) -> float:
        """Predicted work that has not been released, in token·iterations."""
        return max(0.0, self.predicted - self.released)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.in_flight)

    def head(self) -> Task | None:
        """The task of this agent that goes next."""
        if self.order is None:
            return next(iter(self.waiting.values()), None)
        first = self.order.first()
        return None if first is None else self.waiting[first]

    def stop_waiting(self, task_id: TaskId) -> Task:
        """The task no longer waits. Raises `KeyError` for one that does not."""
        task = self.waiting.pop(task_id)
        if not self.waiting:
            self.order = None
        elif self.order is not None:
            self.order.remove(task_id)
        return task


@dataclass(frozen=True, slots=True)
class Standing:
    """All that the queue needs to put an agent back after a restart, as if its unfinished tasks had been given up unserved.

    Tags are counted from the virtual time at which the agent had nothing left to do, neither here nor in the reference: a
    restart ends the busy period, and V may begin anywhere.
    """

    weight: float
    predicted: KvTokenIterations  # Ĉ
    served: KvTokenIterations  # A, all of it released and attained
    start_tag: VirtualTime  # S
    prompt_tokens: float
    output_tokens: float
    lift: float
    forming: bool
