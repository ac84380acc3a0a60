"""The flow controller: every verb that moves a task from its arrival to its settlement."""

from __future__ import annotations

import math

import msgspec

from engine.link import Ended as EngineEnded
from engine.link import Hello, Message
from gateway.flowcontrol.agents import LiveAgent
from gateway.flowcontrol.deadlines import Deadlines
from gateway.flowcontrol.effects import ENGINE, Arriving, Effects, Ending, EngineId, Now, Rejected, Settlement
from gateway.flowcontrol.engine_state import EngineState
from gateway.flowcontrol.estimate import Asked, Cost, estimate_agent, estimate_arrival
from gateway.flowcontrol.fairqueue import (
    FairQueue,
    Iterations,
    KvTokenIterations,
    Policy,
    QueueError,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)
from gateway.flowcontrol.following import Following
from gateway.flowcontrol.lives import Lives
from gateway.flowcontrol.quotas import MAX_RETRY_AFTER_S, Quotas
from gateway.flowcontrol.records import AgentRecord, UsageRow
from gateway.flowcontrol.settlement import (
    LiveTask,
    check_usage,
    cost_of_broken_off,
    cost_of_finished,
    finished_task,
    row_of,
    use_of,
)
from gateway.protocol.errors import RESTART_S, NoEngine, Outcome, ShuttingDown, WaitedTooLong
from predictor.cost import task_cost
from predictor.types import FinishedTask


class Options(msgspec.Struct, frozen=True):
    """What the driver decides. The defaults are the gateway's."""

    limits: ReleaseLimits = ReleaseLimits()
    follow_engine: bool = True  # take slots and displacement from the engine, and not from `limits`
    max_queue_s: float = math.inf  # that a task may wait, where its tenant has no limit
    agent_idle_s: float = 300.0  # after which an agent has ended
    keep_kv: bool = True  # of agents that wait for their tools
    cost: Cost = task_cost
    charge_held: bool = True  # what the engine counted, and not the formula
    share_served: bool = True  # the reference shares what the engine was seen to hold, and not all blocks
    cost_per_held: float = 1.0  # of `cost`, for each KV token·iteration held


class FlowController:
    """Tasks, agents, quotas and engines, and the fair queue that orders them. See the package for the rules.

    It is one class, though a long one: its verbs move a task through one state machine, and what each of them does is done by
    the parts beside it."""

    def __init__(
        self, queue: FairQueue, quotas: Quotas, predictor: Asked, options: Options | None = None, *, journal: str = ""
    ) -> None:
        self.queue = queue
        self.quotas = quotas
        self.predictor = predictor
        self.options = options or Options()
        self.lives = Lives(queue, quotas, journal)
        self.agents = self.lives.agents
        self.tasks: dict[TaskId, LiveTask] = {}
        self.engines: dict[EngineId, EngineState] = {ENGINE: EngineState()}
        self.draining = self.cut_off = False
        self._drained_by_s = 0.0
        self._deadlines = Deadlines()
        self.following = Following(queue)

    @property
    def engine(self) -> EngineState:
        """The engine, while there is one."""
        return self.engines[ENGINE]

    @property
    def clock(self) -> Iterations:
        """The service clock τ."""
        return self.engine.now

    # Tasks

    def arrive(self, now: Now, arriving: Arriving) -> LiveTask:
        """A task waits from now on. Raises `ShuttingDown`, `NoEngine`, `QuotaSpent`, `QueueFull`, `BodyTooLarge`, or
        `QueueError`; then nothing has changed."""
        if self.draining:
            raise _shutting_down(max(RESTART_S, math.ceil(self._drained_by_s - now.s)))
        if not self.engine.up:
            raise NoEngine("the engine is not ready", retry_after_s=RESTART_S)
        account = self.quotas.account(arriving.tenant, now.ns)
        self.quotas.check(now, account, arriving.body_bytes)
        agent = self.lives.known_or_new(now, arriving)
        known = self.queue.agents.get(agent.id)
        arrived = known.arrived if known is not None else 0.0
        progress = agent.progress(arrived, arriving.agent_class, arriving.expected_tasks)
        estimate = estimate_arrival(
            self.predictor, arriving.content, progress, self.engine.max_model_len, self.options.cost
        )
        self.queue.enqueue(
            self.clock,
            Task(
                arriving.id,
                agent.id,
                KvTokenIterations(estimate.cost),
                estimate.memory_tokens,
                estimate.prompt_tokens,
                arriving.content.sequences,
            ),
            KvTokenIterations(estimate.agent.cost),
            weight=arriving.weight,
            tenant=TenantId(arriving.tenant),
            tenant_weight=account.limits.weight,
        )
        task = self.tasks[arriving.id] = LiveTask.of(arriving, agent, account, estimate, ENGINE, now.s)
        self.quotas.enter(account, task.body_bytes)
        self.lives.arrived(self.clock, task, arriving)
        self._await(task)
        return task

    def release(self, now: Now) -> Effects:
        """What may go to the engine now, and the ranks that have changed there."""
        effects = Effects()
        engine = self.engine
        if self.cut_off or not engine.takes_tasks(now.s):
            return effects
        if self.queue.waiting:
            effects.releases = self.queue.release(self.clock, engine.waiting)
        for release in effects.releases:
            task = self.tasks[release.task.id]
            self._stop_waiting(now, task)
            self.quotas.released(task.account, task.body_bytes)
            task.waiting, task.released_at = False, self.clock
            if task.retried:  # what was counted is of the time before the engine lost it
                engine.take_counted(task.id)
            record = task.agent.record
            if record.predicted is None:
                record.predicted, record.judged = self.queue.agents[task.agent.id].predicted, record.prediction
        if engine.listens and engine.reporting:
            effects.revised = self.queue.revise()
        return effects

    def settle(self, now: Now, task_id: TaskId, ending: Ending) -> tuple[Settlement, Effects]:
        """The task has ended. Raises `KeyError` for one that is not here, or was settled before."""
        task, effects = self.tasks.pop(task_id), Effects()
        if task.waiting:
            self._stop_waiting(now, task)
        engine = self.engines[task.engine]
        done: FinishedTask | None = None
        row = row_of(task) if ending.outcome is Outcome.COMPLETED else b""
        try:
            check_usage(ending.usage)
            if ending.usage is not None and ending.outcome is Outcome.COMPLETED:
                done = self._finished(now, task, ending, row, engine)
                cost = cost_of_finished(done, self.options.cost)
            else:
                cost = cost_of_broken_off(task, ending, engine, self.options.cost)
            self._settle_in_queue(task, done, KvTokenIterations(cost))
        except ValueError:
            # A number that cannot be was reported: the task costs nothing, and does not stay in the queue.
            done, cost, ending = None, 0.0, Ending(ending.outcome)
            self.queue.cancel(self.clock, task_id, Spent(KvTokenIterations(0.0)))
        self.quotas.left(now, task.account, task.body_bytes, waiting=task.waiting)
        reported = task.counted and engine.counts_held and self.options.charge_held
        self.lives.settled(now, self.clock, task, done, use_of(task, ending, cost), effects, reported=reported)
        if task.agent.idle_since is not None and done is not None:
            self._keep(task.agent, done, engine, effects)
        return Settlement(cost, done), effects

    def expire(self, now: Now) -> list[Rejected]:
        """The tasks that have waited for as long as they may. Each is named once, and is still to be settled."""
        return [
            Rejected(task.id, WaitedTooLong(f"the task waited for {task.max_queue_s:g} s and was not reached"))
            for task in self._deadlines.expired(now.s)
        ]

    @property
    def next_expiry_s(self) -> float | None:
        """When, on the monotonic clock, the next task will have waited for too long. None while none waits."""
        return self._deadlines.next_s

    # Engines

    def engine_reports(
        self, now: Now, message: Message, engine_id: EngineId = ENGINE, *, linked: bool = True
    ) -> Effects:
        """A message of the link, or, not `linked`, one made from a stock engine's `/metrics`."""
        effects, engine = Effects(), self.engines[engine_id]
        restarts = engine.restarts
        engine.take(message, now.s, linked=linked)
        if engine.restarts > restarts:
            self.lives.give_up_counts(self.clock, effects)
        if isinstance(message, EngineEnded):
            for task_id in message.costs.keys() & self.agents.awaited.keys():
                counted = engine.take_counted(task_id)
                if counted is not None:
                    self.lives.measured(now, self.clock, TaskId(task_id), counted, effects)
            return effects
        if isinstance(message, Hello):
            engine.listens = linked
        self.following.observe(now.s, engine)
        self._follow(engine)
        return effects

    def link_closed(self, engine_id: EngineId = ENGINE) -> None:
        """Changes do not reach the engine any more."""
        self.engines[engine_id].listens = False

    def engine_checked(self, now: Now, is_up: bool | None, engine_id: EngineId = ENGINE) -> None:
        """A health check has ended. is_up: None where that is not known."""
        engine = self.engines[engine_id]
        if is_up is not None:
            engine.answers() if is_up else engine.is_down()
        engine.check_silence(now.s)
        self._follow(engine)

    def engine_lost(self, now: Now, task_id: TaskId, *, reached: bool, retry: bool) -> bool:
        """The engine lost a task in flight. reached: the engine had it. Returns whether the task waits again, in its old place:
        if it may be tried again, and the engine has not lost it before. Raises `KeyError` for a task that is not here, and
        `QueueError` for one that waits; then nothing has changed."""
        task = self.tasks[task_id]
        if task.waiting:
            raise QueueError(f"task {task_id} is not in flight")
        self.engines[task.engine].lost_task(now.s, reached=reached)
        if not retry or self.cut_off or (reached and task.retried):
            return False
        self.queue.requeue(self.clock, task_id)
        self.quotas.requeued(task.account, task.body_bytes)
        task.retried = task.retried or reached
        task.waiting, task.since_s, task.released_at = True, now.s, None
        self._await(task)
        return True

    # Agents

    def end_agent(self, agent: LiveAgent) -> tuple[list[TaskId], Effects]:
        """No further task of the agent will come. Returns its tasks, which are to be broken off."""
        effects = Effects()
        known = self.queue.agents.get(agent.id)
        tasks = [] if known is None else [*known.waiting, *known.in_flight]
        self.lives.dismiss(self.clock, agent, effects)
        return tasks, effects

    def sweep(self, now: Now) -> Effects:
        """Ends the agents that have been idle for too long."""
        effects = Effects()
        self.lives.sweep(self.clock, now.s - self.options.agent_idle_s, effects)
        return effects

    def restore(self, now: Now, record: AgentRecord, *, newest: bool = True) -> tuple[str | None, Effects]:
        """Puts an agent back after a restart. newest: no other one has its id. Returns why it could not be, if so."""
        effects = Effects()
        weight = self.quotas.account(record.tenant, now.ns).limits.weight
        return self.lives.restore(now, self.clock, record, weight, effects, newest=newest), effects

    def restore_use(self, now: Now, rows: list[UsageRow]) -> None:
        """After a start, once: what tenants have used today."""
        self.quotas.restore(now, rows)

    # Settings, and the end

    def change(self, options: Options, policy: Policy | None = None) -> None:
        """Other options from now on, and another order, if one is given."""
        self.options = options
        self.queue.limits = options.limits
        if policy is not None:
            self.queue.change_policy(self.clock, policy)
        self._follow(self.engine)

    def begin_drain(self, now: Now, limit_s: float) -> None:
        """Take nothing new. What has been accepted goes on being released, for so many seconds."""
        if not self.draining:
            self.draining, self._drained_by_s = True, now.s + limit_s

    def end_drain(self) -> list[Rejected]:
        """Release nothing more. Returns the tasks that are here, each of which is to be broken off and settled."""
        self.draining = self.cut_off = True
        return [Rejected(task_id, _shutting_down(RESTART_S)) for task_id in self.tasks]

    # How it works

    def _await(self, task: LiveTask) -> None:
        self._deadlines.add(task, task.account.limits.max_queue_s or self.options.max_queue_s)

    def _stop_waiting(self, now: Now, task: LiveTask) -> None:
        self._deadlines.remove(task)
        task.queued_s += now.s - task.since_s
        task.since_s = now.s

    def _finished(self, now: Now, task: LiveTask, ending: Ending, row: bytes, engine: EngineState) -> FinishedTask:
        assert ending.usage is not None
        held = engine.take_counted(task.id)
        begin_s = task.agent.first_arrival_s
        return msgspec.structs.replace(
            finished_task(task, ending.usage, held if self.options.charge_held else None),
            arrived_s=max(0.0, task.arrived_s - begin_s),
            ended_s=now.s - begin_s,
            row=row,
            prompt=ending.prompt,
            system=ending.system,
        )

    def _settle_in_queue(self, task: LiveTask, done: FinishedTask | None, cost: KvTokenIterations) -> None:
        """Raises `QueueError`; then nothing has changed."""
        if done is None:
            self.queue.cancel(self.clock, task.id, Spent(cost))
            return
        agent = self.queue.agents[task.agent.id]
        arrived, total = max(0.0, agent.arrived - task.estimate.cost + cost), agent.predicted
        if arrived > total:  # else it stands
            total = KvTokenIterations(estimate_agent(self.predictor, task.agent.progress(arrived)))
        self.queue.complete(self.clock, task.id, Spent(cost, done.prompt_tokens, done.decode_tokens), total)

    def _keep(self, agent: LiveAgent, done: FinishedTask, engine: EngineState, effects: Effects) -> None:
        """The agent waits for its tool: its KV stays at the engine for as long as it is worth it."""
        if not (self.options.keep_kv and engine.listens and engine.reporting and engine.prefix_caching):
            return
        kind = agent.record.tenant, agent.record.agent_class
        effects.keep[agent.id] = self.lives.waits.worth_keeping(*kind)
        iterations = self.lives.waits.worth_reserving(*kind, engine.refill_iterations)
        self.queue.reserve(self.clock, agent.id, done.prompt_tokens + done.decode_tokens, iterations)

    def _follow(self, engine: EngineState) -> None:
        options = self.options
        self.following.capacity(engine, share_served=options.share_served, cost_per_held=options.cost_per_held)
        if options.follow_engine:
            self.following.slots(engine, options.limits)


def _shutting_down(retry_after_s: int) -> ShuttingDown:
    return ShuttingDown("the gateway is shutting down", retry_after_s=min(retry_after_s, MAX_RETRY_AFTER_S))
