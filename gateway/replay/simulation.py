"""One run: agents, the fair queue, and vLLM's scheduler on a virtual clock.

An event loop of one thread. Between two iterations of the engine, what has arrived is enqueued, and what the queue says is
released; after the iteration, what has ended is completed. It is the gateway's own queue, asked in the gateway's way; what
is left out is HTTP.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from engine.hints import Hints, to_tag
from engine.profile import StepProfile
from gateway.capacity import CAPACITY_ITERATIONS, ServedCapacity
from gateway.fairness import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    ReleaseLimits,
    Spent,
    Task,
    TaskId,
    TenantId,
)
from gateway.replay.predictors import Beliefs, Cost, Progress, finished_task
from gateway.replay.record import MEMORY_EVERY, Journey, Record
from gateway.replay.results import ReleaseName, Run
from gateway.tool_waits import ToolWaits
from gateway.trace import AgentTrace, Prefix, TaskTrace, TraceError
from predictor.cost import task_cost

if TYPE_CHECKING:
    from engine.virtual import Ended, Step, VirtualEngine

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
# The engine's own waiting tasks that the gateway's slots leave room for.
ENGINE_WAITING = 4


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
    # Of our scheduler: KV of agents that wait for tools, and who may push others aside; and what a task is charged.
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
    beliefs: Beliefs,
    setup: Setup,
    *,
    predictor: str = "",
    finished: Callable[[int], None] = lambda agents: None,
) -> Run:
    """One trace under one policy. `finished` is called with the number of agents that have, as it grows. Raises `TraceError`
    for a task that is too long for the engine."""
    simulation = _Simulation(agents, policy, release, beliefs, setup, finished)
    simulation.run()
    return simulation.result(policy, predictor, release)


class _Simulation:
    def __init__(
        self,
        agents: Sequence[AgentTrace],
        policy: str,
        release: ReleaseName,
        beliefs: Beliefs,
        setup: Setup,
        finished: Callable[[int], None],
    ) -> None:
        from engine.virtual import VirtualEngine

        self._beliefs, self._setup, self._finished = beliefs, setup, finished
        self._engine: VirtualEngine = VirtualEngine(
            setup.profile,
            scheduler=setup.engine_scheduler,
            kv_blocks=setup.kv_blocks,
            block_size=setup.block_size,
            max_num_seqs=setup.max_num_seqs,
            prefix_caching=setup.prefix_caching,
            displace_margin=setup.displace_margin,
        )
        slots = setup.max_num_seqs or setup.profile.max_num_seqs
        limits = replace(release_limits(release, setup.beta, slots), displace_margin=setup.displace_margin)
        self._queue = FairQueue(POLICIES[policy](), limits)
        self._refuse_too_long(agents)
        self._journeys = [_journey(agent) for agent in agents]
        self._tenants = sorted({agent.tenant for agent in agents})
        self._successors = _successors(agents)
        self._arrivals: list[tuple[float, int, int, TaskTrace]] = []  # (when, to break ties, agent's place, task)
        self._expected = 0
        self._tasks: dict[int, tuple[Journey, TaskTrace]] = {}  # by number; those that have arrived and not ended
        self._next_task = 0
        for place, agent in enumerate(agents):
            for task in agent.tasks:
                if not task.after:
                    self._will_arrive(agent.arrival_s + task.think_s, place, task)
        self._places = {agent.agent_id: place for place, agent in enumerate(agents)}
        self._last: Step | None = None
        self._done = 0
        self._charge_held = setup.charge == "held" and setup.cost is task_cost
        # Who takes what the engine has room for does not ask for more.
        self._keep = (
            setup.keep and setup.prefix_caching and setup.engine_scheduler == "justitia" and release == "memory"
        )
        self._waits = ToolWaits()
        self._idle_since: dict[AgentId, Iterations] = {}
        self._record = Record()
        self._served = ServedCapacity()
        # Where costs are not tokens held, capacity is what the same engine does of them.
        self._unit = _total(agents, setup.cost) / _total(agents, task_cost)
        self._capacity_tokens = 0.0
        self._take_capacity()

    def run(self) -> None:
        while self._arrivals or self._tasks:
            self._enqueue_arrived()
            self._release()
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
            self._observe(step)
            for ended in step.ended:
                self._complete(ended)
        self._note_virtual_time()

    def result(self, policy: str, predictor: str, release: str) -> Run:
        agents = [self._record.agent(journey) for journey in self._journeys]
        engine = self._engine
        summary = self._record.summary(self._journeys, agents, engine.preemptions, engine.recomputed_tokens)
        return Run(policy, predictor, release, summary, agents, self._record.memory_over_time())

    # Between two iterations

    @property
    def _now(self) -> Iterations:
        return Iterations(float(self._engine.iterations))

    def _will_arrive(self, at_s: float, place: int, task: TaskTrace) -> None:
        heapq.heappush(self._arrivals, (at_s, self._expected, place, task))
        self._expected += 1

    def _enqueue_arrived(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self._engine.now_s:
            _, _, place, task = heapq.heappop(self._arrivals)
            key = self._next_task  # grows with arrival
            self._next_task += 1
            journey = self._journeys[place]
            agent = journey.trace
            self._tasks[key] = journey, task
            known = self._queue.agents.get(AgentId(agent.agent_id))
            arrived = self._beliefs.arrive(agent, task, _progress(journey, known.arrived if known else 0.0))
            belief, total = arrived.task, KvTokenIterations(arrived.agent_cost)
            cost = KvTokenIterations(self._setup.cost(belief.prompt_tokens, belief.decode_tokens, 0.0))
            journey.arrived += 1
            predicted = Task(TaskId(key), AgentId(agent.agent_id), cost, belief.memory_tokens, belief.prompt_tokens)
            tenant = TenantId(agent.tenant)
            idle_since = self._idle_since.pop(AgentId(agent.agent_id), None)
            if idle_since is not None:
                journey.returns += 1
                self._waits.came_back(agent.tenant, agent.agent_class, self._now - idle_since)
            self._ask(self._queue.enqueue, self._now, predicted, total, weight=agent.weight, tenant=tenant)

    def _release(self) -> None:
        from engine.virtual import VirtualTask

        for release in self._ask(self._queue.release, self._now, self._engine.waiting):
            key = int(release.task.id)
            journey, task = self._tasks[key]
            agent = self._queue.agents[release.task.agent_id]
            journey.predicted = journey.predicted or agent.predicted
            journey.largest_tag = max(journey.largest_tag, agent.finish_tag)
            hints = Hints(to_tag(release.rank), agent.id, key)
            self._engine.add(VirtualTask(key, task.prompt_tokens, task.output_tokens, hints, _beginnings(task.prefix)))
            true_cost = self._setup.cost(task.prompt_tokens, task.output_tokens, 0.0)
            self._record.bound.released(self._record.iteration, key, agent.id, true_cost, release.task.cost)
        if self._setup.engine_scheduler == "justitia":
            for revised in self._ask(self._queue.revise):
                self._engine.change_tag(int(revised.task.id), to_tag(revised.rank))

    def _observe(self, step: Step) -> None:
        """What the engine's reports tell a gateway, and what is noted of the iteration."""
        engine, queue = self._engine, self._queue
        decoding = tasks = 0
        for key, kv_tokens, output_tokens in step.running:
            if output_tokens:
                tasks += 1
                decoding += kv_tokens + 1  # and the token just sampled
                queue.observe(self._now, TaskId(key), kv_tokens + 1, output_tokens)
        if tasks and tasks == queue.in_flight:  # else what the queue reckons with is not there yet, or not any more
            queue.calibrate(self._now, engine.held_tokens)
        ended = sum(self._tasks[key][1].prompt_tokens + output for key, output, *_ in step.ended)
        shared = max(0, decoding - engine.held_tokens)  # blocks that tasks share are held once
        waits = queue.waiting > 0
        self._record.stepped(
            engine.now_s,
            (decoding + ended) * self._unit,
            engine.held_tokens / engine.capacity_tokens,
            self._capacity_tokens * self._unit if waits else None,
            shared * self._unit,
        )
        if waits:
            self._served.observe(1, decoding + ended - shared)
        if engine.iterations % CAPACITY_ITERATIONS == 0:
            self._take_capacity()
        if self._setup.memory_over_time and engine.iterations % MEMORY_EVERY == 0:
            held: dict[str, int] = defaultdict(int)
            for key, kv_tokens, _ in step.running:
                held[self._tasks[key][0].trace.agent_id] += kv_tokens
            self._record.memory(held)

    def _complete(self, ended: Ended) -> None:
        key, cached_tokens = ended.key, ended.cached_tokens
        journey, task = self._tasks.pop(key)
        agent_id = AgentId(journey.trace.agent_id)
        agent = self._queue.agents[agent_id]
        cost = KvTokenIterations(self._setup.cost(task.prompt_tokens, task.output_tokens, cached_tokens))
        held = ended.held if self._charge_held else None
        journey.held += ended.held or 0.0
        if held is not None:
            cost = KvTokenIterations(held)
        believed = agent.in_flight[TaskId(key)].task.cost
        arrived, total = max(0.0, agent.arrived - believed + cost), agent.predicted
        if arrived > total:  # else it stands
            total = KvTokenIterations(self._beliefs.agent(journey.trace, _progress(journey, arrived)))
        spent = Spent(cost, task.prompt_tokens, task.output_tokens)
        self._ask(self._queue.complete, self._now, TaskId(key), spent, total)
        self._record.bound.ended(self._record.iteration, key)
        journey.largest_tag = max(journey.largest_tag, agent.finish_tag)
        journey.finished[task.id] = finished_task(task, cached_tokens, held)
        journey.left -= 1
        for successor in self._successors.get((agent_id, task.id), ()):
            journey.blocked_by[successor.id] -= 1
            if not journey.blocked_by[successor.id]:
                place = self._places[agent_id]
                self._will_arrive(self._engine.now_s + successor.think_s, place, successor)
        if not journey.left:
            self._finish(journey, agent_id)
        elif not agent.busy:
            self._idle_since[agent_id] = self._now
            if self._keep:
                engine, kind = self._engine, (journey.trace.tenant, journey.trace.agent_class)
                refill_s = engine.capacity_tokens * self._setup.profile.per_prefill_token_s
                reserve = self._waits.worth_reserving(*kind, refill_s * engine.iterations / engine.now_s)
                engine.keep(agent_id, self._waits.worth_keeping(*kind))
                self._queue.reserve(self._now, agent_id, task.prompt_tokens + task.output_tokens, reserve)

    def _finish(self, journey: Journey, agent_id: AgentId) -> None:
        journey.finish_s, journey.finish_iteration = self._engine.now_s, self._record.iteration
        journey.backlog_tag = self._queue.backlog_tag(agent_id)
        self._waits.ended(journey.trace.tenant, journey.trace.agent_class)
        self._queue.evict(self._now, agent_id)
        self._beliefs.learn(journey.trace, journey.finished)
        self._done += 1
        self._finished(self._done)

    def _note_virtual_time(self) -> None:
        for tenant in self._tenants:
            self._record.virtual_time(tenant, self._queue.virtual_time(TenantId(tenant)))

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

    def _take_capacity(self) -> None:
        tokens = self._engine.capacity_tokens
        self._capacity_tokens = self._served.tokens(tokens) if self._setup.capacity == "served" else float(tokens)
        self._queue.set_capacity(self._now, tokens, self._capacity_tokens * self._unit)

    def _ask(self, call: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        """One decision of the queue."""
        started = time.perf_counter()
        answer = call(*args, **kwargs)
        if self._setup.timings:
            self._record.decision_s.append(time.perf_counter() - started)
        return answer


def _journey(agent: AgentTrace) -> Journey:
    return Journey(agent, len(agent.tasks), {task.id: len(set(task.after)) for task in agent.tasks})


def _progress(journey: Journey, cost_arrived: float) -> Progress:
    cost_ended = sum(task.cost for task in journey.finished.values())
    return Progress(journey.arrived, len(journey.finished), cost_arrived, cost_ended, journey.returns)


def _successors(agents: Sequence[AgentTrace]) -> dict[tuple[str, str], list[TaskTrace]]:
    """By agent and task: what may come when it has ended."""
    successors: dict[tuple[str, str], list[TaskTrace]] = defaultdict(list)
    for agent in agents:
        for task in agent.tasks:
            for earlier in set(task.after):
                successors[agent.agent_id, earlier].append(task)
    return successors


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
