"""What the engine says a task used, and what that costs."""

from __future__ import annotations

import re

import msgspec

from gateway.protocol.body import Body
from predictor.types import FinishedTask


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """As OpenAI's completions tell it, its responses, and Anthropic's messages, which count what was cached apart."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Billed(msgspec.Struct):
    input_tokens: int | None = None
    image_tokens: int | None = None


class _Meta(msgspec.Struct):
    """Where Cohere's embeddings have it."""

    billed_units: _Billed | None = None


class _Inner(msgspec.Struct):
    usage: _Usage | None = None


class _Answer(msgspec.Struct):
    """An answer, or an event that holds one."""

    usage: _Usage | None = None
    response: _Inner | None = None
    message: _Inner | None = None
    meta: _Meta | None = None


_decode = msgspec.json.Decoder(_Answer).decode
# With objects in it, such as the details. Inside a text its quotes would have backslashes before them.
MOST_TOLD_BYTES = 4096
_FLAT = rb"\{[^{}]{0,999}\}"
_DETAILS = rb"\{[^{}]{0,999}(?:" + _FLAT + rb"[^{}]{0,999}){0,4}\}"
_TOLD = re.compile(rb'"(usage|meta)"\s*:\s*(\{[^{}]{0,999}(?:' + _DETAILS + rb"[^{}]{0,999}){0,4}\})")
# More are no tokens of any engine.
_MOST = 2**32


class Usage(msgspec.Struct, frozen=True):
    """Tokens, summed over all sequences of the request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def parse_usage(answer: bytes) -> Usage | None:
    """The usage in an answer's body, or in the data of one of its events; None if there is none to be read."""
    try:
        told = _decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    inner = told.response or told.message
    usage = told.usage or (None if inner is None else inner.usage)
    if usage is None and told.meta is not None and (billed := told.meta.billed_units) is not None:
        usage = _Usage(prompt_tokens=(billed.input_tokens or 0) + (billed.image_tokens or 0))
    if usage is None:
        return None
    prompt, completion, cached = _of_openai(usage) if usage.input_tokens is None else _of_input(usage)
    if not (0 <= prompt <= _MOST and 0 <= completion <= _MOST):
        return None
    return Usage(prompt, completion, max(0, min(cached, prompt)))


class UsageSearch:
    """The same, for an answer that goes by in parts. Of several the largest: a client may have put one into its answer."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._rest = b""

    def feed(self, part: bytes) -> None:
        data = self._rest + part
        for name, told in _TOLD.findall(data):
            found = parse_usage(b'{"%b":%b}' % (name, told))
            if found is not None and (self.usage is None or _tokens(found) > _tokens(self.usage)):
                self.usage = found
        self._rest = data[-MOST_TOLD_BYTES:]


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def _of_openai(usage: _Usage) -> tuple[int, int, int]:
    details = usage.prompt_tokens_details
    return usage.prompt_tokens or 0, usage.completion_tokens or 0, (details and details.cached_tokens) or 0


def _of_input(usage: _Usage) -> tuple[int, int, int]:
    prompt, details = usage.input_tokens or 0, usage.input_tokens_details
    if details is not None:
        return prompt, usage.output_tokens or 0, details.cached_tokens or 0
    cached = usage.cache_read_input_tokens or 0
    return prompt + cached + (usage.cache_creation_input_tokens or 0), usage.output_tokens or 0, cached


def finished_task(usage: Usage, body: Body, held: float | None = None) -> FinishedTask:
    """A row for the predictor; its `.cost` is the true cost of the task. held: KV token·iterations, by the engine's word."""
    return FinishedTask(
        prompt_bytes=body.prompt_bytes,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        # A prompt that is only read is held for the iteration in which it is: as if one token were decoded.
        decode_tokens=usage.completion_tokens if body.endpoint.decodes else body.sequences,
        prompts=body.prompts,
        sequences=body.sequences,
        held=held,
        max_tokens=body.max_tokens,
    )
