"""vLLM's real scheduler and block manager, without an engine: a step is a call.

`in_flight=2` schedules a step before the output of the last one is back, as vLLM's engine does with async scheduling.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine.hints import Hints, to_fields

BLOCK_SIZE = 32
TOKEN = 7  # any that ends nothing


class Clockwork:
    """A scheduler over `blocks` usable blocks of 32 tokens, and the model behind it, which is not there."""

    def __init__(
        self,
        scheduler_class: type[Scheduler],
        model: Path,
        *,
        blocks: int,
        max_num_seqs: int = 16,
        in_flight: int = 1,
        justitia: dict[str, Any] | None = None,
        data_parallel_index: int = 0,
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        config = EngineArgs(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_model_len=2048,
            scheduling_policy="priority",
            additional_config={} if justitia is None else {"justitia": justitia},
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks + 1  # vLLM's null block
        config.parallel_config.data_parallel_index = data_parallel_index
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        self.scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._in_flight = in_flight
        self._steps: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._added = 0
        self.requests: dict[str, Request] = {}
        self.preempted: list[str] = []  # the victims, in order
        self._record_victims()

    def add(
        self, name: str, hints: Hints | None, prompt: int, output: int, tokens: Sequence[int] | None = None
    ) -> Request:
        """A task that arrives now, with `prompt` tokens that no other has unless they are given."""
        self._added += 1
        priority, xargs = to_fields(hints) if hints is not None else (0, None)
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens or (self._added * 1000 + i for i in range(prompt))),
            sampling_params=SamplingParams(max_tokens=output, extra_args=xargs),
            pooling_params=None,
            arrival_time=float(self._added),
            priority=priority,
            block_hasher=self._hasher,
        )
        self.requests[name] = request
        self.scheduler.add_request(request)
        return request

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def step(self) -> list[str]:
        """Schedules one step, and takes the output of the oldest that is in flight. Returns who was scheduled."""
        output = self.scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        sampled = [[] if self.requests[name].is_prefill_chunk else [TOKEN] for name in ids]
        self._steps.append(
            (output, ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled_token_ids=sampled))
        )
        if len(self._steps) >= self._in_flight:
            self.scheduler.update_from_output(*self._steps.popleft())
        return ids

    def drain(self) -> None:
        while self._steps:
            self.scheduler.update_from_output(*self._steps.popleft())

    def until(self, done: Callable[[], bool], limit: int = 10_000) -> None:
        for _ in range(limit):
            if done():
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def run(self, limit: int = 10_000) -> list[str]:
        """To the end of all requests. Returns the order in which they ended."""
        ended: list[str] = []
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests():
                self.drain()
                self.step()  # tells the worker what ended, as the engine does
                self.drain()
                return ended
            self.step()
            ended += [n for n, r in self.requests.items() if r.is_finished() and n not in ended]
        raise AssertionError("the scheduler makes no progress")

    def waiting(self) -> list[str]:
        return [request.request_id for request in self.scheduler.waiting]

    def running(self) -> set[str]:
        return {request.request_id for request in self.scheduler.running}

    def _record_victims(self) -> None:
        preempt: Any = self.scheduler._preempt_request

        def record(request: Request, *args: Any, **kwargs: Any) -> None:
            self.preempted.append(request.request_id)
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = record  # type: ignore[method-assign, unused-ignore]  # to listen in
