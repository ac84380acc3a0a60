"""A stock vLLM's `/metrics`, as the messages that our own scheduler would send over the link."""

from __future__ import annotations

import re

from engine.link import PROTOCOL, Hello, Message, Report

# Every counter of a stock engine is smaller.
MOST_COUNTED = 2.0**53
# The few metrics that are wanted. Parsing all of them takes 10 ms, in which no chunk gets through.
_READ = (
    "vllm:iteration_tokens_total_count",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
_SAMPLE = re.compile(
    rf"^(vllm:cache_config_info|{'|'.join(_READ)})(\{{.*\}})? +([-+0-9.eE]+|NaN)(?: -?[0-9]+)?$", re.MULTILINE
)
_BLOCKS, _BLOCK_SIZE = re.compile(r'[{,]num_gpu_blocks="([0-9]{1,15})"'), re.compile(r'[{,]block_size="([0-9]{1,15})"')


class StockMetrics:
    """Remembers what an exposition alone does not tell: the engine's size, and which of its lives this is."""

    def __init__(self) -> None:
        self._lives = 0
        self._iteration = 0
        self._size: tuple[int, int] = (0, 1)  # blocks, and tokens of a block

    def messages(self, exposition: str) -> list[Message]:
        """A report, after a hello where the engine is new or has another size. Raises `ValueError` for what is not vLLM's."""
        values: dict[str, float] = {}
        size = self._size
        for name, labels, value in _SAMPLE.findall(exposition):
            if name == "vllm:cache_config_info":
                blocks, block_size = _BLOCKS.search(labels), _BLOCK_SIZE.search(labels)
                if blocks and block_size:
                    size = int(blocks[1]), int(block_size[1])
            else:
                values[name] = values.get(name, 0.0) + float(value)
        if _READ[0] not in values:
            raise ValueError("the engine's /metrics have no vllm:iteration_tokens_total")
        iteration, preempted, running, waiting, usage = (values.get(name, 0.0) for name in _READ)
        read = (size[0] * size[1], iteration, preempted, running, waiting, usage)
        if not all(0 <= value <= MOST_COUNTED for value in read):  # nor NaN
            raise ValueError("the engine's /metrics contain an impossible value (negative, NaN, or above 2^53)")
        is_new = not self._lives or iteration < self._iteration
        self._lives += is_new
        self._iteration = int(iteration)
        engine_id = f"metrics-{self._lives}"
        report = Report(
            engine_id=engine_id,
            iteration=self._iteration,
            free_blocks=size[0] - round(usage * size[0]),
            running=int(running),
            waiting=int(waiting),
            preempted=int(preempted),
        )
        if not is_new and size == self._size:
            return [report]
        self._size = size
        return [Hello(PROTOCOL, engine_id, "", *size, max_num_seqs=0, max_model_len=0), report]
