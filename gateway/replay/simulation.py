"""One run: agents, the gateway's flow controller, and vLLM's scheduler on a virtual clock.

An event loop of one thread. Between two iterations of the engine, what has arrived is enqueued, and what the controller
releases is added to the engine; after the iteration the engine reports, and what has ended is settled. It is the object that
serves in the gateway, driven by a virtual clock: what is left out is HTTP.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from engine.hints import Hints, to_tag
from engine.lab.profile import StepProfile
from engine.link import PROTOCOL, Hello, Report
from engine.link import Ended as EngineEnded
from gateway.agent_trace import AgentTrace, Prefix, TaskTrace, TraceError
from gateway.flowcontrol import ENGINE, Arriving, Effects, Ending, FlowController, Now, Options, Quotas
from gateway.flowcontrol import Ended as AgentEnded
from gateway.flowcontrol.estimate import Cost
from gateway.flowcontrol.fairqueue import POLICIES, AgentId, FairQueue, Policy, ReleaseLimits, TaskId, TenantId
from gateway.protocol.errors import Outcome
from gateway.protocol.usage import Usage
from gateway.replay.predictors import Believed, content_of
from gateway.replay.record import MEMORY_EVERY, Journey, Record
from gateway.replay.results import ReleaseName, Run
from predictor.cost import task_cost

if TYPE_CHECKING:
    from engine.lab.virtual import Ended, Step, VirtualEngine

# Tasks in the engine's own queue that the gateway's slots leave room for.
ENGINE_WAITING = 4
# The traces' tenants have no limits.
_UNLIMITED = 2**62


@dataclass(frozen=True, slots=True)
class Setup:
    """What the runs of a replay have in common.

    beta: of the release by memory. cost: the formula, for prompt, decode and cached tokens. capacity: what the reference
    shares out: all blocks, or as much as was seen to be held while tasks waited. None, of a size: the profile's.
    """

    profile: StepProfile
    kv_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    engine_scheduler: Literal["justitia", "stock"] = "justitia"
    beta: float = 1.0
    cost: Cost = task_cost
    capacity: Literal["blocks", "served"] = "served"
    prefix_caching: bool = False
    # Of our scheduler: KV of agents that wait for tools, and which tasks may displace others; and what a task is charged.
    keep: bool = True
    displace_margin: float | None = None
    charge: Literal["held", "formula"] = "held"
    timings: bool = False
    memory_over_time: bool = False


def release_limits(release: ReleaseName, beta: float, max_num_seqs: int) -> ReleaseLimits:
    """memory: by predicted memory, as the gateway does. engine: what an engine would admit that has room for the prompt.
    all: at once, and only the engine's own queue has an order."""
    if release == "memory":
        return ReleaseLimits(beta=beta, engine_waiting=ENGINE_WAITING, in_flight=max_num_seqs + ENGINE_WAITING)
    if release == "engine":
        return ReleaseLimits(beta=1.0, foresight=False, engine_waiting=0, in_flight=max_num_seqs)
    return ReleaseLimits(beta=math.inf, foresight=False, engine_waiting=None)


def simulate(
    agents: Sequence[AgentTrace],
    policy: str,
    release: ReleaseName,
    believed: Believed,
    setup: Setup,
    *,
    predictor: str = "",
    finished: Callable[[int], None] = lambda agents: None,
) -> Run:
    """One trace under one policy. `finished` is called with the number of agents that have, as it grows. Raises `TraceError`
    for a task that is too long for the engine."""
    simulation = _Simulation(agents, policy, release, believed, setup, finished)
    simulation.run()
    return simulation.result(policy, predictor, release)


class TimedQueue(FairQueue):
    """The fair queue, which notes how long each of its decisions takes, in seconds; None: it does not."""

    def __init__(self, policy: Policy, limits: ReleaseLimits, decision_s: list[float] | None) -> None:
        super().__init__(policy, limits)
        if decision_s is not None:
            for name in ("enqueue", "release", "revise", "complete"):
                setattr(self, name, _timed(getattr(self, name), decision_s))


def _timed(call: Callable[..., Any], taken_s: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        answer = call(*args, **kwargs)
        taken_s.append(time.perf_counter() - started)
        return answer

    return timed


class _Simulation:
    def __init__(
        self,
        agents: Sequence[AgentTrace],
        policy: str,
        release: ReleaseName,
        believed: Believed,
        setup: Setup,
        finished: Callable[[int], None],
    ) -> None:
        from engine.lab.virtual import VirtualEngine

        self._believed, self._setup, self._finished = believed, setup, finished
        self._engine: VirtualEngine = VirtualEngine(
            setup.profile,
            scheduler=setup.engine_scheduler,
            kv_blocks=setup.kv_blocks,
            block_size=setup.block_size,
            max_num_seqs=setup.max_num_seqs,
            prefix_caching=setup.prefix_caching,
            displace_margin=setup.displace_margin,
        )
        self._refuse_too_long(agents)
        self._record = Record()
        # Where costs are not tokens held, capacity is what the same engine does of them.
        self._unit = _total(agents, setup.cost) / _total(agents, task_cost)
        self._block_size = setup.block_size or setup.profile.block_size
        self._flow = self._controller(policy, release)
        self._journeys = {agent.agent_id: _journey(agent) for agent in agents}
        self._tenants = sorted({agent.tenant for agent in agents})
        self._arrivals: list[tuple[float, int, Journey, TaskTrace]] = []  # (when, to break ties, agent, task)
        self._expected = 0
        self._tasks: dict[int, tuple[Journey, TaskTrace]] = {}  # by number; those that have arrived and not ended
        self._next_task = 0
        for journey in self._journeys.values():
            for task in journey.trace.tasks:
                if not task.after:
                    self._will_arrive(journey.trace.arrival_s + task.think_s, journey, task)
        self._last: Step | None = None
        self._done = 0

    def run(self) -> None:
        while self._arrivals or self._tasks:
            self._enqueue_arrived()
            self._apply(self._flow.release(self._now))
            self._note_virtual_time()
            if self._engine.idle:
                self._record.idle_s += self._arrivals[0][0] - self._engine.now_s
                self._engine.wait_until(self._arrivals[0][0])
                continue
            preemptions = self._engine.preemptions
            step = self._engine.step()
            if self._engine.preemptions > preemptions:
                self._count_victims(step)
            self._last = step
            self._report(step)
            for ended in step.ended:
                self._settle(ended)
        self._note_virtual_time()

    def result(self, policy: str, predictor: str, release: str) -> Run:
        journeys = list(self._journeys.values())
        agents = [self._record.agent(journey) for journey in journeys]
        engine = self._engine
        summary = self._record.summary(journeys, agents, engine.preemptions, engine.recomputed_tokens)
        return Run(policy, predictor, release, summary, agents, self._record.memory_over_time())

    def _controller(self, policy: str, release: ReleaseName) -> FlowController:
        setup, engine = self._setup, self._engine
        slots = setup.max_num_seqs or setup.profile.max_num_seqs
        options = Options(
            limits=replace(release_limits(release, setup.beta, slots), displace_margin=setup.displace_margin),
            follow_engine=False,
            # A policy that takes what the engine has room for does not ask for more.
            keep_kv=setup.keep and setup.engine_scheduler == "justitia" and release == "memory",
            cost=setup.cost,
            charge_held=setup.charge == "held" and setup.cost is task_cost,
            share_served=setup.capacity == "served",
            cost_per_held=self._unit,
        )
        queue = TimedQueue(POLICIES[policy](), options.limits, self._record.decision_s if setup.timings else None)
        flow = FlowController(queue, Quotas(_UNLIMITED, _UNLIMITED), self._believed, options)
        linked = setup.engine_scheduler == "justitia"
        hello = Hello(
            PROTOCOL,
            ENGINE,
            "",
            engine.capacity_tokens // self._block_size,
            self._block_size,
            slots,
            engine.max_model_len,
            setup.prefix_caching,
            setup.displace_margin,
        )
        flow.engine_checked(self._now, is_up=True)
        flow.engine_reports(self._now, hello, linked=linked)
        report = Report(engine_id=ENGINE, iteration=0, free_blocks=hello.total_blocks, running=0, waiting=0)
        flow.engine_reports(self._now, report, linked=linked)
        return flow

    # Between two iterations

    @property
    def _now(self) -> Now:
        return Now(round(self._engine.now_s * 1e9), self._engine.now_s)

    def _will_arrive(self, at_s: float, journey: Journey, task: TaskTrace) -> None:
        heapq.heappush(self._arrivals, (at_s, self._expected, journey, task))
        self._expected += 1

    def _enqueue_arrived(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self._engine.now_s:
            _, _, journey, task = heapq.heappop(self._arrivals)
            agent = journey.trace
            number = self._next_task  # grows with arrival
            self._next_task += 1
            self._tasks[number] = journey, task
            journey.arrived += 1
            arriving = Arriving(
                id=TaskId(number),
                tenant=agent.tenant,
                agent=agent.agent_id,
                source="trace",
                content=content_of(agent, task),
                agent_class=agent.agent_class or None,
                weight=agent.weight,
                expected_tasks=agent.expected_tasks,
                final=journey.arrived == len(agent.tasks),
            )
            self._flow.arrive(self._now, arriving)

    def _apply(self, effects: Effects) -> None:
        """What the controller wants done."""
        from engine.lab.virtual import VirtualTask

        for release in effects.releases:
            number = int(release.task.id)
            journey, task = self._tasks[number]
            agent = self._flow.queue.agents[release.task.agent_id]
            journey.predicted = journey.predicted or agent.predicted
            journey.largest_tag = max(journey.largest_tag, agent.finish_tag)
            hints = Hints(to_tag(release.rank), journey.trace.agent_id, number)
            prefix = _beginnings(task.prefix)
            self._engine.add(VirtualTask(number, task.prompt_tokens, task.output_tokens, hints, prefix))
            true_cost = self._setup.cost(task.prompt_tokens, task.output_tokens, 0.0)
            self._record.bound.released(self._record.iteration, number, agent.id, true_cost, release.task.cost)
        for revised in effects.revised:
            self._engine.change_tag(int(revised.task.id), to_tag(revised.rank))
        for agent_id, iterations in effects.keep.items():
            self._engine.keep(self._flow.agents.by_id[AgentId(agent_id)].record.name, iterations)
        for ended in effects.ended:
            self._finish(self._journeys[ended.record.name], ended)

    def _report(self, step: Step) -> None:
        """What the engine's scheduler reports after an iteration, and what is noted of it."""
        engine, flow, now_s = self._engine, self._flow, self._engine.now_s
        held_tokens, iterations = engine.held_tokens, engine.iterations
        numbers = [number for number, _, _ in step.running]
        kv_tokens, output_tokens = [kv for _, kv, _ in step.running], [made for _, _, made in step.running]
        decoding = sum([kv + 1 for kv, made in zip(kv_tokens, output_tokens, strict=True) if made])
        ended = sum(self._tasks[one.key][1].prompt_tokens + one.output_tokens for one in step.ended)
        shared = max(0, decoding - held_tokens)  # blocks that tasks share are held once
        self._record.stepped(
            now_s,
            (decoding + ended) * self._unit,
            held_tokens / engine.capacity_tokens,
            flow.following.shared_tokens if flow.queue.waiting else None,
            shared * self._unit,
        )
        report = Report(
            engine_id=ENGINE,
            iteration=iterations,
            free_blocks=(engine.capacity_tokens - held_tokens) // self._block_size,
            running=len(numbers),
            waiting=engine.waiting,
            prefill_iterations=self._setup.profile.per_prefill_token_s * iterations / (now_s - self._record.idle_s),
            tasks=numbers,
            kv_tokens=kv_tokens,
            output_tokens=output_tokens,
        )
        flow.engine_reports(self._now, report, linked=self._setup.engine_scheduler == "justitia")
        if self._setup.memory_over_time and engine.iterations % MEMORY_EVERY == 0:
            held: dict[str, int] = defaultdict(int)
            for number, kv, _ in step.running:
                held[self._tasks[number][0].trace.agent_id] += kv
            self._record.memory(held)

    def _settle(self, ended: Ended) -> None:
        journey, task = self._tasks.pop(ended.key)
        task_id, usage = TaskId(ended.key), Usage(task.prompt_tokens, task.output_tokens, ended.cached_tokens)
        journey.held += ended.held or 0.0
        if ended.held is not None:
            costs = EngineEnded(ENGINE, {ended.key: ended.held})
            self._flow.engine_reports(self._now, costs)
        agent = self._flow.queue.agents[self._flow.tasks[task_id].agent.id]
        settlement, effects = self._flow.settle(self._now, task_id, Ending(Outcome.COMPLETED, usage))
        assert settlement.finished is not None
        self._record.bound.ended(self._record.iteration, ended.key)
        journey.largest_tag = max(journey.largest_tag, agent.finish_tag)
        journey.finished[task.id] = settlement.finished
        for successor in journey.successors.get(task.id, ()):
            journey.blocked_by[successor.id] -= 1
            if not journey.blocked_by[successor.id]:
                self._will_arrive(self._engine.now_s + successor.think_s, journey, successor)
        self._apply(effects)

    def _finish(self, journey: Journey, ended: AgentEnded) -> None:
        journey.finish_s, journey.finish_iteration = self._engine.now_s, self._record.iteration
        if ended.finished is not None:
            self._believed.learn(ended.finished)
        journey.backlog_tag = ended.backlog_tag
        self._done += 1
        self._finished(self._done)

    def _note_virtual_time(self) -> None:
        for tenant in self._tenants:
            self._record.virtual_time(tenant, self._flow.queue.virtual_time(TenantId(tenant)))

    def _count_victims(self, step: Step) -> None:
        there = {key for key, *_ in step.running} | {key for key, *_ in step.ended}
        before = self._last.running if self._last is not None else []
        for key in {key for key, *_ in before} - there:
            self._tasks[key][0].preemptions += 1

    def _refuse_too_long(self, agents: Sequence[AgentTrace]) -> None:
        most = min(self._engine.capacity_tokens, self._engine.max_model_len)
        for agent in agents:
            for task in agent.tasks:
                if task.prompt_tokens + task.output_tokens > most:
                    raise TraceError(
                        f"task {task.id!r} of agent {agent.agent_id!r} is {task.prompt_tokens} + {task.output_tokens} tokens"
                        f" long, and the engine holds {most}"
                    )


def _journey(agent: AgentTrace) -> Journey:
    successors: dict[str, list[TaskTrace]] = defaultdict(list)
    for task in agent.tasks:
        for earlier in set(task.after):
            successors[earlier].append(task)
    return Journey(agent, {task.id: len(set(task.after)) for task in agent.tasks}, successors)


def _total(agents: Sequence[AgentTrace], cost: Cost) -> float:
    return sum(cost(task.prompt_tokens, task.output_tokens, 0.0) for agent in agents for task in agent.tasks)


def _beginnings(prefix: Prefix | None) -> tuple[tuple[str, int], ...]:
    """Outermost first."""
    beginnings: list[tuple[str, int]] = []
    while prefix is not None:
        if prefix.tokens > (prefix.parent.tokens if prefix.parent is not None else 0):
            beginnings.insert(0, (prefix.id, prefix.tokens))
        prefix = prefix.parent
    return tuple(beginnings)
