"""Memory-centric cost of a task, in KV token·iterations.

A task with a prompt of p tokens holds p + i tokens of KV in its i-th decoding iteration, so that
c = Σ_{i=1..d} (p + i) = p·d + d(d+1)/2 (Justitia, arXiv 2510.17015). The *net* cost leaves out the part of the prompt that
was cached: others had paid for it.
"""

from __future__ import annotations


def task_cost(prompt_tokens: float, decode_tokens: float, cached_tokens: float = 0.0) -> float:
    """Cost in token·iterations; all arguments in tokens. Raises ValueError on what cannot be a number of tokens."""
    if not (prompt_tokens >= 0 and decode_tokens >= 0 and 0 <= cached_tokens <= prompt_tokens):
        raise ValueError(f"not token counts: prompt {prompt_tokens}, decode {decode_tokens}, cached {cached_tokens}")
    return (prompt_tokens - cached_tokens) * decode_tokens + decode_tokens * (decode_tokens + 1) / 2
