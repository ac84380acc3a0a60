"""What a predictor is asked, what it answers, and what it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from predictor.cost import task_cost


@dataclass(frozen=True, slots=True)
class TaskFeatures:
    """What is known of a task at its arrival. Never what only the future knows."""

    agent_class: str | None
    tenant: str
    prompt_bytes: int
    max_tokens: int | None = None  # the client's limit: a feature, not a fact


@dataclass(frozen=True, slots=True)
class TaskPrediction:
    """Expected prompt and decode length, in tokens."""

    prompt_tokens: float
    decode_tokens: float

    @property
    def cost(self) -> float:
        """ĉ in token·iterations."""
        return task_cost(self.prompt_tokens, self.decode_tokens)

    @property
    def memory_tokens(self) -> float:
        """p + d̂: the KV held at the task's end."""
        return self.prompt_tokens + self.decode_tokens


@dataclass(frozen=True, slots=True)
class AgentProgress:
    """How far an agent has come: its tasks that have arrived, and their cost in token·iterations (true where known)."""

    agent_class: str | None
    tenant: str
    tasks_arrived: int
    cost_arrived: float


class FinishedTask(msgspec.Struct, frozen=True, array_like=True):
    """A task as the engine's usage told it: tokens summed over its sequences (prompts × n). held: what its scheduler counted,
    in KV token·iterations, if it said so."""

    prompt_bytes: int
    prompt_tokens: int
    cached_tokens: int
    decode_tokens: int
    prompts: int = 1
    sequences: int = 1
    held: float | None = None

    @property
    def cost(self) -> float:
        """In token·iterations: what was held, where it is known."""
        return self.net_cost if self.held is None else self.held

    @property
    def net_cost(self) -> float:
        """By the formula, without what was cached, as if its sequences were equally long."""
        prompt_tokens, cached_tokens = self.prompt_tokens / self.prompts, self.cached_tokens / self.prompts
        return self.sequences * task_cost(prompt_tokens, self.decode_tokens / self.sequences, cached_tokens)


class FinishedAgent(msgspec.Struct, frozen=True):
    """What a finished agent turned out to be: the rows that predictors learn from, and that the state store keeps."""

    agent_class: str | None
    tenant: str
    tasks: list[FinishedTask]

    @property
    def cost(self) -> float:
        return sum(task.cost for task in self.tasks)


class Predictor(Protocol):
    """Every method returns at once, and never a NaN or an infinity."""

    def predict_task(self, task: TaskFeatures) -> TaskPrediction: ...

    def predict_agent(self, progress: AgentProgress) -> float:
        """Ĉ, the agent's total cost in token·iterations: at least what has arrived."""
        ...

    def learn(self, agent: FinishedAgent) -> None: ...
