"""The shell around the fair queue: futures and the engine's state, and no policy.

`Dispatcher.submit` enqueues a task and gives a `Turn`; the turn's owner waits for it, and must settle it exactly once,
without awaiting, whatever happens. Each change asks the queue what to release next.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from engine.hints import to_tag
from gateway.capacity import CAPACITY_ITERATIONS, EngineView, ServedCapacity, ServedRate
from gateway.errors import RESTART_S, GatewayError, NoEngine, ShuttingDown, WaitedTooLong
from gateway.fairness import (
    AgentId,
    FairQueue,
    KvTokenIterations,
    Policy,
    QueueError,
    Release,
    Spent,
    Task,
    TaskId,
    TenantId,
)
from gateway.limits import MAX_RETRY_AFTER_S
from gateway.tenants import Tenant, Tenants
from gateway.tool_waits import ToolWaits

# Tasks at an engine that has not said how much memory it has; at one that has, but not how many tasks it runs at once.
SLOTS_WITHOUT_CAPACITY = 8
SLOTS_OF_STOCK = 256


class Tell(Protocol):
    """`GatewayLink.change`: new tags by task; by agent, the iterations for which to keep its KV."""

    def __call__(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None: ...


class Turn:
    """A task on its way through the queue and the engine. `queued_s`: seconds spent waiting, once it is over. `waiting`: it
    is in the queue, and not at the engine."""

    def __init__(self, dispatcher: Dispatcher, task: Task, tenant: Tenant, body_bytes: int) -> None:
        self.task = task
        self.tenant = tenant
        self.body_bytes = body_bytes
        self.queued_s = 0.0
        self.waiting = True
        self._dispatcher = dispatcher
        self._released: asyncio.Future[Release] = dispatcher.loop.create_future()
        self._since = time.monotonic()
        self._requeued = False
        self._settled = False
        self._aborted: GatewayError | None = None
        self._owner: asyncio.Task[object] | None = None  # while it deals with the engine
        self._over: asyncio.Future[None] | None = None

    async def wait(self, limit_s: float) -> Release:
        """Until the task may go to the engine. Raises `WaitedTooLong`, `ShuttingDown`, or what it was aborted with."""
        if self._released.done():
            return self._released.result()
        try:
            async with asyncio.timeout(max(0.0, limit_s - self.queued_s)):
                return await self._released
        except TimeoutError:
            raise WaitedTooLong(f"the task waited for {limit_s:g} s and was not reached") from None
        finally:
            self.queued_s += time.monotonic() - self._since

    @contextmanager
    def at_engine(self) -> Iterator[None]:
        """Around what its owner awaits of the engine: `abort` breaks it off, and then this raises the error."""
        self._check()
        owner = self._owner = asyncio.current_task(self._dispatcher.loop)
        assert owner is not None
        cancelling = owner.cancelling()
        try:
            yield
        except asyncio.CancelledError:
            # Others cancel the owner too, as when the client leaves: see `asyncio.timeout`, which does the same.
            if self._aborted is not None and owner.uncancel() <= cancelling:
                raise self._aborted from None
            raise
        finally:
            self._owner = None

    def requeue(self, *, sent: bool) -> bool:
        """Back into the queue, in its old place, after the engine lost it; once, if the engine had been `sent` it."""
        if self._settled or self._dispatcher.cut_off or (sent and self._requeued):
            return False
        self._requeued = self._requeued or sent
        self._released = self._dispatcher.loop.create_future()
        self._since = time.monotonic()
        if self._aborted is not None:
            self.refuse(self._aborted)
        self._dispatcher.requeue(self)
        return True

    def abort(self, error: GatewayError) -> asyncio.Future[None]:
        """Somebody else ends the task: its owner gets the error, whatever it waits for. Done when the owner has settled."""
        if self._over is None:
            self._over = self._dispatcher.loop.create_future()
            self._aborted = error
            self.refuse(error)
            if self._owner is not None:
                self._owner.cancel()
        return self._over

    def complete(self, spent: Spent, agent_cost: float) -> None:
        """The task ended, with what it really took; its agent is now predicted to cost `agent_cost`."""
        if not self._settled:
            self._dispatcher.complete(self, spent, agent_cost)
            self._settled = True  # not if the queue has refused

    def cancel(self, spent: Spent) -> None:
        """The task was given up, with what it really took. Does nothing once the turn is settled."""
        if not self._settled:
            self._dispatcher.cancel(self, spent)
            self._settled = True

    def grant(self, release: Release) -> None:
        self.waiting = False
        if not self._released.done():
            self._released.set_result(release)

    def refuse(self, error: GatewayError) -> None:
        if not self._released.done():
            self._released.set_exception(error)
            self._released.exception()  # its owner may have left; that is no error

    def ended(self) -> None:
        if self._over is not None:
            self._over.set_result(None)

    def _check(self) -> None:
        if self._aborted is not None:
            raise self._aborted


class Dispatcher:
    """queue: the fair queue; engine: what is known of the engine; tenants: who may have how much in the queue; waits: for how
    long to keep the KV of an agent that waits for its tool, None for not at all. Make it inside a running event loop."""

    def __init__(
        self,
        queue: FairQueue,
        engine: EngineView,
        tenants: Tenants,
        *,
        waits: ToolWaits | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue = queue
        self.engine = engine
        self.draining = self.cut_off = False
        self.tell: Tell | None = None  # the engine, if it listens
        self.rate = ServedRate()
        self._served = ServedCapacity()
        self._heard_at = self._capacity_at = engine.now
        self._heard_s = time.monotonic()
        self._tenants = tenants
        self._waits = waits
        self._turns: dict[TaskId, Turn] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._drained_by_s = 0.0
        self._pump_is_due = False

    def submit(
        self, task: Task, agent_cost: float, tenant: Tenant, *, weight: float = 1.0, body_bytes: int = 0
    ) -> Turn:
        """Enqueue. `weight`: of its agent, if that is new. Raises `ShuttingDown`, `NoEngine`, or what `Tenants.enter` raises;
        then nothing was enqueued."""
        if self.draining:
            raise _shutting_down(max(RESTART_S, math.ceil(self._drained_by_s - time.monotonic())))
        if not self.engine.up:
            raise NoEngine("the engine is not ready", retry_after_s=5)
        self._tenants.enter(tenant, body_bytes)
        try:
            self.queue.enqueue(
                self.engine.now,
                task,
                KvTokenIterations(agent_cost),
                weight=weight,
                tenant=TenantId(tenant.name),
                tenant_weight=tenant.weight,
            )
        except QueueError:
            self._tenants.left(tenant, body_bytes, waiting=True)
            raise
        turn = self._turns[task.id] = Turn(self, task, tenant, body_bytes)
        self._all_ended.clear()
        self.pump()
        return turn

    def pump(self) -> None:
        """Release what the queue says can go now."""
        if self.cut_off or not self._lives():
            return
        for release in self.queue.release(self.engine.now, self.engine.waiting):
            turn = self._turns[release.task.id]
            self._tenants.released(turn.tenant, turn.body_bytes)
            turn.grant(release)
        self._tell_revised()

    def change(self, policy: Policy | None, *, beta: float, engine_waiting: int) -> None:
        """Release by other limits from now on, and in another order, if one is given."""
        self.queue.limits = replace(self.queue.limits, beta=beta, engine_waiting=engine_waiting)
        if policy is not None:
            self.queue.change_policy(self.engine.now, policy)
            self._tell_revised()  # before ranks of two policies are compared
        self.engine_changed()

    def _lives(self) -> bool:
        return self.engine.up and not self.engine.suspect

    def _tell_revised(self) -> None:
        if self.tell is None or not (self.engine.reporting and self._lives()):
            return
        if revised := self.queue.revise():
            self.tell(tags={release.task.id: to_tag(release.rank) for release in revised})

    def keep(self, agent_id: AgentId, kv_tokens: float, tenant: str, agent_class: str | None) -> None:
        """An agent waits for its tool: its KV stays at the engine for as long as it is worth it."""
        if self.tell is None or self._waits is None or not (self.engine.reporting and self.engine.prefix_caching):
            return
        self.tell(keep={agent_id: self._waits.worth_keeping(tenant, agent_class)})
        iterations = self._waits.worth_reserving(tenant, agent_class, self.engine.refill_iterations)
        self.queue.reserve(self.engine.now, agent_id, kv_tokens, iterations)

    def engine_spoke(self) -> None:
        """The engine has reported: take over what its tasks hold, and what it can hold."""
        engine, queue = self.engine, self.queue
        decoding = decoding_tokens = 0
        for task_id, holding in engine.held.items():
            queue.observe(engine.now, TaskId(task_id), holding.kv_tokens, holding.output_tokens)
            if holding.output_tokens:
                decoding += 1
                decoding_tokens += holding.kv_tokens
        if decoding and decoding == queue.in_flight:  # else what the queue reckons with is not there yet
            queue.calibrate(engine.now, engine.held_tokens)
        if decoding and queue.waiting:
            self._served.observe(engine.now - self._heard_at, min(decoding_tokens, engine.held_tokens))
        heard_s = time.monotonic()
        if queue.in_flight:
            self.rate.observe(heard_s - self._heard_s, (engine.now - self._heard_at) * engine.held_tokens)
        self._heard_at, self._heard_s = engine.now, heard_s
        self.engine_changed()

    def engine_changed(self) -> None:
        """Something else is known of the engine: take over M and its slots."""
        engine = self.engine
        if not engine.reporting:
            self.queue.unreserve()  # the clock stands still for us, and nobody knows what is kept
        if (
            engine.capacity_tokens != self.queue.capacity_tokens
            or engine.now - self._capacity_at >= CAPACITY_ITERATIONS
        ):
            self._capacity_at = engine.now
            served_tokens = self._served.tokens(engine.capacity_tokens)
            self.queue.set_capacity(engine.now, engine.capacity_tokens, served_tokens)
        self.queue.limits = replace(self.queue.limits, in_flight=self._slots(), displace_margin=engine.displace_margin)
        self.pump()

    def _slots(self) -> int:
        """Tasks that may be at the engine at once."""
        if self.engine.declared_max_num_seqs is not None:
            return self.engine.declared_max_num_seqs
        if not self.engine.capacity_tokens:
            return SLOTS_WITHOUT_CAPACITY
        return (self.engine.engine_max_num_seqs or SLOTS_OF_STOCK) + (self.queue.limits.engine_waiting or 0)

    def correct(self, agent_id: AgentId, difference: float) -> None:
        """A task of this agent that has ended held so much more than it was charged, in token·iterations."""
        self.queue.correct(self.engine.now, agent_id, KvTokenIterations(difference))

    def requeue(self, turn: Turn) -> None:
        self.queue.requeue(self.engine.now, turn.task.id)
        self._tenants.requeued(turn.tenant, turn.body_bytes)
        turn.waiting = True
        self.pump()

    def complete(self, turn: Turn, spent: Spent, agent_cost: float) -> None:
        self.queue.complete(self.engine.now, turn.task.id, spent, KvTokenIterations(agent_cost))
        self._ended(turn)

    def cancel(self, turn: Turn, spent: Spent) -> None:
        self.queue.cancel(self.engine.now, turn.task.id, spent)
        self._ended(turn)

    def abort(self, agent_id: AgentId, error: GatewayError) -> list[asyncio.Future[None]]:
        """End all tasks of an agent with this error, waiting and in flight. Each is done when its owner has settled it."""
        agent = self.queue.agents.get(agent_id)
        tasks = [] if agent is None else [*agent.waiting, *agent.in_flight]
        return [self._turns[task_id].abort(error) for task_id in tasks]

    def begin_drain(self, limit_s: float) -> None:
        """Take nothing new. What has been accepted goes on being released."""
        if not self.draining:
            self.draining = True
            self._drained_by_s = time.monotonic() + limit_s

    async def drained(self) -> None:
        """Until nothing waits and nothing is in flight."""
        await self._all_ended.wait()

    def end_drain(self) -> None:
        """Hand back what waits, and break off what is in flight."""
        self.draining = self.cut_off = True
        for turn in list(self._turns.values()):
            turn.abort(_shutting_down(RESTART_S))

    def _ended(self, turn: Turn) -> None:
        del self._turns[turn.task.id]
        self._tenants.left(turn.tenant, turn.body_bytes, waiting=turn.waiting)
        turn.ended()
        if not self._turns:
            self._all_ended.set()
        # Not at once: whoever settles the task may reserve the memory that it leaves for its agent's next one. And once for
        # all that end together.
        if not self._pump_is_due:
            self._pump_is_due = True
            self.loop.call_soon(self._pump_soon)

    def _pump_soon(self) -> None:
        self._pump_is_due = False
        self.pump()


def _shutting_down(retry_after_s: int) -> ShuttingDown:
    return ShuttingDown("the gateway is shutting down", retry_after_s=min(retry_after_s, MAX_RETRY_AFTER_S))
