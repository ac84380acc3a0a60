"""What the engine says a task used, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gateway.body import Body
from predictor.types import FinishedTask


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, summed over all sequences of the request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def parse_usage(answer: bytes) -> Usage | None:
    """The usage in an answer's body, or in the data of one of its events; None if there is none to be read."""
    try:
        usage = _decode(answer).usage
    except msgspec.DecodeError:
        return None
    if usage is None:
        return None
    if usage.prompt_tokens < 0 or (usage.completion_tokens or 0) < 0:
        return None
    cached = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
    return Usage(usage.prompt_tokens, usage.completion_tokens or 0, max(0, min(cached, usage.prompt_tokens)))


def finished_task(usage: Usage, body: Body, held: float | None = None) -> FinishedTask:
    """A row for the predictor; its `.cost` is the true cost of the task. held: KV token·iterations, by the engine's word."""
    return FinishedTask(
        prompt_bytes=body.prompt_bytes,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        decode_tokens=usage.completion_tokens,
        prompts=body.prompts,
        sequences=body.sequences,
        held=held,
        max_tokens=body.max_tokens,
    )
