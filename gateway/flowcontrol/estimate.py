"""What a task will cost: the predictor is asked, and an answer that cannot be true is replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import msgspec

from predictor.cost import task_cost
from predictor.features import is_kept
from predictor.ladder import PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS
from predictor.types import NO_SOURCE, AgentPrediction, AgentProgress, Arrival, Sketch, TaskContent, TaskPrediction

Cost = Callable[[float, float, float], float]  # of prompt, decode and cached tokens, in KV token·iterations


class Asked(Protocol):
    """A predictor as flow control asks it. None where it has failed."""

    def arrive(self, content: TaskContent, progress: AgentProgress) -> Arrival | None: ...

    def predict_agent(self, progress: AgentProgress) -> AgentPrediction | None: ...


class Estimate(msgspec.Struct, frozen=True):
    """What is predicted of one task at its arrival, over all of its sequences."""

    cost: float  # ĉ, in KV token·iterations
    memory_tokens: float  # p + d̂
    prompt_tokens: float
    agent: AgentPrediction  # of its agent, with this task
    sketch: Sketch | None  # see `predictor.types.Arrival`
    row: bytes  # the same; empty, if it is not kept


def estimate_arrival(
    predictor: Asked,
    content: TaskContent,
    progress: AgentProgress,
    max_model_len: int | None,
    cost: Cost = task_cost,
) -> Estimate:
    """progress: of the agent, before this task. max_model_len: tokens of the engine's longest sequence, if it is known: no
    prediction is longer."""
    arrival = predictor.arrive(content, progress)
    if arrival is None or not _are_tokens(arrival.task.prompt_tokens, arrival.task.decode_tokens):
        arrival = None
        prediction = TaskPrediction(content.prompt_bytes / PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS)
    else:
        prediction = arrival.task
    if max_model_len is not None:
        prompt_tokens = min(prediction.prompt_tokens, max_model_len)
        prediction = TaskPrediction(prompt_tokens, min(prediction.decode_tokens, max_model_len - prompt_tokens))
    predicted = content.sequences * cost(prediction.prompt_tokens, prediction.decode_tokens, 0.0)
    return Estimate(
        cost=predicted,
        memory_tokens=content.sequences * prediction.memory_tokens,
        prompt_tokens=content.sequences * prediction.prompt_tokens,
        agent=_at_least(progress.cost_arrived + predicted, None if arrival is None else arrival.agent),
        sketch=None if arrival is None else arrival.sketch,
        row=arrival.row if arrival is not None and is_kept(progress.tasks_arrived + 1) else b"",
    )


def estimate_agent(predictor: Asked, progress: AgentProgress) -> float:
    """Ĉ in KV token·iterations, of an agent of which more is known now; at least what has arrived."""
    return _at_least(progress.cost_arrived, predictor.predict_agent(progress)).cost


def _are_tokens(*numbers: float) -> bool:
    return all(0 <= number < math.inf for number in numbers)


def _at_least(cost_arrived: float, agent: AgentPrediction | None) -> AgentPrediction:
    if agent is None or not (math.isfinite(agent.cost) and math.isfinite(agent.p90)):
        return AgentPrediction(cost_arrived, cost_arrived, NO_SOURCE)
    if agent.cost >= cost_arrived:
        return agent
    return AgentPrediction(cost_arrived, max(agent.p90, cost_arrived), agent.source)
