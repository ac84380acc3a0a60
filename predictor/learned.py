"""The predictor that serves: the ladder, and a trained model above it when there is one.

The ladder answers at once and learns from each agent that ends; what it says is also what a model corrects. A model that
fails, or answers what cannot be, is passed over and counted: then the ladder's word stands.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple, Protocol

from predictor.features import Row, is_kept, numbers, row, sketch
from predictor.ladder import Ladder
from predictor.types import (
    AgentPrediction,
    AgentProgress,
    Arrival,
    FinishedAgent,
    Predictor,
    Sketch,
    TaskContent,
    TaskPrediction,
)

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Of a model. cost: of the agent, median and ninth decile, in token·iterations; decode: of a sequence, in tokens."""

    cost: float
    cost_p90: float
    decode_tokens: float


class Model(Protocol):
    name: str

    def predict(self, row: Row) -> Answer:
        """Of one arrival."""
        ...


class Learned(Predictor):
    def __init__(self, model: Model | None = None) -> None:
        self.ladder = Ladder()
        self.model = model
        self.failures = 0  # of the model
        self._told: Model | None = None  # the one whose failure was logged last

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival:
        is_asked_for = self.model is not None or is_kept(progress.tasks_arrived + 1)
        made = sketch(content) if is_asked_for else None
        task = self.ladder.predict_task(progress.agent_class, progress.tenant, content.prompt_bytes, content.max_tokens)
        progress = progress.with_task(content.sequences * task.cost, made)
        agent = self.ladder.predict_agent(progress)
        if made is None:
            return Arrival(task, agent, None)
        known = self._numbers(progress, agent, task)
        answer = self._ask(made, progress, known)
        if answer is not None:
            decode_tokens = answer.decode_tokens
            if content.max_tokens is not None:
                decode_tokens = min(decode_tokens, content.max_tokens)
            task = TaskPrediction(task.prompt_tokens, max(1.0, decode_tokens))
            agent = self._agent(answer, progress)
        return Arrival(task, agent, made, known if is_kept(progress.tasks_arrived) else b"")

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction:
        agent = self.ladder.predict_agent(progress)
        if self.model is None or progress.latest is None:
            return agent
        task = self.ladder.predict_task(progress.agent_class, progress.tenant, 0)
        answer = self._ask(progress.latest, progress, self._numbers(progress, agent, task))
        return agent if answer is None else self._agent(answer, progress)

    def learn(self, agent: FinishedAgent) -> None:
        self.ladder.learn(agent)

    def _numbers(self, progress: AgentProgress, agent: AgentPrediction, task: TaskPrediction) -> bytes:
        return numbers(progress, self.ladder.history(progress.agent_class, progress.tenant), agent.cost, task)

    def _ask(self, made: Sketch, progress: AgentProgress, known: bytes) -> Answer | None:
        if self.model is None or progress.opening is None:
            return None
        try:
            answer = self.model.predict(row(made, progress.opening, known))
        except Exception:
            if self._told is not self.model:  # it may fail at every request
                logger.exception("the model %s failed", self.model.name)
            self._told = self.model
        else:
            if all(0 <= value < math.inf for value in answer):
                return answer
        self.failures += 1
        return None

    def _agent(self, answer: Answer, progress: AgentProgress) -> AgentPrediction:
        assert self.model is not None
        cost = max(answer.cost, progress.cost_arrived)
        return AgentPrediction(cost, max(answer.cost_p90, cost), self.model.name)
