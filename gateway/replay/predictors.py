"""What the replayed gateway believes: exactly what is true, that with noise, or what a predictor has learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from gateway.trace import AgentTrace, TaskTrace
from predictor.cost import task_cost
from predictor.ladder import PRIOR_BYTES_PER_TOKEN, Ladder
from predictor.types import AgentProgress, FinishedAgent, FinishedTask, TaskFeatures, TaskPrediction

Cost = Callable[[float, float, float], float]  # of prompt, decode and cached tokens


class UnknownPredictor(ValueError):
    """A predictor that cannot be had, in words."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an agent has come: tasks that have arrived, and their cost, true where it is known."""

    tasks: int
    cost: float


class Beliefs(Protocol):
    """Lengths in tokens, costs in KV token·iterations."""

    def task(self, agent: AgentTrace, task: TaskTrace) -> TaskPrediction: ...

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        """Ĉ."""
        ...

    def learn(self, agent: AgentTrace, finished: Sequence[FinishedTask]) -> None: ...


class Exact:
    """All lengths and costs are known."""

    def __init__(self, cost: Cost = task_cost) -> None:
        self._cost = cost

    def task(self, agent: AgentTrace, task: TaskTrace) -> TaskPrediction:
        return TaskPrediction(task.prompt_tokens, task.output_tokens)

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return sum(self._cost(task.prompt_tokens, task.output_tokens, 0.0) for task in agent.tasks)

    def learn(self, agent: AgentTrace, finished: Sequence[FinishedTask]) -> None:
        pass


class Noise(Exact):
    """The truth times log-normal noise of median 1: one factor for an agent's total, one for each output length."""

    def __init__(self, sigma: float, seed: int, cost: Cost = task_cost) -> None:
        super().__init__(cost)
        self._sigma, self._seed = sigma, seed

    def task(self, agent: AgentTrace, task: TaskTrace) -> TaskPrediction:
        return TaskPrediction(
            task.prompt_tokens, max(1.0, task.output_tokens * self._factor(f"{agent.agent_id}/{task.id}"))
        )

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return super().agent(agent, progress) * self._factor(agent.agent_id)

    def _factor(self, name: str) -> float:
        return math.exp(Random(f"{self._seed}/{name}").gauss(0, self._sigma))  # noqa: S311 (noise, not a secret)


class Learned:
    """The ladder, as it serves: told what a gateway sees, and learning from each agent that finishes."""

    def __init__(self, past: Sequence[AgentTrace] = ()) -> None:
        self._ladder = Ladder()
        for agent in past:
            self.learn(agent, [finished_task(task, task.cached_tokens) for task in agent.tasks])

    def task(self, agent: AgentTrace, task: TaskTrace) -> TaskPrediction:
        features = TaskFeatures(agent.agent_class or None, agent.tenant, _prompt_bytes(task))
        return self._ladder.predict_task(features)

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return self._ladder.predict_agent(
            AgentProgress(agent.agent_class or None, agent.tenant, progress.tasks, progress.cost)
        )

    def learn(self, agent: AgentTrace, finished: Sequence[FinishedTask]) -> None:
        self._ladder.learn(FinishedAgent(agent.agent_class or None, agent.tenant, list(finished)))


def finished_task(task: TaskTrace, cached_tokens: int, held: float | None = None) -> FinishedTask:
    return FinishedTask(_prompt_bytes(task), task.prompt_tokens, cached_tokens, task.output_tokens, held=held)


def compute_cost(prompt_tokens: float, decode_tokens: float, cached_tokens: float = 0.0) -> float:
    """The cost that the paper argues against: tokens computed, each as dear as the other, however long they are held."""
    return prompt_tokens - cached_tokens + decode_tokens


COSTS: dict[str, Cost] = {"memory": task_cost, "compute": compute_cost}


def beliefs(name: str, *, seed: int = 0, past: Sequence[AgentTrace] = (), cost: Cost = task_cost) -> Beliefs:
    """`exact`, `ladder`, or `noise:SIGMA`. Raises `UnknownPredictor`."""
    if name == "exact":
        return Exact(cost)
    if name == "ladder":
        if cost is not task_cost:
            raise UnknownPredictor("the ladder learns memory-centric costs only: take exact or noise:SIGMA")
        return Learned(past)
    kind, _, sigma = name.partition(":")
    try:
        if kind == "noise" and 0 <= float(sigma) < math.inf:
            return Noise(float(sigma), seed, cost)
    except ValueError:
        pass
    raise UnknownPredictor(f"no predictor {name!r}: exact, ladder, or noise:SIGMA with a number of at least 0")


def _prompt_bytes(task: TaskTrace) -> int:
    """Without a text: as many as English of that many tokens has."""
    return len(task.prompt.encode()) if task.prompt is not None else round(task.prompt_tokens * PRIOR_BYTES_PER_TOKEN)
