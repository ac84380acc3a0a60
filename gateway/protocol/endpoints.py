"""The engine's endpoints that make KV, and what of their bodies the gateway reads.

A task holds KV and so waits for its turn; here is each kind of it. What holds none (tokenizing, counting, fetching what
is done) is relayed at once: see `passing`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.protocol.dialects import ANTHROPIC, OPENAI, RESPONSES, Dialect


@dataclass(frozen=True, slots=True)
class Endpoint:
    """texts: the fields of which the prompt is made. limits: those that limit how many tokens are decoded, the first that is
    there counts. batch: those that hold several prompts if they are lists. decodes: False where the prompt is all, and is held
    for one iteration. priority, xargs: which of our hints the engine takes in the body."""

    path: str
    texts: tuple[str, ...]
    limits: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    dialect: Dialect = OPENAI
    decodes: bool = True
    priority: bool = True
    xargs: bool = True


def _pooling(path: str, *texts: str, batch: tuple[str, ...]) -> Endpoint:
    return Endpoint(path, texts, batch=batch, decodes=False, xargs=False)


CHAT = Endpoint("/v1/chat/completions", ("messages", "tools"), ("max_completion_tokens", "max_tokens"))

COMPLETIONS = Endpoint("/v1/completions", ("prompt", "suffix"), ("max_tokens",), batch=("prompt",))

ENDPOINTS = (
    CHAT,
    COMPLETIONS,
    Endpoint("/v1/responses", ("instructions", "input", "tools"), ("max_output_tokens",), dialect=RESPONSES),
    Endpoint("/v1/messages", ("system", "messages", "tools"), ("max_tokens",), dialect=ANTHROPIC, priority=False),
    _pooling("/v1/embeddings", "input", "messages", batch=("input",)),
    _pooling("/v2/embed", "texts", "inputs", "images", batch=("texts", "inputs", "images")),
    _pooling("/pooling", "input", "messages", "data", batch=("input",)),
    _pooling("/classify", "input", "messages", batch=("input",)),
    *(
        _pooling(path, "text_1", "text_2", "queries", "documents", "items", "data_1", "data_2", batch=_many)
        for _many in [("text_2", "documents", "items", "data_2")]
        for path in ("/score", "/v1/score")
    ),
    *(_pooling(path, "query", "documents", batch=("documents",)) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
)
