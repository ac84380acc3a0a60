"""The gateway's driver of flow control: futures, the real clock, the link, the journal and the metrics. It has no policy.

`Dispatcher.submit` gives a `Turn`. Its owner, the relay of the task, waits for it, and settles it exactly once, without
awaiting, whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

from engine.hints import to_tag
from gateway.flowcontrol import (
    Arriving,
    Effects,
    Ended,
    Ending,
    FlowController,
    LiveAgent,
    LiveTask,
    Now,
    Options,
    Settlement,
)
from gateway.flowcontrol.fairqueue import Policy, Release, TaskId
from gateway.flowcontrol.quotas import Limits
from gateway.protocol.errors import GatewayError
from gateway.state import Journal
from gateway.telemetry.metrics import Metrics

# Seconds after a deadline at which it is looked for: the event loop's clock is coarser than ours.
LATE_S = 0.002


class Link(Protocol):
    """`GatewayLink.change`: new tags by task; by agent, the iterations for which to keep its KV."""

    def __call__(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None: ...


class Outcomes(Protocol):
    def ended(self, ended: Ended) -> None: ...


def now() -> Now:
    return Now(time.monotonic_ns(), time.time())


class Turn:
    """A task between its relay and flow control."""

    __slots__ = ("_dispatcher", "_over", "_release", "_released", "aborted", "owners", "settled", "task")

    def __init__(self, dispatcher: Dispatcher, task: LiveTask) -> None:
        self.task = task
        self.settled = False
        self._dispatcher = dispatcher
        self._release: Release | None = None
        self._released: asyncio.Future[Release] | None = None  # while its relay waits
        self.aborted: GatewayError | None = None
        self.owners: tuple[asyncio.Task[object], ...] = ()  # tasks of asyncio that deal with the engine
        self._over: asyncio.Future[None] | None = None

    async def wait(self) -> Release:
        """Until the task may go to the engine. Raises `WaitedTooLong`, `ShuttingDown`, or what it was aborted with."""
        if self.aborted is not None:
            raise self.aborted
        if self._release is None:
            self._released = self._dispatcher.loop.create_future()
            try:
                return await self._released
            finally:
                self._released = None
        return self._release

    def at_engine(self) -> AtEngine:
        """Around what is awaited of the engine: `abort` breaks it off, and then this raises the error."""
        return AtEngine(self)

    def lost(self, *, reached: bool, retry: bool) -> bool:
        """The engine lost the task. reached: it had it. Returns whether the task waits again."""
        if self.settled:
            return False
        self._release = None
        return self._dispatcher.lost(self, reached=reached, retry=retry and self.aborted is None)

    def abort(self, error: GatewayError) -> asyncio.Future[None]:
        """Ends the task from outside: its owner gets the error, whatever it waits for. Done when the turn is settled."""
        if self._over is None:
            self._over = self._dispatcher.loop.create_future()
            self.aborted = error
            if self._released is not None and not self._released.done():
                self._released.set_exception(error)
            for owner in self.owners:
                owner.cancel()
        return self._over

    def settle(self, ending: Ending) -> Settlement | None:
        """The task has ended. None where the turn was settled before."""
        if self.settled:
            return None
        self.settled = True
        return self._dispatcher.settle(self, ending)

    def grant(self, release: Release) -> None:
        self._release = release
        if self._released is not None and not self._released.done():
            self._released.set_result(release)

    def is_over(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


class AtEngine:
    """A context in which the current task of asyncio is cancelled when the turn is aborted; see `Turn.at_engine`."""

    __slots__ = ("_cancelling", "_owner", "_turn")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def __enter__(self) -> None:
        if self._turn.aborted is not None:
            raise self._turn.aborted
        owner = asyncio.current_task()
        assert owner is not None
        self._owner, self._cancelling = owner, owner.cancelling()
        self._turn.owners += (owner,)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        turn, owner = self._turn, self._owner
        turn.owners = () if len(turn.owners) == 1 else tuple(other for other in turn.owners if other is not owner)
        # The owner is also cancelled when its client disconnects: see `asyncio.timeout`, which does the same.
        if kind is asyncio.CancelledError and turn.aborted is not None and owner.uncancel() <= self._cancelling:
            raise turn.aborted from None


class Dispatcher:
    """Calls flow control, and does what it returns. Make it inside a running event loop."""

    def __init__(self, flow: FlowController, journal: Journal, metrics: Metrics, outcomes: Outcomes) -> None:
        self.loop = asyncio.get_running_loop()
        self.flow = flow
        self.metrics = metrics
        self.link: Link | None = None  # to the engine, while it listens
        self.engine_in_doubt = asyncio.Event()  # a task was lost: the engine is to be checked at once
        self._journal, self._outcomes = journal, outcomes
        self._turns: dict[TaskId, Turn] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._pump_is_due = False
        self._expiry: asyncio.TimerHandle | None = None

    def submit(self, arriving: Arriving) -> Turn:
        """Enqueues a task. Raises what `FlowController.arrive` raises; then nothing was enqueued."""
        arrived = now()
        task = self.flow.arrive(arrived, arriving)
        turn = self._turns[task.id] = Turn(self, task)
        self._all_ended.clear()
        self.pump(arrived)
        if task.waiting:
            self._expire_at(task.expires_s, arrived)
        return turn

    def pump(self, at: Now | None = None) -> None:
        """Releases what may go to the engine now."""
        self.apply(self.flow.release(at or now()))

    def apply(self, effects: Effects) -> None:
        """Does what flow control has returned."""
        for step in effects.steps:
            self._journal.write(step)
            if step.usage is not None:
                self.metrics.tenants.charged(step.usage)
        for tenant, agent_class, task in effects.completed:
            self.metrics.agents.task_ended(tenant, agent_class, task.prompt_tokens, task.decode_tokens)
        for tenant, agent_class, task in effects.charged:
            self.metrics.agents.task_charged(tenant, agent_class, task)
        for ended in effects.ended:
            self._outcomes.ended(ended)
        for release in effects.releases:
            self._turns[release.task.id].grant(release)
        if self.link is not None:
            if effects.revised:
                self.link(tags={revised.task.id: to_tag(revised.rank) for revised in effects.revised})
            if effects.keep:
                self.link(keep=effects.keep)

    def settle(self, turn: Turn, ending: Ending) -> Settlement:
        settlement, effects = self.flow.settle(now(), turn.task.id, ending)
        self.apply(effects)
        del self._turns[turn.task.id]
        turn.is_over()
        if not self._turns:
            self._all_ended.set()
        if not self._pump_is_due:  # once for all that end together
            self._pump_is_due = True
            self.loop.call_soon(self._pump_soon)
        return settlement

    def lost(self, turn: Turn, *, reached: bool, retry: bool) -> bool:
        at = now()
        waits = self.flow.engine_lost(at, turn.task.id, reached=reached, retry=retry)
        self.engine_in_doubt.set()
        if waits:
            self._expire_at(turn.task.expires_s, at)
        return waits

    def end_agent(self, agent: LiveAgent, error: GatewayError) -> list[asyncio.Future[None]]:
        """Ends an agent, and all of its tasks with this error. Each is done when it is settled."""
        tasks, effects = self.flow.end_agent(agent)
        self.apply(effects)
        return [self._turns[task_id].abort(error) for task_id in tasks]

    def set_limits(self, limits: Mapping[str, Limits]) -> None:
        """Other limits of tenants from now on."""
        self.flow.quotas.set_limits(now(), limits)

    def change(self, options: Options, policy: Policy | None = None) -> None:
        """Other options from now on, and another order, if one is given."""
        self.flow.change(options, policy)
        self.pump()

    def sweep(self) -> None:
        self.apply(self.flow.sweep(now()))

    def begin_drain(self, limit_s: float) -> None:
        """Takes nothing new. What has been accepted goes on being released."""
        self.flow.begin_drain(now(), limit_s)

    async def drained(self) -> None:
        """Until nothing waits and nothing is in flight."""
        await self._all_ended.wait()

    def end_drain(self) -> None:
        """Hands back what waits, and breaks off what is in flight."""
        for task_id, error in self.flow.end_drain():
            self._turns[task_id].abort(error)

    def _pump_soon(self) -> None:
        self._pump_is_due = False
        self.pump()

    def _expire_at(self, deadline_s: float, at: Now) -> None:
        in_s = max(0.0, deadline_s - at.s) + LATE_S
        if self._expiry is None or self._expiry.when() > self.loop.time() + in_s:
            if self._expiry is not None:
                self._expiry.cancel()
            self._expiry = self.loop.call_later(in_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        at = now()
        for task_id, error in self.flow.expire(at):
            self._turns[task_id].abort(error)
        if (next_s := self.flow.next_expiry_s) is not None:
            self._expire_at(max(next_s, at.s), at)
