"""The usage that the engine reports of a task, and what that costs."""

from __future__ import annotations

import re

import msgspec


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    """The fields of OpenAI's completions, of its responses, and of Anthropic's messages, which count cached tokens apart."""

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
    """Where Cohere's embeddings report it."""

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
# A usage may hold objects, such as the details. Inside a text its quotes would have backslashes before them.
MOST_USAGE_BYTES = 4096
_FLAT = rb"\{[^{}]{0,999}\}"
_DETAILS = rb"\{[^{}]{0,999}(?:" + _FLAT + rb"[^{}]{0,999}){0,4}\}"
_REPORTED = re.compile(rb'"(usage|meta)"\s*:\s*(\{[^{}]{0,999}(?:' + _DETAILS + rb"[^{}]{0,999}){0,4}\})")
# No engine counts more tokens.
_MOST = 2**32


class Usage(msgspec.Struct, frozen=True):
    """Tokens, summed over all sequences of the request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class UsageReports:
    """The usage that the events of one answer report. A field that a later event leaves out keeps the value of an earlier one:
    Anthropic reports the prompt when a message starts, and its output alone when it ends."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._fields: _Usage | None = None

    def add(self, event: bytes) -> bool:
        """Whether there is a usage in the data of this event. What cannot be a usage changes nothing."""
        fields = _reported(event)
        if fields is None:
            return False
        if self._fields is not None:
            fields = _merged(self._fields, fields)
        usage = _sum(fields)
        if usage is None:
            return False
        self._fields, self.usage = fields, usage
        return True


def parse_usage(answer: bytes) -> Usage | None:
    """The usage in an answer's body, or in the data of one of its events; None if there is none to be read."""
    fields = _reported(answer)
    return None if fields is None else _sum(fields)


class UsageSearch:
    """The usage of an answer that passes in parts. Of several it is the largest: a client can have put one into its answer."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._rest = b""

    def feed(self, part: bytes) -> None:
        data = self._rest + part
        for name, reported in _REPORTED.findall(data):
            found = parse_usage(b'{"%b":%b}' % (name, reported))
            if found is not None and (self.usage is None or _tokens(found) > _tokens(self.usage)):
                self.usage = found
        self._rest = data[-MOST_USAGE_BYTES:]


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def _reported(answer: bytes) -> _Usage | None:
    try:
        decoded = _decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    inner = decoded.response or decoded.message
    usage = decoded.usage or (None if inner is None else inner.usage)
    if usage is None and decoded.meta is not None and (billed := decoded.meta.billed_units) is not None:
        usage = _Usage(prompt_tokens=(billed.input_tokens or 0) + (billed.image_tokens or 0))
    return usage


def _merged(earlier: _Usage, later: _Usage) -> _Usage:
    pairs = zip(msgspec.structs.astuple(later), msgspec.structs.astuple(earlier), strict=True)
    return _Usage(*(kept if new is None else new for new, kept in pairs))


def _sum(usage: _Usage) -> Usage | None:
    """None for numbers that no engine counts."""
    is_openai = usage.prompt_tokens is not None or usage.completion_tokens is not None
    prompt, completion, cached = _of_openai(usage) if is_openai and usage.input_tokens is None else _of_input(usage)
    if not (0 <= prompt <= _MOST and 0 <= completion <= _MOST):
        return None
    return Usage(prompt, completion, max(0, min(cached, prompt)))


def _of_openai(usage: _Usage) -> tuple[int, int, int]:
    details = usage.prompt_tokens_details
    return usage.prompt_tokens or 0, usage.completion_tokens or 0, (details and details.cached_tokens) or 0


def _of_input(usage: _Usage) -> tuple[int, int, int]:
    prompt, details = usage.input_tokens or 0, usage.input_tokens_details
    if details is not None:
        return prompt, usage.output_tokens or 0, details.cached_tokens or 0
    cached = usage.cache_read_input_tokens or 0
    return prompt + cached + (usage.cache_creation_input_tokens or 0), usage.output_tokens or 0, cached
