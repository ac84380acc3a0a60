"""In whatever order things happen: nothing is lost or comes twice, V never goes back, a refused call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.flowcontrol import Options
from gateway.flowcontrol.fairqueue import POLICIES, Iterations, ReleaseLimits, TaskId, TenantId
from gateway.flowcontrol.quotas import NoLimits
from gateway.protocol.errors import GatewayError, Outcome
from gateway.protocol.usage import Usage
from predictor.types import TaskContent
from tests.flowcontrol.scene import Scene

TENANTS = ("x", "y")
LIMITS = {"y": NoLimits(weight=2.0, max_waiting=3, max_waiting_mib=500 / 2**20, max_queue_s=7.0)}
UNKNOWN = TaskId(10**9)
NUMBERS = st.sampled_from([0.0, 1.0, 50.0, 1234.5, -1.0, float("inf"), float("nan")])

usages = st.none() | st.builds(Usage, st.integers(-1, 40), st.integers(-1, 40), st.integers(0, 40))
held = st.tuples(st.integers(0, 60), st.integers(0, 60))


class FlowMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slots=st.none() | st.integers(1, 4),
        linked=st.sampled_from([True, True, False, None]),
        caching=st.booleans(),
    )
    def begin(self, policy: str, slots: int | None, linked: bool | None, caching: bool) -> None:
        self.facts = {"policy": policy, "slots": slots, "linked": linked, "prefix_caching": caching}
        self.settled: set[TaskId] = set()
        self.arrived: set[TaskId] = set()
        self.given_up: set[TaskId] = set()  # by a restart
        self.take(Scene(**self.more()))

    def more(self) -> dict[str, object]:
        return {
            **self.facts,
            "limits": LIMITS,
            "max_waiting": 8,
            "max_waiting_bytes": 2000,
            "options": Options(max_queue_s=20, agent_idle_s=30),
        }

    def take(self, scene: Scene) -> None:
        self.scene = scene
        for tenant in TENANTS:
            scene.quotas.account(tenant, scene.now.ns)
        self.times: dict[str, float] = dict.fromkeys((*TENANTS, "outer"), 0.0)

    def tasks(self, *, waiting: bool | None = None) -> list[TaskId]:
        tasks = self.scene.flow.tasks.items()
        return [task_id for task_id, task in tasks if waiting is None or task.waiting == waiting]

    def unchanged(self, call: Callable[[], object], errors: tuple[type[Exception], ...]) -> None:
        before = self.scene.contents()
        with pytest.raises(errors):
            call()
        assert self.scene.contents() == before

    # What clients do

    @rule(
        agent=st.sampled_from("abc"),
        tenant=st.sampled_from(TENANTS),
        final=st.booleans(),
        prompts=st.integers(1, 2),
        n=st.integers(1, 2),
        prompt_bytes=st.integers(0, 200),
        total=st.floats(0, 1e4),
        flags=st.tuples(st.booleans(), st.booleans()),
        body_bytes=st.integers(0, 900),
        alias=st.none() | st.sampled_from("de"),
    )
    def arrive(
        self,
        agent: str,
        tenant: str,
        final: bool,
        prompts: int,
        n: int,
        prompt_bytes: int,
        total: float,
        flags: tuple[bool, bool],
        body_bytes: int,
        alias: str | None,
    ) -> None:
        scene = self.scene
        scene.scripted.total = scene.scripted.grown = total
        before = scene.contents()
        try:
            task_id = scene.arrive(
                agent,
                tenant,
                final=final,
                alias=alias,
                prompts=prompts,
                content=TaskContent(prompt_bytes, sequences=prompts * n),
                decodes=flags[0],
                counted=flags[1],
                body_bytes=body_bytes,
            )
        except GatewayError:
            assert scene.contents() == before
        else:
            assert task_id not in self.arrived
            self.arrived.add(task_id)

    @precondition(lambda self: self.scene.flow.tasks)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.COMPLETED, Outcome.COMPLETED, *Outcome]),
        usage=usages,
        events=st.integers(0, 9),
        made=st.booleans(),
    )
    def settle(self, data: st.DataObject, outcome: Outcome, usage: Usage | None, events: int, made: bool) -> None:
        in_flight = self.tasks(waiting=False)
        # A waiting task has no answer: it was given up.
        task_id = data.draw(st.sampled_from(sorted(in_flight or self.tasks())))
        if task_id in in_flight:
            self.ends(task_id, outcome, usage, events=events, made=made)
        else:
            self.ends(task_id, Outcome.CANCELLED, None)

    @precondition(lambda self: self.tasks(waiting=True))
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self.ends(data.draw(st.sampled_from(self.tasks(waiting=True))), Outcome.CANCELLED, None)

    def ends(self, task_id: TaskId, outcome: Outcome, usage: Usage | None, **more: object) -> None:
        settlement = self.scene.settle(task_id, outcome, usage, **more)
        assert task_id not in self.settled and settlement.cost >= 0
        self.settled.add(task_id)

    @precondition(lambda self: self.scene.there())
    @rule(data=st.data(), at_once=st.booleans())
    def is_deleted(self, data: st.DataObject, at_once: bool) -> None:
        agents = self.scene.flow.agents.by_id
        agent = agents[data.draw(st.sampled_from(sorted(agents)))]
        tasks, effects = self.scene.flow.end_agent(agent)
        self.scene.take(effects)
        assert set(tasks) == {task_id for task_id, task in self.scene.flow.tasks.items() if task.agent is agent}
        assert agent.record.final and (tasks or agent.awaited or agents.get(agent.id) is not agent)
        if at_once:
            for task_id in tasks:
                self.ends(task_id, Outcome.CANCELLED, None)

    # What the engine does

    @rule()
    def release(self) -> None:
        waiting = set(self.tasks(waiting=True))
        released = self.scene.release()
        assert len(released) == len(set(released)) and set(released) <= waiting
        flow = self.scene.flow
        assert not released or flow.engine.takes_tasks(self.scene.now.s)
        if not released and waiting and flow.engine.takes_tasks(self.scene.now.s):
            assert self.scene.queue.in_flight, "always at least one"

    @precondition(lambda self: self.facts["linked"] is not None)
    @rule(data=st.data(), iterations=st.sampled_from([0, 1, 9, 300]), waiting=st.integers(0, 6))
    def report(self, data: st.DataObject, iterations: int, waiting: int) -> None:
        there = data.draw(st.dictionaries(st.sampled_from([*sorted(self.arrived), UNKNOWN]), held, max_size=4))
        self.scene.report(there, iterations=iterations, waiting=waiting, prefill_iterations=0.5)

    @precondition(lambda self: self.facts["linked"])
    @rule(data=st.data(), cost=NUMBERS)
    def counts(self, data: st.DataObject, cost: float) -> None:
        tasks = data.draw(st.sets(st.sampled_from([*sorted(self.arrived), UNKNOWN]), max_size=4))
        self.scene.counts(dict.fromkeys(sorted(tasks), cost))

    @precondition(lambda self: self.tasks(waiting=False))
    @rule(data=st.data(), reached=st.booleans(), retry=st.booleans())
    def is_lost(self, data: st.DataObject, reached: bool, retry: bool) -> None:
        task_id = data.draw(st.sampled_from(self.tasks(waiting=False)))
        task = self.scene.flow.tasks[task_id]
        was_retried = task.retried
        waits = self.scene.lose(task_id, reached=reached, retry=retry)
        assert waits == (retry and not (reached and was_retried)) and task.waiting == waits
        assert not self.scene.flow.engine.takes_tasks(self.scene.now.s)
        if not waits:
            self.ends(task_id, Outcome.FAILED, None)

    @rule(is_up=st.sampled_from([True, True, True, False, None]))
    def is_checked(self, is_up: bool | None) -> None:
        self.scene.flow.engine_checked(self.scene.now, is_up)

    @precondition(lambda self: self.facts["linked"] is not None)
    @rule(again=st.booleans())
    def begins_a_life(self, again: bool) -> None:
        if not again:
            self.scene.life, self.scene.iteration = f"{self.scene.life}+", 0
        self.scene.hello()

    @rule()
    def link_closes(self) -> None:
        self.scene.flow.link_closed()

    # Time, and who runs the gateway

    @rule(seconds=st.sampled_from([0.1, 1, 6, 25, 4000]))
    def time_passes(self, seconds: float) -> None:
        self.scene.pass_s(seconds)

    @rule()
    def expire(self) -> None:
        next_s = self.scene.flow.next_expiry_s
        expired = [rejected.task_id for rejected in self.scene.flow.expire(self.scene.now)]
        assert set(expired) <= set(self.tasks(waiting=True))
        assert bool(expired) == (next_s is not None and next_s <= self.scene.now.s)
        for task_id in expired:
            task = self.scene.flow.tasks[task_id]
            self.ends(task_id, Outcome.EXPIRED, None)
            assert task.queued_s == pytest.approx(max(task.max_queue_s, task.queued_s))
        after_s = self.scene.flow.next_expiry_s
        assert after_s is None or after_s > self.scene.now.s

    @rule()
    def sweep(self) -> None:
        self.scene.sweep()
        for agent in self.scene.flow.agents:
            is_busy = self.scene.flow.lives.is_busy(agent.id)
            assert is_busy or not (agent.record.final or agent.last_end_s <= self.scene.now.s - 30)

    @rule(policy=st.sampled_from(sorted(POLICIES)), beta=st.floats(0.5, 3), keep_kv=st.booleans())
    def change(self, policy: str, beta: float, keep_kv: bool) -> None:
        limits = ReleaseLimits(beta=beta)
        options = Options(limits=limits, max_queue_s=20, agent_idle_s=30, keep_kv=keep_kv)
        self.scene.flow.change(options, POLICIES[policy]())

    @rule(pause_s=st.sampled_from([0.0, 5.0, 5000.0]))
    def restart(self, pause_s: float) -> None:
        before = {record.id: record for record in self.scene.kept()}
        self.given_up |= set(self.scene.flow.tasks)
        self.take(self.scene.restarted(pause_s, **self.more()))
        assert self.scene.there() == set(before)
        for agent in self.scene.flow.agents:
            assert agent.arrived == agent.record.settled == before[agent.id].settled
            assert list(agent.tasks) == list(before[agent.id].tasks)

    # What is not allowed

    @rule(later_s=st.sampled_from([0.0, 3.0]))
    def a_refused_call_changes_nothing(self, later_s: float) -> None:
        scene, flow = self.scene, self.scene.flow
        scene.pass_s(later_s)
        self.unchanged(lambda: scene.settle(UNKNOWN), (KeyError,))
        self.unchanged(lambda: scene.lose(UNKNOWN), (KeyError,))
        for task_id in self.tasks(waiting=True)[:1]:
            self.unchanged(partial(scene.lose, task_id), (ValueError,))
        for task_id in sorted(self.settled)[-1:]:
            self.unchanged(partial(scene.settle, task_id), (KeyError,))
        for task_id in self.tasks()[:1]:
            scene._numbers, numbers = iter([task_id]), scene._numbers  # type: ignore[assignment]
            self.unchanged(lambda: scene.arrive("a", "x"), (ValueError, GatewayError))
            scene._numbers = numbers
        self.unchanged(lambda: scene.arrive("new", "x", weight=-1.0), (ValueError, GatewayError))
        assert flow.clock >= 0

    @invariant()
    def the_books_agree(self) -> None:
        self.scene.check()
        there = set(self.scene.flow.tasks)
        assert there | self.settled | self.given_up == self.arrived
        assert not there & self.settled and not self.settled & self.given_up

    @invariant()
    def virtual_time_never_goes_back(self) -> None:
        queue = self.scene.queue
        assert self.scene.flow.clock >= self.times.get("clock", 0.0)
        self.times["clock"] = Iterations(self.scene.flow.clock)
        for tenant in TENANTS:
            reached = queue.virtual_time(TenantId(tenant))
            assert reached >= self.times[tenant]
            self.times[tenant] = reached
        assert queue.outer_virtual_time >= self.times["outer"]
        self.times["outer"] = queue.outer_virtual_time

    @invariant()
    def what_grows_is_bounded(self) -> None:
        scene = self.scene
        assert not scene.flow._deadlines.waiting or max(
            map(len, scene.flow._deadlines.waiting.values())
        ) <= 8 + 4 * len(self.arrived)
        assert all(scene.flow._deadlines.waiting.values())
        for agent in scene.flow.agents:
            assert all(task.prompt is None for task in agent.tasks)

    def teardown(self) -> None:
        """All that has been accepted can be served to its end, and is."""
        if not hasattr(self, "scene"):
            return
        scene = self.scene
        for _ in range(2 * len(self.arrived) + 2):
            scene.pass_s(31)
            scene.flow.engine_checked(scene.now, True)
            for task_id in scene.release():
                self.ends(task_id, Outcome.COMPLETED, Usage(10, 4, 0))
            for task_id in self.tasks(waiting=False):
                self.ends(task_id, Outcome.FAILED, None)
            if not scene.flow.tasks:
                break
            if self.facts["linked"] is not None:
                scene.report()
        scene.check_over()
        scene.pass_s(31)
        scene.sweep()
        assert scene.there() == set() and scene.kept() == []
        scene.check_over()


TestFlowMachine = FlowMachine.TestCase
TestFlowMachine.settings = settings(max_examples=80, stateful_step_count=40)
