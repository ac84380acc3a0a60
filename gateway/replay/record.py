"""What is noted of a run while it lasts, and what follows from it."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.replay.bound import Bound
from gateway.replay.figures import mean, percentile
from gateway.replay.results import AgentResult, Memory, Summary, jain, spread
from predictor.types import FinishedTask

# The memory of each agent over time: every so many iterations, and no more points than a picture shows.
MEMORY_EVERY = 32
MEMORY_POINTS = 400


@dataclass(slots=True)
class Journey:
    """An agent on its way through a run. Times in seconds, and iterations, of the engine's clock."""

    trace: AgentTrace
    blocked_by: dict[str, int]  # by task: how many have to end before it
    successors: dict[str, list[TaskTrace]]  # by task: what may come when it has ended
    arrived: int = 0
    predicted: float = 0.0  # Ĉ at the first release
    largest_tag: float = -math.inf
    backlog_tag: float = 0.0  # at its end
    finish_s: float = 0.0
    finish_iteration: int = 0
    preemptions: int = 0
    held: float = 0.0  # KV token·iterations, as the engine's scheduler counts them
    finished: dict[str, FinishedTask] = field(default_factory=dict)  # by task


class _VirtualTime:
    """V by iteration."""

    def __init__(self) -> None:
        self._iterations, self._values = [0], [0.0]

    def note(self, iteration: int, value: float) -> None:
        if value > self._values[-1]:
            self._iterations.append(iteration)
            self._values.append(value)

    def reached(self, value: float) -> int | None:
        """The iteration after which V had reached a value; None if it never did."""
        # What rounding does to sums of work must not make it an iteration more.
        place = bisect_left(self._values, value * (1 - 1e-9))
        return self._iterations[place] if place < len(self._iterations) else None


class Record:
    def __init__(self) -> None:
        self.bound = Bound()
        self.iteration = 0
        self.idle_s = 0.0  # that the engine had nothing to do
        self._clock = [0.0]  # seconds after each iteration
        self._virtual: dict[str, _VirtualTime] = {}  # by tenant
        self._served: list[float] = []  # KV tokens, in iterations while tasks waited
        self._usage: list[float] = []
        self._memory: list[tuple[float, dict[str, int]]] = []
        self.decision_s: list[float] = []

    def stepped(self, now_s: float, work: float, usage: float, capacity: float | None, shared: float = 0.0) -> None:
        """An iteration: at its end the clock stood at `now_s`. `usage`: the share of the KV cache held. For the others see
        `Bound.served`."""
        self.iteration += 1
        self._clock.append(now_s)
        self.bound.served(work, capacity, shared)
        if capacity is not None:
            self._served.append(work - shared)
            self._usage.append(usage)

    def virtual_time(self, tenant: str, value: float) -> None:
        self._virtual.setdefault(tenant, _VirtualTime()).note(self.iteration, value)

    def memory(self, tokens: dict[str, int]) -> None:
        self._memory.append((self._clock[-1], tokens))

    def agent(self, journey: Journey) -> AgentResult:
        trace = journey.trace
        reached = self._reached(trace.tenant, journey.backlog_tag)
        # If V was still short of it at the end, the agent was early; by how much is unknown.
        reference_s = journey.finish_s if reached is None else max(trace.arrival_s, self._clock[reached])
        return AgentResult(
            agent_id=trace.agent_id,
            agent_class=trace.agent_class,
            tenant=trace.tenant,
            arrival_s=trace.arrival_s,
            finish_s=journey.finish_s,
            jct_s=journey.finish_s - trace.arrival_s,
            reference_finish_s=reference_s,
            lateness_s=journey.finish_s - reference_s,
            cost=sum(task.cost for task in journey.finished.values()),
            predicted_cost=journey.predicted,
            tasks=len(trace.tasks),
            preemptions=journey.preemptions,
            cached_tokens=sum(task.cached_tokens for task in journey.finished.values()),
            net_cost=sum(task.net_cost for task in journey.finished.values()),
            held=journey.held,
        )

    def tag_lateness(self, journey: Journey) -> int:
        """Iterations from when V reached the agent's largest tag to its finish."""
        reached = self._reached(journey.trace.tenant, journey.largest_tag)
        return 0 if reached is None else journey.finish_iteration - reached

    def summary(
        self, journeys: list[Journey], agents: list[AgentResult], preemptions: int, recomputed_tokens: int
    ) -> Summary:
        prompt_tokens = sum(task.prompt_tokens for journey in journeys for task in journey.finished.values())
        step_s = (self._clock[-1] - self.idle_s) / max(1, self.iteration)
        bound = self.bound.iterations()
        jcts = [agent.jct_s for agent in agents]
        return Summary(
            agents=len(agents),
            tasks=sum(agent.tasks for agent in agents),
            **spread(jcts),
            makespan_s=max(agent.finish_s for agent in agents) - min(agent.arrival_s for agent in agents),
            iterations=self.iteration,
            preemptions=preemptions,
            recomputed_tokens=recomputed_tokens,
            served_tokens=mean(self._served) if self._served else 0.0,
            mean_kv_usage=mean(self._usage) if self._usage else 0.0,
            prefix_hit_rate=sum(agent.cached_tokens for agent in agents) / prompt_tokens,
            no_later_than_reference=sum(agent.lateness_s <= 0 for agent in agents) / len(agents),
            worst_lateness_s=max(agent.lateness_s for agent in agents),
            bound_s=bound * step_s,
            jain=jain([max(0.0, a.reference_finish_s - a.arrival_s) / a.jct_s for a in agents]),
            worst_tag_lateness_iterations=max(map(self.tag_lateness, journeys)),
            bound_iterations=bound,
            bound_terms=self.bound.terms(),
            decision_us_p50=percentile(self.decision_s, 0.5) * 1e6 if self.decision_s else None,
            decision_us_p99=percentile(self.decision_s, 0.99) * 1e6 if self.decision_s else None,
        )

    def memory_over_time(self, most: int = 12) -> Memory | None:
        """Of the agents that held most, apart, and of all others together."""
        if not self._memory:
            return None
        totals: dict[str, int] = {}
        for _, tokens in self._memory:
            for agent_id, held in tokens.items():
                totals[agent_id] = totals.get(agent_id, 0) + held
        names = sorted(totals, key=lambda name: (-totals[name], name))[:most]
        points = self._memory[:: -(-len(self._memory) // MEMORY_POINTS)]
        tokens_of = {name: [tokens.get(name, 0) for _, tokens in points] for name in names}
        tokens_of["others"] = [sum(held for name, held in tokens.items() if name not in names) for _, tokens in points]
        return Memory([now_s for now_s, _ in points], tokens_of)

    def _reached(self, tenant: str, value: float) -> int | None:
        virtual = self._virtual.get(tenant)
        return None if virtual is None else virtual.reached(value)
