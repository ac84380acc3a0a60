"""What became of an agent: its record while it lives, and what is learned when it ends.

An agent ends when the client has said so (`X-Agent-Final`) and nothing of it is left, when it has been silent for long
enough, or, if it had no id, with its only task. Then its completion time is measured, the predictor learns from it, the
store keeps it, and the queue forgets it. Each step is in the journal before the client has the end of its answer, so that
a restart finds all of it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

import msgspec

from gateway.flowcontrol.agents import AgentRecord, agent_id_of, record_of, state_of
from gateway.flowcontrol.estimate import Estimate
from gateway.flowcontrol.fairqueue import AgentId, FairQueue, Iterations, QueueError, TaskId, TenantId
from gateway.flowcontrol.tool_waits import ToolWaits
from gateway.learning.accuracy import Accuracy, kind
from gateway.protocol.identify import Identity
from gateway.state import AgentState, Journal, Record, TenantUsage, UsageRow, finished
from gateway.telemetry.metrics import Metrics
from predictor.types import FinishedAgent, FinishedTask, Predictor

logger = logging.getLogger(__name__)

# Agents that are learned from again at a start: as many as the ladder can make something of.
RECALLED = 2000
# Of one agent's sub-agents, those that are remembered over a restart.
MAX_ALIASES = 256
# Agents that are learned in a row: then others get a turn.
ROW = 50


class Feedback:
    """clock: seconds, monotonic; wall: since 1970. now: the service clock τ. keep: told of an agent that waits for its tool,
    with the KV tokens of its last task, and its class. correct: of one that was charged so much too little, in
    token·iterations. charge: what a tenant used is on its account; what is then to be written. tenant_weight: of a tenant.
    restored: told of an agent that has come back."""

    def __init__(
        self,
        queue: FairQueue,
        predictor: Predictor,
        journal: Journal,
        metrics: Metrics,
        accuracy: Accuracy,
        *,
        now: Callable[[], Iterations],
        waits: ToolWaits,
        keep: Callable[[AgentId, float, str | None], None],
        correct: Callable[[AgentId, float], None],
        charge: Callable[[str, TenantUsage], UsageRow],
        tenant_weight: Callable[[str], float],
        restored: Callable[[AgentRecord], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.records: dict[AgentId, AgentRecord] = {}
        self._queue, self._predictor, self._journal, self._metrics = queue, predictor, journal, metrics
        self._accuracy = accuracy
        self._now, self._clock, self._wall = now, clock, wall
        self._waits, self._keep, self._correct = waits, keep, correct
        self._charge, self._tenant_weight, self._restored = charge, tenant_weight, restored
        self.awaited: dict[TaskId, tuple[AgentRecord, int]] = {}  # with the place among the agent's tasks

    async def recall(self) -> None:
        """Learn from the finished agents that the store has kept, and put the live ones back. Raises `StateError`."""
        store = self._journal.store
        agents, living = await store.newest(RECALLED), await store.agents()
        for number, agent in enumerate(agents):
            self._learn(agent)
            if number % ROW == ROW - 1:
                await asyncio.sleep(0)
        logger.info("learned from %d agents that the state store had kept", len(agents))
        living = [state for state in living if state.journal not in self._journal.others]
        newest = {state.id: state.run for state in sorted(living, key=lambda state: state.last_end_at)}
        for state in sorted(living, key=lambda state: state.arrived_at):
            self._restore(state, is_newest=newest[state.id] == state.run)
        logger.info("put %d agents back that had not ended", len(living))

    def rewrite(self) -> Iterator[Record]:
        """What a store has to have of the agents that live. Others may be served between two steps."""
        for record in list(self.records.values()):
            if self.records.get(record.id) is record and record.tasks_settled:
                yield Record(agent=self._state(record))
                for place, task in enumerate(record.tasks):
                    yield Record(run=record.run, task=task, place=place)

    def arrived(self, tenant: str, name: str, identity: Identity) -> AgentRecord:
        """A task has come, of the agent that its tenant calls so."""
        agent_id = agent_id_of(tenant, name)
        record = self.records.get(agent_id)
        if record is None:
            now = self._clock()
            run = self._journal.new_run()
            record = AgentRecord(
                agent_id, name, identity.source, identity.agent_class, tenant, now, now, self._wall(), run
            )
            self.records[agent_id] = record
        if identity.name is not None and identity.name != name and len(record.aliases) < MAX_ALIASES:
            record.aliases.add(identity.name)
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

    def ended(
        self,
        record: AgentRecord,
        finished: FinishedTask | None,
        awaited: TaskId | None = None,
        used: TenantUsage | None = None,
    ) -> None:
        """A task of this agent is over: answered, with what it used, or not. awaited: the engine will say under this number
        what the task held, if it has not yet. used: for its tenant's bill."""
        record.last_end_s = self._clock()
        record.tasks_settled += 1
        if finished is None:
            record.whole = False
        else:
            record.tasks.append(finished)
            record.cost_ended += finished.cost
            self._metrics.agents.task_ended(
                record.tenant, record.agent_class, finished.prompt_tokens, finished.decode_tokens
            )
            if finished.held is None and awaited is not None:
                self.awaited[awaited] = record, len(record.tasks) - 1
                record.awaited += 1
            else:
                self._metrics.agents.task_charged(record.tenant, record.agent_class, finished)
        is_busy = self._is_busy(record.id)
        if record.final and not is_busy and not record.awaited:  # else the sweep will, or the engine's word
            self._end(record, finished, used, is_first=record.tasks_settled == 1)
            return
        self._write(record, finished, len(record.tasks) - 1, used, is_first=record.tasks_settled == 1)
        if finished is not None and not is_busy and not record.final:
            record.idle_since = self._now()
            self._keep(record.id, finished.prompt_tokens + finished.decode_tokens, record.agent_class)

    def held(self, task_id: TaskId, cost: float) -> None:
        """The engine says what a task held that had been charged by the formula: the answer was faster."""
        record, place = self.awaited.pop(task_id)
        record.awaited -= 1
        charged = record.tasks[place]
        finished = record.tasks[place] = msgspec.structs.replace(charged, held=cost)
        self._metrics.agents.task_charged(record.tenant, record.agent_class, finished)
        record.cost_ended += finished.cost - charged.cost
        self._correct(record.id, finished.cost - charged.cost)
        self._write(record, finished, place, TenantUsage(kv_cost=finished.cost - charged.cost))
        if record.final and not record.awaited and not self._is_busy(record.id):
            self._end(record)

    def dismissed(self, record: AgentRecord) -> None:
        """Somebody has ended the agent: no further task of it will come."""
        record.final = True
        if not record.awaited and not self._is_busy(record.id):
            self._end(record)

    def sweep(self, idle_s: float) -> None:
        """End the agents that have been silent for `idle_s` seconds, or have said that they are done."""
        silent_since = self._clock() - idle_s
        for record in [r for r in self.records.values() if r.final or r.last_end_s <= silent_since]:
            if not self._is_busy(record.id):
                self._end(record)

    async def flush(self) -> None:
        """Wait until what was learned is in the store."""
        await self._journal.flush()

    def _is_busy(self, agent_id: AgentId) -> bool:
        agent = self._queue.agents.get(agent_id)
        return agent is not None and agent.busy

    def _state(self, record: AgentRecord) -> AgentState:
        """As it is now. The queue knows it still."""
        return state_of(record, self._queue.standing(record.id), self._journal.id)

    def _write(
        self,
        record: AgentRecord,
        task: FinishedTask | None = None,
        place: int = 0,
        used: TenantUsage | None = None,
        *,
        is_first: bool = False,
        is_over: bool = False,
    ) -> None:
        """Into the journal. Whatever happens, the request goes on, and is billed."""
        usage = None if used is None else self._charge(record.tenant, used)
        try:
            step = Record(self._state(record), is_first, task, place if task is not None else 0, is_over, usage)
        except Exception:
            logger.exception("where an agent stands could not be found out")
            step = Record(usage=usage)
        self._journal.write(step)

    def _restore(self, state: AgentState, *, is_newest: bool) -> None:
        """Put an agent back, with what was unfinished of it given up. One whose id is taken was cut in two, as when the store
        was away at the start: it has ended."""
        agent_id = AgentId(state.id)
        try:
            if not is_newest or agent_id in self.records:
                raise QueueError("another agent has its id")
            self._queue.restore(
                self._now(),
                agent_id,
                state.standing,
                tenant=TenantId(state.tenant),
                tenant_weight=self._tenant_weight(state.tenant),
            )
        except QueueError as error:
            logger.info("agent %r is not put back, and has ended: %s", state.id, error)
            if state.whole and state.answered:
                self._learn(finished(state, state.tasks))
            self._journal.write(Record(agent=msgspec.structs.replace(state, tasks=[]), over=True))
            return
        record = self.records[agent_id] = record_of(state, self._clock() - max(0.0, self._wall() - state.arrived_at))
        self._restored(record)
        if not record.final:
            record.idle_since = self._now()  # how long it has been is known to nobody
        # Ours from now on: another gateway that starts leaves it alone.
        self._journal.write(Record(agent=self._state(record)))

    def _end(
        self,
        record: AgentRecord,
        task: FinishedTask | None = None,
        used: TenantUsage | None = None,
        *,
        is_first: bool = False,
    ) -> None:
        """task, used: what it ended with, if that has not been written yet."""
        if record.tasks_settled:
            self._write(record, task, len(record.tasks) - 1, used, is_first=is_first, is_over=True)
        del self.records[record.id]
        if record.awaited:
            for task_id in [task_id for task_id, (whose, _) in self.awaited.items() if whose is record]:
                _, place = self.awaited.pop(task_id)
                self._metrics.agents.task_charged(record.tenant, record.agent_class, record.tasks[place])
        if record.idle_since is not None:
            self._waits.ended(record.agent_class)
        known = self._queue.agents.get(record.id)
        if known is not None:
            self._queue.evict(self._now(), record.id)
        if not record.whole or not record.tasks:
            return
        agent = FinishedAgent(
            record.agent_class,
            record.tenant,
            sorted(record.tasks, key=lambda task: task.arrived_s),
            record.schema,
            record.arrived_at,
            1.0 if known is None else known.weight,
            record.expected_tasks,
        )
        self._metrics.agents.finished(record.tenant, record.agent_class, record.last_end_s - record.first_arrival_s)
        self._judge(record, agent.cost)
        self._learn(agent)

    def _judge(self, record: AgentRecord, cost: float) -> None:
        if record.predicted is None or record.judged is None:
            return
        by = record.judged
        judged = self._accuracy.judge(by.source, record.predicted, max(by.p90, record.predicted), cost)
        if judged is not None:
            self._metrics.learning.judged(
                kind(by.source), judged.observed / judged.predicted, below_p90=judged.observed <= judged.p90
            )

    def _learn(self, agent: FinishedAgent) -> None:
        try:
            self._predictor.learn(agent)
        except Exception:
            logger.exception("the predictor failed to learn from an agent")
