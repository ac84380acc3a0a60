"""What the replayed gateway believes: exactly what is true, that with noise, or what a predictor has learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from random import Random
from statistics import fmean
from typing import NamedTuple, Protocol

import msgspec

from gateway.trace import AgentTrace, TaskTrace
from predictor.cost import task_cost
from predictor.features import SCHEMA, is_kept
from predictor.ladder import PRIOR_BYTES_PER_TOKEN
from predictor.learned import Learned
from predictor.mlp import MlpUnavailable, PaperMlp, Sample
from predictor.model import Boosted
from predictor.train import FEWEST_AGENTS, TooFewAgents, train
from predictor.types import (
    AgentPrediction,
    AgentProgress,
    Arrival,
    FinishedAgent,
    FinishedTask,
    Predictor,
    Sketch,
    TaskContent,
    TaskPrediction,
)

LEARNED = ("xgboost", "mlp", "ladder")
ABLATIONS = ("text", "class", "growth")
# Agents after which a model is trained anew, at most, and on how many of the newest.
TRAIN_EVERY, TRAIN_ON = 200, 10_000

Cost = Callable[[float, float, float], float]  # of prompt, decode and cached tokens


class UnknownPredictor(ValueError):
    """A predictor that cannot be had, in words."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an agent has come. arrived, ended: tasks; cost: of those that have arrived, true where it is known; cost_ended:
    of those that have ended; returns: how often it came back after it had nothing left to do."""

    arrived: int
    ended: int
    cost: float
    cost_ended: float = 0.0
    returns: int = 0


class Arrived(NamedTuple):
    """What is believed when a task arrives: of the task, and of its agent Ĉ and the ninth decile."""

    task: TaskPrediction
    agent_cost: float
    agent_p90: float


class Beliefs(Protocol):
    """Lengths in tokens, costs in KV token·iterations."""

    def arrive(self, agent: AgentTrace, task: TaskTrace, progress: Progress) -> Arrived:
        """progress: before this task."""
        ...

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        """Ĉ, when no new task has arrived, but more is known."""
        ...

    def learn(self, agent: AgentTrace, finished: Mapping[str, FinishedTask]) -> None:
        """finished: by task."""
        ...

    def forget(self, agent: AgentTrace) -> None:
        """It was only asked about."""
        ...


class Exact:
    """All lengths and costs are known."""

    def __init__(self, cost: Cost = task_cost) -> None:
        self._cost = cost

    def arrive(self, agent: AgentTrace, task: TaskTrace, progress: Progress) -> Arrived:
        cost = self.agent(agent, progress)
        return Arrived(TaskPrediction(task.prompt_tokens, task.output_tokens), cost, cost)

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return sum(self._cost(task.prompt_tokens, task.output_tokens, 0.0) for task in agent.tasks)

    def learn(self, agent: AgentTrace, finished: Mapping[str, FinishedTask]) -> None:
        pass

    def forget(self, agent: AgentTrace) -> None:
        pass


class Noise(Exact):
    """The truth times log-normal noise of median 1: one factor for an agent's total, one for each output length."""

    def __init__(self, sigma: float, seed: int, cost: Cost = task_cost) -> None:
        super().__init__(cost)
        self._sigma, self._seed = sigma, seed

    def arrive(self, agent: AgentTrace, task: TaskTrace, progress: Progress) -> Arrived:
        output = max(1.0, task.output_tokens * self._factor(f"{agent.agent_id}/{task.id}"))
        cost = self.agent(agent, progress)
        return Arrived(TaskPrediction(task.prompt_tokens, output), cost, cost)

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return super().agent(agent, progress) * self._factor(agent.agent_id)

    def _factor(self, name: str) -> float:
        return math.exp(Random(f"{self._seed}/{name}").gauss(0, self._sigma))  # noqa: S311 (noise, not a secret)


@dataclass(slots=True)
class _Alive:
    """An agent that has not finished."""

    opening: Sketch | None = None
    latest: Sketch | None = None
    rows: dict[str, bytes] = field(default_factory=dict)  # by task, in the order of their arrival


class Serving:
    """A predictor as it serves: told what a gateway sees, and learning from each agent that finishes. finished: those, in
    order. learned: called after each of them, if it is set."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.finished: list[FinishedAgent] = []
        self.learned: Callable[[Serving], None] | None = None
        self._alive: dict[str, _Alive] = {}

    def arrive(self, agent: AgentTrace, task: TaskTrace, progress: Progress) -> Arrived:
        alive = self._alive.setdefault(agent.agent_id, _Alive())
        arrival = self.predictor.arrive(content_of(task), _progress(agent, progress, alive))
        alive.latest = arrival.sketch
        alive.opening = arrival.sketch if alive.opening is None else alive.opening
        alive.rows[task.id] = arrival.row if is_kept(len(alive.rows) + 1) else b""
        return Arrived(arrival.task, arrival.agent.cost, arrival.agent.p90)

    def agent(self, agent: AgentTrace, progress: Progress) -> float:
        return self.predictor.predict_agent(_progress(agent, progress, self._alive[agent.agent_id])).cost

    def learn(self, agent: AgentTrace, finished: Mapping[str, FinishedTask]) -> None:
        rows = self._alive.pop(agent.agent_id).rows
        tasks = [msgspec.structs.replace(finished[task_id], row=row) for task_id, row in rows.items()]
        done = FinishedAgent(agent.agent_class or None, agent.tenant, tasks, SCHEMA)
        self.predictor.learn(done)
        self.finished.append(done)
        if self.learned is not None:
            self.learned(self)

    def forget(self, agent: AgentTrace) -> None:
        del self._alive[agent.agent_id]


def finished_task(task: TaskTrace, cached_tokens: int, held: float | None = None) -> FinishedTask:
    return FinishedTask(_prompt_bytes(task), task.prompt_tokens, cached_tokens, task.output_tokens, held=held)


def content_of(task: TaskTrace) -> TaskContent:
    """What a gateway would read of the request."""
    return TaskContent(
        prompt_bytes=_prompt_bytes(task),
        system=b"" if task.system is None else task.system.encode(),
        text=b"" if task.prompt is None else task.prompt.encode(),
        messages=1 + (task.system is not None),
        tools=len(task.tools),
        tool_bytes=sum(len(tool.encode()) for tool in task.tools),
        max_tokens=task.max_tokens,
    )


def taught(agents: Sequence[AgentTrace], serving: Serving) -> None:
    """Teaches a predictor agents of the past, one after the other."""
    for agent in agents:
        for _ in arrivals(agent, serving):
            pass
        serving.learn(agent, {task.id: finished_task(task, task.cached_tokens) for task in agent.tasks})


def arrivals(agent: AgentTrace, serving: Beliefs) -> Iterator[Arrived]:
    """What is believed at each task's arrival, in order, if the agent is served alone: those that wait for others arrive when
    these have ended."""
    cost = cost_ended = 0.0
    arrived = ended = returns = 0
    for wave in waves(agent):
        for task in wave:
            believed = serving.arrive(agent, task, Progress(arrived, ended, cost, cost_ended, returns))
            yield believed
            cost += believed.task.cost
            arrived += 1
        cost_ended += sum(finished_task(task, task.cached_tokens).cost for task in wave)
        cost, ended, returns = cost_ended, arrived, returns + 1


def waves(agent: AgentTrace) -> list[list[TaskTrace]]:
    """The tasks by how many have to end, one after the other, before them."""
    sorter = TopologicalSorter({task.id: task.after for task in agent.tasks})
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = set(sorter.get_ready())
        found.append([task for task in agent.tasks if task.id in ready])
        sorter.done(*ready)
    return found


def compute_cost(prompt_tokens: float, decode_tokens: float, cached_tokens: float = 0.0) -> float:
    """The cost that the paper argues against: tokens computed, each as dear as the other, however long they are held."""
    return prompt_tokens - cached_tokens + decode_tokens


COSTS: dict[str, Cost] = {"memory": task_cost, "compute": compute_cost}


def beliefs(name: str, *, seed: int = 0, past: Sequence[AgentTrace] = (), cost: Cost = task_cost) -> Beliefs:
    """`exact`, `noise:SIGMA`, or one of `LEARNED`. Raises `UnknownPredictor`."""
    if name == "exact":
        return Exact(cost)
    if name in LEARNED:
        if cost is not task_cost:
            raise UnknownPredictor(f"{name} learns memory-centric costs only: take exact or noise:SIGMA")
        return serving(name, past, seed=seed)
    kind, _, sigma = name.partition(":")
    try:
        if kind == "noise" and 0 <= float(sigma) < math.inf:
            return Noise(float(sigma), seed, cost)
    except ValueError:
        pass
    raise UnknownPredictor(
        f"no predictor {name!r}: exact, {', '.join(LEARNED)}, or noise:SIGMA with a number of at least 0"
    )


def serving(name: str, past: Sequence[AgentTrace], *, seed: int = 0, without: str = "") -> Serving:
    """One of `LEARNED`, which has learned from the past. without: one of `ABLATIONS`. Raises `UnknownPredictor`."""
    if name == "ladder":
        found = Serving(Learned())
        taught(past, found)
    elif name == "xgboost":
        found = Serving(Blind(without) if without else Learned())
        taught(past, found)
        training = Training(seed)
        training.train(found)
        found.learned = training.after
    elif name == "mlp":
        mlp = PaperMlp(seed)
        found = Serving(mlp)
        taught(past, found)
        try:
            mlp.fit([_sample(agent) for agent in past])
        except MlpUnavailable as error:
            raise UnknownPredictor(str(error)) from error
    else:
        raise UnknownPredictor(f"no predictor {name!r} that learns: {', '.join(LEARNED)}")
    return found


def _sample(agent: AgentTrace) -> Sample:
    first = agent.tasks[0]
    text = "\n".join(filter(None, (first.system, first.prompt)))
    return Sample(agent.agent_class or None, text, agent.cost, fmean(task.output_tokens for task in agent.tasks))


class Blind(Learned):
    """It does not see the text, or of which class an agent is, or how it grows."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self._to = to

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        if self._to == "text":
            content = msgspec.structs.replace(content, system=b"", text=b"")
        return super().arrive(content, self._hidden(progress))

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        return super().predict_agent(self._hidden(progress))

    def _hidden(self, progress: AgentProgress) -> AgentProgress:
        if self._to == "class":
            return msgspec.structs.replace(progress, agent_class=None)
        if self._to == "growth":  # as if each task were the first
            return msgspec.structs.replace(
                progress, tasks_arrived=0, tasks_ended=0, cost_arrived=0.0, cost_ended=0.0, returns=0, opening=None
            )
        return progress


class Training:
    """As the gateway trains, but between two iterations: when there are enough agents for the first time, and then when there
    are half as many again, or so many more."""

    def __init__(self, seed: int) -> None:
        self._seed, self._trained_on = seed, 0

    def after(self, one: Serving) -> None:
        new = len(one.finished) - self._trained_on
        if new >= min(TRAIN_EVERY, max(FEWEST_AGENTS, self._trained_on // 2)):
            self.train(one)

    def train(self, one: Serving) -> None:
        """If there are agents enough, and if the new model is better."""
        learned = one.predictor
        assert isinstance(learned, Learned)
        champion = learned.model
        assert champion is None or isinstance(champion, Boosted)
        unseen = len(one.finished) - self._trained_on
        try:
            trained = train(one.finished[-TRAIN_ON:], champion, unseen=unseen, seed=self._seed)
        except TooFewAgents:
            return
        self._trained_on = len(one.finished)
        if trained.report.promote:
            learned.model = trained.model


def _progress(agent: AgentTrace, progress: Progress, alive: _Alive) -> AgentProgress:
    return AgentProgress(
        agent.agent_class or None,
        agent.tenant,
        progress.arrived,
        progress.ended,
        progress.cost,
        progress.cost_ended,
        progress.returns,
        agent.expected_tasks,
        alive.opening,
        alive.latest,
    )


def _prompt_bytes(task: TaskTrace) -> int:
    """Of all text; without one, as many as English of that many tokens has."""
    if task.prompt is None:
        return round(task.prompt_tokens * PRIOR_BYTES_PER_TOKEN)
    return sum(len(text.encode()) for text in (task.system or "", *task.tools, task.prompt))
