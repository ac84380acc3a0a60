"""What the replayed gateway believes: exactly what is true, that with noise, or what a predictor has learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from graphlib import TopologicalSorter
from random import Random
from statistics import fmean
from typing import Protocol

import msgspec

from gateway.agent_trace import AgentTrace, TaskTrace
from gateway.flowcontrol.estimate import Asked, Cost
from predictor.cost import task_cost
from predictor.features import SCHEMA, row
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


class UnknownPredictor(ValueError):
    """A predictor that there is not, in words."""


class TracedTask(TaskContent, frozen=True, kw_only=True):
    """What a gateway reads of the request, and the task and agent that it is: those that know the truth read it there."""

    agent: AgentTrace
    task: TaskTrace


class Believed(Asked, Protocol):
    """What the replayed gateway asks, and tells of each agent that has ended."""

    def learn(self, agent: FinishedAgent) -> None: ...


class Exact:
    """All lengths and costs are known."""

    def __init__(self, cost: Cost = task_cost) -> None:
        self._cost = cost

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        assert isinstance(content, TracedTask)
        total = self.total(content.agent)
        return Arrival(self.lengths(content), AgentPrediction(total, total, "exact"), None)

    def predict_agent(self, progress: AgentProgress) -> None:
        """No more is known than at its arrivals."""

    def learn(self, agent: FinishedAgent) -> None:
        pass

    def total(self, agent: AgentTrace) -> float:
        """Cost of an agent, in the unit of the cost's formula."""
        return sum(self._cost(task.prompt_tokens, task.output_tokens, 0.0) for task in agent.tasks)

    def lengths(self, content: TracedTask) -> TaskPrediction:
        return TaskPrediction(content.task.prompt_tokens, content.task.output_tokens)


class Noise(Exact):
    """The truth times log-normal noise of median 1: one factor for an agent's total, one for each output length."""

    def __init__(self, sigma: float, seed: int, cost: Cost = task_cost) -> None:
        super().__init__(cost)
        self._sigma, self._seed = sigma, seed

    def total(self, agent: AgentTrace) -> float:
        return super().total(agent) * self._factor(agent.agent_id)

    def lengths(self, content: TracedTask) -> TaskPrediction:
        factor = self._factor(f"{content.agent.agent_id}/{content.task.id}")
        return TaskPrediction(content.task.prompt_tokens, max(1.0, content.task.output_tokens * factor))

    def _factor(self, name: str) -> float:
        return math.exp(Random(f"{self._seed}/{name}").gauss(0, self._sigma))


class Serving:
    """A predictor as it serves, learning from each agent that ends."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.finished: list[FinishedAgent] = []  # in order
        self.learned: Callable[[Serving], None] | None = None  # called after each of them

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        return self.predictor.arrive(content, progress)

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        return self.predictor.predict_agent(progress)

    def learn(self, agent: FinishedAgent) -> None:
        self.predictor.learn(agent)
        self.finished.append(agent)
        if self.learned is not None:
            self.learned(self)


def finished_task(task: TaskTrace, row: bytes = b"") -> FinishedTask:
    """A task of the past, as a gateway would have seen it end."""
    return FinishedTask(_prompt_bytes(task), task.prompt_tokens, task.cached_tokens, task.output_tokens, row=row)


def content_of(agent: AgentTrace, task: TaskTrace) -> TracedTask:
    """What a gateway would read of the request."""
    return TracedTask(
        prompt_bytes=_prompt_bytes(task),
        system=b"" if task.system is None else task.system.encode(),
        text=b"" if task.prompt is None else task.prompt.encode(),
        messages=1 + (task.system is not None),
        tools=len(task.tools),
        tool_bytes=sum(len(tool.encode()) for tool in task.tools),
        max_tokens=task.max_tokens,
        agent=agent,
        task=task,
    )


def taught(agents: Sequence[AgentTrace], serving: Serving) -> None:
    """Teaches a predictor agents of the past, one after the other."""
    for agent in agents:
        asked = list(arrivals(agent, serving))
        opening = asked[0].sketch
        rows = [
            row(one.sketch, opening, one.numbers).tobytes() if one.numbers and one.sketch and opening else b""
            for one in asked
        ]
        in_order = [task for wave in waves(agent) for task in wave]
        tasks = [finished_task(task, row) for task, row in zip(in_order, rows, strict=True)]
        serving.learn(FinishedAgent(agent.agent_class or None, agent.tenant, tasks, SCHEMA))


def arrivals(agent: AgentTrace, asked: Asked) -> Iterator[Arrival]:
    """What is predicted at each task's arrival, in order, if the agent is served alone: those that wait for others arrive when
    these have ended."""
    cost = cost_ended = 0.0
    arrived = ended = returns = 0
    opening: Sketch | None = None
    latest: Sketch | None = None
    for wave in waves(agent):
        for task in wave:
            progress = AgentProgress(
                agent.agent_class or None,
                agent.tenant,
                arrived,
                ended,
                cost,
                cost_ended,
                returns,
                agent.expected_tasks,
                opening,
                latest,
            )
            arrival = asked.arrive(content_of(agent, task), progress)
            assert arrival is not None
            yield arrival
            cost += arrival.task.cost
            arrived += 1
            latest = arrival.sketch or latest
            opening = opening or latest
        cost_ended += sum(finished_task(task).cost for task in wave)
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


def beliefs(name: str, *, seed: int = 0, past: Sequence[AgentTrace] = (), cost: Cost = task_cost) -> Believed:
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


def _prompt_bytes(task: TaskTrace) -> int:
    """Of all text; without one, as many as English of that many tokens has."""
    if task.prompt is None:
        return round(task.prompt_tokens * PRIOR_BYTES_PER_TOKEN)
    return sum(len(text.encode()) for text in (task.system or "", *task.tools, task.prompt))
