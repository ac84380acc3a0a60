"""What is known of an agent while it lives, and how it is kept over a restart."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.fairness import AgentId, Iterations, Standing
from gateway.state import AgentState
from predictor.features import SCHEMA
from predictor.types import AgentPrediction, AgentProgress, FinishedTask, Sketch


def agent_id_of(tenant: str, name: str) -> AgentId:
    """A name counts only together with its tenant, whose own name has no slash."""
    return AgentId(f"{tenant}/{name}")


@dataclass(slots=True)
class AgentRecord:
    """Times in seconds of a monotonic clock, but for `idle_since`: iterations of the service clock. run: the name that the
    store has for it. schema: of the rows of its tasks, if they are of one."""

    id: AgentId
    name: str  # what the client calls it
    source: str
    agent_class: str | None
    tenant: str
    first_arrival_s: float
    last_end_s: float
    arrived_at: float  # the same as `first_arrival_s`, in seconds since 1970
    run: str
    schema: str = SCHEMA
    aliases: set[str] = field(default_factory=set)  # its sub-agents
    tasks_arrived: int = 0
    tasks_settled: int = 0  # answered, or not
    final: bool = False
    whole: bool = True  # every task so far was answered: only then its cost says what such an agent costs
    predicted: float | None = None  # Ĉ at its first release
    prediction: AgentPrediction | None = None  # at the last of its arrivals
    judged: AgentPrediction | None = None  # the one by which it was first released
    awaited: int = 0  # tasks that have ended, and of which the engine has not said yet what they held
    idle_since: Iterations | None = None  # it waits for its tool, or has ended
    tasks: list[FinishedTask] = field(default_factory=list)
    tasks_accepted: int = 0
    cost_ended: float = 0.0  # of `tasks`
    returns: int = 0  # how often it came back after it had nothing left to do
    expected_tasks: int | None = None
    opening: Sketch | None = None  # of its first task, and of its last
    latest: Sketch | None = None

    def progress(self, cost_arrived: float) -> AgentProgress:
        return AgentProgress(
            self.agent_class,
            self.tenant,
            self.tasks_accepted,
            len(self.tasks),
            cost_arrived,
            self.cost_ended,
            self.returns,
            self.expected_tasks,
            self.opening,
            self.latest,
        )


def state_of(record: AgentRecord, standing: Standing, journal: str) -> AgentState:
    """Without its tasks, which are written once each, and without the sketches: the next task that comes is its opening then.
    journal: whose writes it."""
    return AgentState(
        run=record.run,
        journal=journal,
        id=record.id,
        name=record.name,
        tenant=record.tenant,
        source=record.source,
        standing=standing,
        arrived_at=record.arrived_at,
        last_end_at=record.arrived_at + record.last_end_s - record.first_arrival_s,
        settled=record.tasks_settled,
        answered=len(record.tasks),
        agent_class=record.agent_class,
        final=record.final,
        whole=record.whole,
        returns=record.returns,
        expected_tasks=record.expected_tasks,
        predicted=record.predicted,
        prediction=record.prediction,
        judged=record.judged,
        schema=record.schema,
        aliases=sorted(record.aliases),
    )


def record_of(state: AgentState, first_arrival_s: float) -> AgentRecord:
    """With its tasks, as if those that had not ended had never come. first_arrival_s: `arrived_at` on the monotonic clock."""
    return AgentRecord(
        AgentId(state.id),
        state.name,
        state.source,
        state.agent_class,
        state.tenant,
        first_arrival_s,
        first_arrival_s + state.last_end_at - state.arrived_at,
        state.arrived_at,
        state.run,
        schema=state.schema if state.schema == SCHEMA else "",  # of two schemas they are of none
        aliases=set(state.aliases),
        tasks_arrived=state.settled,
        tasks_settled=state.settled,
        final=state.final,
        whole=state.whole,
        predicted=state.predicted,
        prediction=state.prediction,
        judged=state.judged,
        tasks=list(state.tasks),
        tasks_accepted=state.settled,
        cost_ended=sum(task.cost for task in state.tasks),
        returns=state.returns,
        expected_tasks=state.expected_tasks,
    )
