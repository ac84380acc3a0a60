"""The engine's endpoints that use KV cache, and what the gateway reads of their bodies.

A request to one of these is a task, and waits for its turn. Requests that use no KV cache (tokenizing, counting, fetching
what is done) are forwarded at once: see `gateway.api.passthrough`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.protocol.dialects import Dialect, dialect_of_path


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the engine's endpoints, and the fields of its body that the gateway reads or adds."""

    path: str
    texts: tuple[str, ...]  # the fields that make up the prompt
    limits: tuple[str, ...] = ()  # the fields that limit the tokens to decode; the first that is present counts
    batch: tuple[str, ...] = ()  # the fields that hold several prompts if they are lists
    decodes: bool = True  # False where the prompt is all there is, and is held for one iteration
    priority: bool = True  # whether the engine takes the tag as the field `priority`
    xargs: bool = True  # whether the engine takes the field `vllm_xargs`
    dialect: Dialect = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dialect", dialect_of_path(self.path))


def _pooling(path: str, *texts: str, batch: tuple[str, ...]) -> Endpoint:
    return Endpoint(path, texts, batch=batch, decodes=False, xargs=False)


CHAT = Endpoint("/v1/chat/completions", ("messages", "tools"), ("max_completion_tokens", "max_tokens"))

COMPLETIONS = Endpoint("/v1/completions", ("prompt", "suffix"), ("max_tokens",), batch=("prompt",))

ENDPOINTS = (
    CHAT,
    COMPLETIONS,
    Endpoint("/v1/responses", ("instructions", "input", "tools"), ("max_output_tokens",)),
    Endpoint("/v1/messages", ("system", "messages", "tools"), ("max_tokens",), priority=False),
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
