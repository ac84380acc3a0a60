"""What became of an agent: its record while it lives, and what is learned when it ends.

An agent ends when the client has said so (`X-Agent-Final`) and nothing of it is left, when it has been silent for long
enough, or, if it had no id, with its only task. Then its completion time is measured, the predictor learns from it, the
store keeps it, and the queue forgets it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from gateway.accuracy import Accuracy, kind
from gateway.estimate import Estimate
from gateway.fairness import AgentId, FairQueue, Iterations, TaskId
from gateway.identify import Identity
from gateway.metrics import Metrics
from gateway.state import StateError, Store
from gateway.tool_waits import ToolWaits
from predictor.features import SCHEMA, Sketch
from predictor.types import AgentPrediction, AgentProgress, FinishedAgent, FinishedTask, Predictor

logger = logging.getLogger(__name__)

# Agents that are learned from again at a start: as many as the ladder can make something of.
RECALLED = 2000


def agent_id_of(tenant: str, name: str) -> AgentId:
    """A name counts only together with its tenant, whose own name has no slash."""
    return AgentId(f"{tenant}/{name}")


@dataclass(slots=True)
class AgentRecord:
    """Times in seconds of a monotonic clock, but for `idle_since`: iterations of the service clock."""

    id: AgentId
    name: str  # what the client calls it
    source: str
    agent_class: str | None
    tenant: str
    first_arrival_s: float
    last_end_s: float
    arrived_at: float  # the same as `first_arrival_s`, in seconds since 1970
    tasks_arrived: int = 0
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


class Feedback:
    """clock: seconds, monotonic; wall: since 1970. now: the service clock τ. keep: told of an agent that waits for its tool,
    with the KV tokens of its last task, and its class. correct: of one that was charged so much too little, in
    token·iterations."""

    def __init__(
        self,
        queue: FairQueue,
        predictor: Predictor,
        store: Store,
        metrics: Metrics,
        accuracy: Accuracy,
        *,
        now: Callable[[], Iterations],
        waits: ToolWaits,
        keep: Callable[[AgentId, float, str | None], None],
        correct: Callable[[AgentId, float], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.records: dict[AgentId, AgentRecord] = {}
        self._queue, self._predictor, self._store, self._metrics = queue, predictor, store, metrics
        self._accuracy = accuracy
        self._now, self._clock, self._wall = now, clock, wall
        self._waits, self._keep, self._correct = waits, keep, correct
        self.awaited: dict[TaskId, tuple[AgentRecord, int]] = {}  # with the place among the agent's tasks
        self._writes: set[asyncio.Task[None]] = set()

    async def recall(self) -> int:
        """Learn what the store has kept; the number of agents."""
        try:
            agents = await self._store.newest(RECALLED)
        except StateError as error:
            self._state_failed(error)
            return 0
        self._metrics.state_is(unreadable=self._store.unreadable)
        for agent in agents:
            self._learn(agent)
        return len(agents)

    def arrived(self, tenant: str, name: str, identity: Identity) -> AgentRecord:
        """A task has come, of the agent that its tenant calls so."""
        agent_id = agent_id_of(tenant, name)
        record = self.records.get(agent_id)
        if record is None:
            now = self._clock()
            record = AgentRecord(agent_id, name, identity.source, identity.agent_class, tenant, now, now, self._wall())
            self.records[agent_id] = record
        record.tasks_arrived += 1
        record.agent_class = record.agent_class or identity.agent_class
        record.expected_tasks = identity.expected_tasks or record.expected_tasks
        return record

    def accepted(self, record: AgentRecord, estimate: Estimate, *, final: bool) -> None:
        """That task is in the queue."""
        record.final = record.final or final
        record.tasks_accepted += 1
        record.prediction = estimate.agent
        record.latest = estimate.sketch
        record.opening = estimate.sketch if record.opening is None else record.opening
        if record.idle_since is not None:
            record.returns += 1
            self._waits.came_back(record.agent_class, self._now() - record.idle_since)
            record.idle_since = None

    def withdrawn(self, record: AgentRecord) -> None:
        """That task was refused before it was enqueued."""
        record.tasks_arrived -= 1
        if record.tasks_arrived == 0:
            self.records.pop(record.id, None)

    def released(self, record: AgentRecord, predicted: float) -> None:
        if record.predicted is None:
            record.predicted, record.judged = predicted, record.prediction

    def placed(self, record: AgentRecord, finished: FinishedTask, arrived_s: float, row: bytes) -> FinishedTask:
        """A task that ends now, with its place in its agent's life."""
        begin_s = record.first_arrival_s
        return msgspec.structs.replace(
            finished, arrived_s=max(0.0, arrived_s - begin_s), ended_s=self._clock() - begin_s, row=row
        )

    def ended(self, record: AgentRecord, finished: FinishedTask | None, awaited: TaskId | None = None) -> None:
        """A task of this agent is over: answered, with what it used, or not. awaited: the engine will say under this number
        what the task held, if it has not yet."""
        record.last_end_s = self._clock()
        if finished is None:
            record.whole = False
        else:
            record.tasks.append(finished)
            record.cost_ended += finished.cost
            self._metrics.task_ended(record.agent_class, finished.prompt_tokens, finished.decode_tokens)
            if finished.held is None and awaited is not None:
                self.awaited[awaited] = record, len(record.tasks) - 1
                record.awaited += 1
            else:
                self._metrics.task_charged(record.agent_class, finished)
        if self._is_busy(record.id):
            return
        if record.final:
            if not record.awaited:  # else the sweep will, or the engine's word
                self._end(record)
        elif finished is not None:
            record.idle_since = self._now()
            self._keep(record.id, finished.prompt_tokens + finished.decode_tokens, record.agent_class)

    def held(self, task_id: TaskId, cost: float) -> None:
        """The engine says what a task held that had been charged by the formula: the answer was faster."""
        record, place = self.awaited.pop(task_id)
        record.awaited -= 1
        charged = record.tasks[place]
        finished = record.tasks[place] = msgspec.structs.replace(charged, held=cost)
        self._metrics.task_charged(record.agent_class, finished)
        record.cost_ended += finished.cost - charged.cost
        self._correct(record.id, finished.cost - charged.cost)
        if record.final and not record.awaited and not self._is_busy(record.id):
            self._end(record)

    def sweep(self, idle_s: float) -> None:
        """End the agents that have been silent for `idle_s` seconds, or have said that they are done."""
        silent_since = self._clock() - idle_s
        for record in [r for r in self.records.values() if r.final or r.last_end_s <= silent_since]:
            if not self._is_busy(record.id):
                self._end(record)

    async def flush(self) -> None:
        """Wait until what was learned is in the store."""
        await asyncio.gather(*self._writes)

    def _is_busy(self, agent_id: AgentId) -> bool:
        agent = self._queue.agents.get(agent_id)
        return agent is not None and agent.busy

    def _end(self, record: AgentRecord) -> None:
        del self.records[record.id]
        if record.awaited:
            for task_id in [task_id for task_id, (whose, _) in self.awaited.items() if whose is record]:
                _, place = self.awaited.pop(task_id)
                self._metrics.task_charged(record.agent_class, record.tasks[place])
        if record.idle_since is not None:
            self._waits.ended(record.agent_class)
        known = self._queue.agents.get(record.id)
        if known is not None:
            self._queue.evict(self._now(), record.id)
        if not record.whole or not record.tasks:
            return
        in_order = sorted(record.tasks, key=lambda task: task.arrived_s)
        agent = FinishedAgent(
            record.agent_class,
            record.tenant,
            in_order,
            SCHEMA,
            record.arrived_at,
            1.0 if known is None else known.weight,
            record.expected_tasks,
        )
        self._metrics.agent_finished(record.agent_class, record.last_end_s - record.first_arrival_s)
        self._judge(record, agent.cost)
        self._learn(agent)
        write = asyncio.get_running_loop().create_task(self._append(agent))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    def _judge(self, record: AgentRecord, cost: float) -> None:
        if record.predicted is None or record.judged is None:
            return
        by = record.judged
        judged = self._accuracy.judge(by.source, record.predicted, max(by.p90, record.predicted), cost)
        if judged is not None:
            self._metrics.agent_judged(
                kind(by.source), judged.observed / judged.predicted, below_p90=judged.observed <= judged.p90
            )

    def _learn(self, agent: FinishedAgent) -> None:
        try:
            self._predictor.learn(agent)
        except Exception:
            logger.exception("the predictor failed to learn from an agent")

    async def _append(self, agent: FinishedAgent) -> None:
        try:
            await self._store.append(agent)
        except StateError as error:
            self._state_failed(error)

    def _state_failed(self, error: StateError) -> None:
        self._metrics.state_failed()
        logger.warning("the state store failed, and the gateway goes on without it: %s", error)
