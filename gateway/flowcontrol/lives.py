"""The life of an agent: it arrives with its first task, is busy or idle, and ends.

An agent ends when its client has said so (`X-Agent-Final`) and nothing of it is left, when it has been idle for long enough,
or, if it had no id, with its only task. Each settlement is a step for the journal, so that a restart finds all of it again.
"""

from __future__ import annotations

import msgspec

from gateway.flowcontrol.agents import MAX_AWAITED, MAX_TASKS, Agents, LiveAgent, agent_id_of
from gateway.flowcontrol.effects import Arriving, Charged, Effects, Ended, Now
from gateway.flowcontrol.fairqueue import (
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    QueueError,
    TaskId,
    TenantId,
)
from gateway.flowcontrol.quotas import Quotas
from gateway.flowcontrol.records import AgentRecord, Step, TenantUsage, UsageRow, finished
from gateway.flowcontrol.settlement import LiveTask
from gateway.flowcontrol.tool_waits import ToolWaits
from predictor.features import SCHEMA
from predictor.types import FinishedTask


class Lives:
    """Moves agents through their lives: in the queue, in the registry, and in steps."""

    def __init__(self, queue: FairQueue, quotas: Quotas, journal: str) -> None:
        self.agents = Agents()
        self.waits = ToolWaits()
        self._queue, self._quotas, self._journal = queue, quotas, journal
        self._runs = 0

    def known_or_new(self, now: Now, arriving: Arriving) -> LiveAgent:
        """The agent of a request. A new one is not registered before `arrived`."""
        agent_id = agent_id_of(arriving.tenant, arriving.agent)
        agent = self.agents.by_id.get(agent_id)
        if agent is not None:
            return agent
        record = AgentRecord(
            run="",
            journal=self._journal,
            id=agent_id,
            name=arriving.agent,
            tenant=arriving.tenant,
            source=arriving.source,
            standing=None,
            arrived_at=now.wall_s,
            last_end_at=now.wall_s,
            agent_class=arriving.agent_class,
            expected_tasks=arriving.expected_tasks,
            schema=SCHEMA,
        )
        return LiveAgent(agent_id, record, now.s, now.s)

    def arrived(self, clock: Iterations, task: LiveTask, arriving: Arriving) -> None:
        """A task of this agent is in the queue."""
        agent, estimate = task.agent, task.estimate
        record = agent.record
        if agent.arrived == 0:
            self.agents.add(agent)
        self.agents.named(agent, arriving.alias)
        self.agents.is_busy(agent)
        agent.arrived += 1
        record.agent_class = record.agent_class or arriving.agent_class
        record.expected_tasks = arriving.expected_tasks or record.expected_tasks
        record.final = record.final or arriving.final
        record.prediction = estimate.agent
        agent.latest = estimate.sketch or agent.latest
        agent.opening = agent.opening or estimate.sketch
        if agent.idle_since is not None:
            record.returns += 1
            self.waits.came_back(record.tenant, record.agent_class, clock - agent.idle_since)
            agent.idle_since = None

    def settled(
        self,
        now: Now,
        clock: Iterations,
        task: LiveTask,
        done: FinishedTask | None,
        used: TenantUsage,
        effects: Effects,
        *,
        reported: bool,
    ) -> None:
        """A task of this agent has ended, and the queue knows it. done: if it was completed. reported: the engine reports what
        it held, now or later."""
        agent = task.agent
        record = agent.record
        agent.last_end_s = now.s
        record.last_end_at = record.arrived_at + now.s - agent.first_arrival_s
        record.settled += 1
        place = 0
        if done is None:
            record.whole = False
        else:
            place = agent.complete(_without_texts(done))
            effects.completed.append(Charged(record.tenant, record.agent_class, done))
            if done.held is None and reported:
                self.agents.awaited[task.id] = agent, place, done
                agent.awaited += 1
                self.give_up_counts(clock, effects, keep=MAX_AWAITED)
            else:
                effects.charged.append(Charged(record.tenant, record.agent_class, done))
        usage = self._quotas.charge(now, task.account, used)
        step = self._step(agent, done, place, usage, first=record.settled == 1)
        if self.is_busy(agent.id):
            effects.steps.append(step)
        elif record.final and not agent.awaited:
            self._end(clock, agent, step, effects)
        else:
            effects.steps.append(step)
            self.agents.is_idle(agent)
            if done is not None and not record.final:
                agent.idle_since = clock

    def measured(self, now: Now, clock: Iterations, task_id: TaskId, counted: float, effects: Effects) -> None:
        """The engine reports what a task held that was charged by the formula: the answer had come first."""
        agent, place, charged = self.agents.awaited.pop(task_id)
        record = agent.record
        agent.awaited -= 1
        done = msgspec.structs.replace(charged, held=counted)
        difference = done.cost - charged.cost
        agent.correct(place, _without_texts(done), difference)
        effects.charged.append(Charged(record.tenant, record.agent_class, done))
        self._queue.correct(clock, agent.id, KvTokenIterations(difference))
        account = self._quotas.account(record.tenant, now.ns)
        usage = self._quotas.charge(now, account, TenantUsage(kv_cost=difference))
        step = self._step(agent, done, place, usage)
        if self._is_over(agent):
            self._end(clock, agent, step, effects)
        else:
            effects.steps.append(step)

    def give_up_counts(self, clock: Iterations, effects: Effects, *, keep: int = 0) -> None:
        """The engine will not report any more what tasks held, but for the latest ones: they cost what they were charged."""
        while len(self.agents.awaited) > keep:
            agent, _, charged = self.agents.awaited.pop(next(iter(self.agents.awaited)))
            agent.awaited -= 1
            effects.charged.append(Charged(agent.record.tenant, agent.record.agent_class, charged))
            if self._is_over(agent):
                self._end(clock, agent, None, effects)

    def _is_over(self, agent: LiveAgent) -> bool:
        """Whether the agent's last task has ended and no count of an engine is awaited."""
        return agent.record.final and not agent.awaited and not self.is_busy(agent.id)

    def dismiss(self, clock: Iterations, agent: LiveAgent, effects: Effects) -> None:
        """No further task of this agent will come."""
        agent.record.final = True
        if not self.is_busy(agent.id):
            self._end(clock, agent, None, effects)

    def sweep(self, clock: Iterations, silent_since_s: float, effects: Effects) -> None:
        """Ends the agents that have been idle since then, or are final."""
        for agent in self.agents.overdue(silent_since_s):
            self._end(clock, agent, None, effects)

    def restore(
        self, now: Now, clock: Iterations, record: AgentRecord, tenant_weight: float, effects: Effects, *, newest: bool
    ) -> str | None:
        """Puts an agent back, with what was unfinished of it given up. Returns why it could not be: it has then ended. An agent
        whose id is taken was cut in two, as when the store was away at the start."""
        agent_id = AgentId(record.id)
        try:
            if not newest or agent_id in self.agents.by_id:
                raise QueueError("another agent has its id")
            if record.standing is None:
                raise QueueError("the state does not say where it stood")
            self._queue.restore(
                clock, agent_id, record.standing, tenant=TenantId(record.tenant), tenant_weight=tenant_weight
            )
        except QueueError as error:
            learned = finished(record, record.tasks) if record.whole and record.answered else None
            effects.ended.append(Ended(record, record.last_end_at - record.arrived_at, 0.0, learned))
            effects.steps.append(Step(agent=msgspec.structs.replace(record, tasks=()), over=True))
            return str(error)
        tasks, record.tasks = record.tasks[:MAX_TASKS], ()
        record.journal = self._journal  # from now on: another gateway that starts leaves it alone
        record.schema = record.schema if record.schema == SCHEMA else ""  # of two schemas they are of none
        first_arrival_s = now.s - max(0.0, now.wall_s - record.arrived_at)
        last_end_s = first_arrival_s + record.last_end_at - record.arrived_at
        agent = LiveAgent(agent_id, record, first_arrival_s, last_end_s, record.settled)
        if len(tasks) == record.answered:
            agent.kept = [_without_texts(task) for task in tasks]
        else:  # the store has lost some, or there were too many to keep
            record.whole = False
        agent.cost_ended = sum(task.cost for task in tasks)
        if not record.final:
            agent.idle_since = clock  # the time before the restart cannot be known
        self.agents.add(agent)
        self.agents.is_idle(agent)
        effects.steps.append(self._step(agent))
        return None

    def is_busy(self, agent_id: AgentId) -> bool:
        agent = self._queue.agents.get(agent_id)
        return agent is not None and agent.busy

    def rewrite(self, agent: LiveAgent) -> list[Step]:
        """The steps that a store needs which has lost this agent."""
        if not agent.record.settled or self.agents.by_id.get(agent.id) is not agent:
            return []
        tasks = enumerate(agent.tasks)
        return [self._step(agent), *(Step(run=agent.record.run, task=task, place=place) for place, task in tasks)]

    def _end(self, clock: Iterations, agent: LiveAgent, step: Step | None, effects: Effects) -> None:
        """step: of the settlement that the agent ends with."""
        record = agent.record
        if step is None and record.settled:
            step = self._step(agent)
        if step is not None:
            effects.steps.append(msgspec.structs.replace(step, over=True))
        effects.charged.extend(Charged(record.tenant, record.agent_class, task) for task in self.agents.remove(agent))
        if agent.idle_since is not None:
            self.waits.ended(record.tenant, record.agent_class)
        backlog_tag = self._queue.backlog_tag(agent.id)
        self._queue.evict(clock, agent.id)
        learned = finished(record, agent.tasks) if record.whole and agent.tasks else None
        effects.ended.append(Ended(record, agent.last_end_s - agent.first_arrival_s, backlog_tag, learned))

    def _step(
        self,
        agent: LiveAgent,
        task: FinishedTask | None = None,
        place: int = 0,
        usage: UsageRow | None = None,
        *,
        first: bool = False,
    ) -> Step:
        """The agent as it is now. The queue knows it still."""
        if not agent.record.run:
            self._runs += 1
            agent.record.run = f"{self._journal}-{self._runs}"
        agent.record.standing = self._queue.standing(agent.id)
        kept = task if place < MAX_TASKS else None
        return Step(agent.record, first, kept, place if kept is not None else 0, False, usage)


def _without_texts(task: FinishedTask) -> FinishedTask:
    if task.prompt is None and task.system is None:
        return task
    return msgspec.structs.replace(task, prompt=None, system=None)
