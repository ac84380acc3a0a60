"""Agents whose prompts say what they will cost, served one after the other: what a gateway would keep of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from predictor.features import SCHEMA, row
from predictor.learned import Learned
from predictor.types import AgentProgress, Arrival, FinishedAgent, FinishedTask, TaskContent

WORDS = ("Answer briefly.", "Answer.", "Explain every step in detail.")
DECODES = (20, 60, 180)


@dataclass
class Gateway:
    """scale: factor on the decode lengths of a class."""

    predictor: Learned = field(default_factory=Learned)
    scale: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def serve(self, agents: int, classes: str = "abc") -> list[FinishedAgent]:
        return [self.finish(*drawn) for drawn in self.draw(agents, classes)]

    def draw(self, agents: int, classes: str = "abc") -> Iterator[tuple[str, int, int]]:
        """Class, number of tasks, place in `WORDS`."""
        for number in range(agents):
            yield classes[number % len(classes)], self._rng.randint(1, 6), self._rng.randrange(len(WORDS))

    def finish(self, agent_class: str, tasks: int, depth: int) -> FinishedAgent:
        progress = AgentProgress(agent_class, "t")
        done = []
        for content, decode in self._tasks(agent_class, tasks, depth):
            arrival = self.predictor.arrive(content, progress)
            opening = progress.opening or arrival.sketch
            assert arrival.sketch is not None and opening is not None
            made = row(arrival.sketch, opening, arrival.numbers).tobytes()
            done.append(FinishedTask(content.prompt_bytes, content.prompt_bytes // 4, 0, decode, row=made))
            cost = sum(task.cost for task in done)
            progress = AgentProgress(
                agent_class, "t", len(done), len(done), cost, cost, len(done), None,
                opening, arrival.sketch,
            )  # fmt: skip
        agent = FinishedAgent(agent_class, "t", done, SCHEMA)
        self.predictor.learn(agent)
        return agent

    def first(self, agent_class: str, tasks: int, depth: int) -> tuple[Arrival, float]:
        """What is said of an agent when it comes, and what it will cost."""
        whole = list(self._tasks(agent_class, tasks, depth))
        arrival = self.predictor.arrive(whole[0][0], AgentProgress(agent_class, "t"))
        return arrival, sum(
            FinishedTask(content.prompt_bytes, content.prompt_bytes // 4, 0, decode).cost for content, decode in whole
        )

    def _tasks(self, agent_class: str, tasks: int, depth: int) -> Iterator[tuple[TaskContent, int]]:
        text = f"There are {tasks} files. {WORDS[depth]}".encode()
        for _ in range(tasks):
            noisy = DECODES[depth] * self.scale.get(agent_class, 1.0) * self._rng.lognormvariate(0.0, 0.2)
            yield TaskContent(400, text=text), max(1, round(noisy))


def replaced_rows(agents: list[FinishedAgent], change: Callable[[bytes], bytes]) -> list[FinishedAgent]:
    return [
        FinishedAgent(
            agent.agent_class,
            agent.tenant,
            [
                FinishedTask(task.prompt_bytes, task.prompt_tokens, 0, task.decode_tokens, row=change(task.row))
                for task in agent.tasks
            ],
            agent.schema,
        )
        for agent in agents
    ]
