"""What will it cost? Features of what has arrived, put to the predictor; a prediction that fails is replaced."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from gateway.body import Body
from gateway.identify import Identity
from predictor.ladder import PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS
from predictor.types import AgentProgress, Predictor, TaskFeatures, TaskPrediction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one task: ĉ in token·iterations, p + d̂ in tokens, and the prompt's tokens."""

    cost: float
    memory_tokens: float
    prompt_tokens: float


def estimate_task(predictor: Predictor, identity: Identity, body: Body, max_model_len: int | None) -> Estimate:
    """max_model_len: tokens of the engine's longest sequence, if it is known: none will hold more."""
    features = TaskFeatures(identity.agent_class, identity.tenant, body.prompt_bytes // body.prompts, body.max_tokens)
    try:
        prediction = predictor.predict_task(features)
        sound = math.isfinite(prediction.cost) and math.isfinite(prediction.memory_tokens)
    except Exception:
        logger.exception("the predictor failed on a task")
        sound = False
    if not sound:
        prediction = TaskPrediction(features.prompt_bytes / PRIOR_BYTES_PER_TOKEN, PRIOR_DECODE_TOKENS)
    if max_model_len is not None:
        prompt_tokens = min(prediction.prompt_tokens, max_model_len)
        prediction = TaskPrediction(prompt_tokens, min(prediction.decode_tokens, max_model_len - prompt_tokens))
    return Estimate(
        cost=body.sequences * prediction.cost,
        memory_tokens=body.sequences * prediction.memory_tokens,
        prompt_tokens=body.sequences * prediction.prompt_tokens,
    )


def estimate_agent(predictor: Predictor, progress: AgentProgress) -> float:
    """Ĉ in token·iterations; at least what has arrived."""
    try:
        total = predictor.predict_agent(progress)
    except Exception:
        logger.exception("the predictor failed on an agent")
        return progress.cost_arrived
    return max(total, progress.cost_arrived) if math.isfinite(total) else progress.cost_arrived
