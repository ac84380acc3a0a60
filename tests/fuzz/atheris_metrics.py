"""A stock engine's metrics, several times one after the other: a NUL between them."""

from __future__ import annotations

import atheris

from tests.fuzz.harness import fuzz

with atheris.instrument_imports(include=["gateway"]):
    from tests.fuzz.properties import metrics_hold

_WORDS = (
    *("vllm:iteration_tokens_total_count", "vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:cache_config_info"),
    *('{num_gpu_blocks="', 'block_size="', '"} 1\n', "\n", "\0", "NaN", "+Inf", "-1", "1e400", "1e17", " 1700000000"),
)


def one(data: bytes) -> None:
    metrics_hold(data.decode("utf-8", "replace").split("\0")[:4])


if __name__ == "__main__":
    fuzz("metrics", one, _WORDS)
