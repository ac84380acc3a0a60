"""What will it cost? What a request says is put to the predictor; an answer that cannot be is replaced."""

from __future__ import annotations

import logging
import math

import msgspec

from gateway.accuracy import NOBODY
from gateway.body import Body
from gateway.content import content_of
from predictor.features import is_kept
from predictor.ladder import PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS
from predictor.types import AgentPrediction, AgentProgress, Arrival, Predictor, Sketch, TaskPrediction

logger = logging.getLogger(__name__)


class Estimate(msgspec.Struct, frozen=True):
    """Of one task: ĉ in token·iterations, p + d̂ in tokens, and the prompt's tokens. agent: Ĉ of its agent. sketch, row: for
    what comes after, see `predictor.types.Arrival`; no row, if it is not kept."""

    cost: float
    memory_tokens: float
    prompt_tokens: float
    agent: AgentPrediction
    sketch: Sketch | None
    row: bytes


def estimate_arrival(predictor: Predictor, body: Body, progress: AgentProgress, max_model_len: int | None) -> Estimate:
    """progress: of the agent, before this task. max_model_len: tokens of the engine's longest sequence, if it is known: none
    will hold more."""
    arrival = _ask(predictor, body, progress)
    if arrival is None:
        prediction = TaskPrediction(body.prompt_bytes / body.prompts / PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS)
    else:
        prediction = arrival.task
    if max_model_len is not None:
        prompt_tokens = min(prediction.prompt_tokens, max_model_len)
        prediction = TaskPrediction(prompt_tokens, min(prediction.decode_tokens, max_model_len - prompt_tokens))
    cost = body.sequences * prediction.cost
    arrived = progress.cost_arrived + cost
    return Estimate(
        cost=cost,
        memory_tokens=body.sequences * prediction.memory_tokens,
        prompt_tokens=body.sequences * prediction.prompt_tokens,
        agent=_at_least(arrived, None if arrival is None else arrival.agent),
        sketch=None if arrival is None else arrival.sketch,
        row=arrival.row if arrival is not None and is_kept(progress.tasks_arrived + 1) else b"",
    )


def estimate_agent(predictor: Predictor, progress: AgentProgress) -> float:
    """Ĉ in token·iterations, of an agent of which more is known now; at least what has arrived."""
    try:
        return _at_least(progress.cost_arrived, predictor.predict_agent(progress)).cost
    except Exception:
        logger.exception("the predictor failed on an agent")
        return progress.cost_arrived


def _ask(predictor: Predictor, body: Body, progress: AgentProgress) -> Arrival | None:
    try:
        arrival = predictor.arrive(content_of(body), progress)
        if math.isfinite(arrival.task.cost) and math.isfinite(arrival.task.memory_tokens):
            return arrival
    except Exception:
        logger.exception("the predictor failed on a task")
    return None


def _at_least(cost_arrived: float, agent: AgentPrediction | None) -> AgentPrediction:
    if agent is None or not (math.isfinite(agent.cost) and math.isfinite(agent.p90)):
        return AgentPrediction(cost_arrived, cost_arrived, NOBODY)
    if agent.cost >= cost_arrived:
        return agent
    return AgentPrediction(cost_arrived, max(agent.p90, cost_arrived), agent.source)
