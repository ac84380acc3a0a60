"""vLLM's scheduler and block manager on a virtual clock: an iteration is a call, and takes what a profile says.

What is admitted, what gives up its blocks, what the prefix cache holds: all of that is vLLM's own code, under our
scheduler or a stock one. Only the model is missing. Its tokens are made up, and only the hasher of the prefix cache reads
them. So the same calls always have the same results, no GPU is looked for, and a second of one core is some thousands of
iterations.

An iteration's output is back before the next one is scheduled. Asynchronous scheduling plans one iteration ahead, with
placeholders for what is not back yet; what it costs, a profile that was fitted to such an engine has in its numbers.

Where the result is known already, vLLM is not called. `shortcuts=False` calls it all the same: the same results, several
times as slow.

* Most iterations decide nothing: every running request gets one token, there are blocks for those that need one, and what
  waits has been declined and would be again. In such a `_Lull` vLLM is asked for the blocks only.
* A token that goes into a block which its request has needs no call of the block manager.
* Outputs are one good token for each request that has its prompt. That needs little of `update_from_output`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from engine.hints import Hints, to_fields
from engine.lab.profile import StepProfile


@contextmanager
def _alone() -> Iterator[None]:
    """Imports or configures vLLM without a trace: it reads its platform and log level from the environment, and writes to it.

    Unless VLLM_LOGGING_LEVEL is set, it logs errors only: it would warn that this CPU suits it badly.
    """
    before = dict(os.environ)
    logger = logging.getLogger("vllm")
    level = logger.level
    first = "vllm" not in sys.modules
    if first:
        # Else it looks for a GPU, and where its build expects one and there is none, it refuses to be configured.
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    if "VLLM_LOGGING_LEVEL" not in before:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logger.setLevel(max(level, logging.ERROR))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; nothing is allocated
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if not first:
            logger.setLevel(level)


with _alone():
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import CachedRequestData
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.structured_output import StructuredOutputManager

    from engine.scheduler.scheduler import JustitiaScheduler


Made = TypeVar("Made")


class VirtualTask(NamedTuple):
    """A request to the virtual engine."""

    key: int
    prompt_tokens: int
    output_tokens: int
    hints: Hints
    # The beginnings that it shares, outermost first, each with the token where it stops.
    # `(("class-3", 100), ("agent-7", 400))`:
    # tokens 0 to 99 are those of class-3, 100 to 399 those of agent-7, and the rest is its own. A prompt that is shorter than a
    # beginning lies within it, and so does the output if it ends there too: the next turn of a conversation begins with both.
    prefix: tuple[tuple[str, int], ...] = ()


class Running(NamedTuple):
    """A task that runs."""

    key: int
    kv_tokens: int  # computed so far; the last token of the output is sampled, but not computed yet
    output_tokens: int


class Ended(NamedTuple):
    """A task that has ended."""

    key: int
    output_tokens: int
    cached_tokens: int  # of its prompt, in the prefix cache when it was first admitted
    held: float | None = None  # KV token·iterations, as our scheduler counts them; None with a stock one


class Step(NamedTuple):
    """What an iteration has done."""

    ended: list[Ended]  # they had their last token in it
    running: list[Running]  # they run on after it


class _Modelless(AsyncScheduler):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """A scheduler without workers: it makes no message for them, and counts what preemption costs."""

    def __init__(self, *args: Any, shortcuts: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.victims = self.lost_tokens = 0
        self.caching = bool(self.kv_cache_manager.enable_caching)
        self._message = CachedRequestData.make_empty()
        self._no_blocks = self.kv_cache_manager.empty_kv_cache_blocks
        self._allocate = self.kv_cache_manager.allocate_slots
        if shortcuts:
            allocate: Any = self._allocate_slots
            self.kv_cache_manager.allocate_slots = allocate  # type: ignore[method-assign, unused-ignore]

    def deliver(self, scheduled: dict[str, int], tokens: dict[str, int]) -> None:
        """`update_from_output`, for one good token of each request that has its prompt."""
        for name, count in scheduled.items():
            request = self.requests[name]
            request.num_in_flight_tokens -= count
            if request.is_prefill_chunk:
                continue
            # It may go into the prefix cache when its block is full, which it is not before it has been computed.
            request.append_output_token_ids(tokens[name])
            request.num_output_placeholders = 0
            if request.num_output_tokens >= request.max_tokens:
                self.finish(request)

    def finish(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        self._free_request(request)
        self.running.remove(request)

    def _allocate_slots(self, request: Request, num_new_tokens: int, **kwargs: Any) -> KVCacheBlocks | None:
        if num_new_tokens == 1 and request.status is RequestStatus.RUNNING:
            used = request.num_computed_tokens % self.block_size
            # One that this token fills goes to the prefix cache.
            if used and not (self.caching and used == self.block_size - 1):
                return self._no_blocks
        return self._allocate(request, num_new_tokens, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.victims += 1
        self.lost_tokens += request.num_computed_tokens
        super()._preempt_request(request, *args, **kwargs)

    def decides(self) -> bool:
        """Whether the next iteration needs the scheduler, though every running request finds its block."""
        return False

    def lulled(self) -> None:
        """Records an iteration that went by without the scheduler."""

    def _make_cached_request_data(self, *args: Any, **kwargs: Any) -> CachedRequestData:
        return self._message


class _ModellessJustitia(_Modelless, JustitiaScheduler):
    """Our scheduler, without a link."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.costs: dict[str, float] = {}  # KV token·iterations held by the requests that have ended

    def decides(self) -> bool:
        ending = self.kept is not None and 0 < self.kept.next_end <= self.ledger.iteration
        return ending or (self.settings.displace_margin is not None and bool(self.waiting))

    def lulled(self) -> None:
        self.ledger.steady_step()
        self.computed_tokens += len(self.running)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        self.costs[request.request_id] = request.justitia_cost
        return freed


class _Lull:
    """Iterations in which every running request gets one token, until one has its last or finds no block.

    The requests are brought up to date only where vLLM is to see one, and at the end.
    """

    def __init__(self, scheduler: _Modelless, tokens: dict[str, int]) -> None:
        self._scheduler = scheduler
        self._tokens = tokens
        self._running = list(scheduler.running)
        self._start = {request.request_id: request.num_computed_tokens for request in self._running}
        self._left = min(request.max_tokens - request.num_output_tokens for request in self._running)
        self._ending = [r for r in self._running if r.max_tokens - r.num_output_tokens == self._left]
        self.at = 0  # its iterations so far
        self.rows = [(int(r.request_id), r.num_computed_tokens, r.num_output_tokens) for r in self._running]
        self.kv_tokens = sum(self._start.values())
        # By iteration, modulo the block size: requests that need a block, and requests that fill one for the prefix cache.
        size = scheduler.block_size
        self._needing: list[list[Request]] = [[] for _ in range(size)]
        self._filling: list[list[Request]] = [[] for _ in range(size)]
        for request in self._running:
            turn = -request.num_computed_tokens % size
            self._needing[turn].append(request)
            if scheduler.caching:
                self._filling[turn - 1].append(request)

    def advance(self) -> list[Request] | None:
        """One iteration. Returns those that end in it; None, and nothing has changed, if there is something to decide."""
        if self._scheduler.decides():
            return None
        memory = self._scheduler.kv_cache_manager
        turn = self.at % len(self._needing)
        needing, filling = self._needing[turn], self._filling[turn]
        if len(needing) > memory.block_pool.get_num_free_blocks():
            return None
        ending = self._ending if self.at == self._left - 1 else []
        if len(ending) > 1 and self._scheduler.caching:
            return None  # the scheduler decides whose blocks the prefix cache gives up first
        for request in (*needing, *filling):
            self._update(request)
            memory.allocate_slots(request, 1)
        self.at += 1
        self._scheduler.lulled()
        for request in ending:
            self._update(request)
            self._scheduler.finish(request)
        return ending

    def end(self) -> None:
        for request in self._running:
            self._update(request)

    def _update(self, request: Request) -> None:
        name = request.request_id
        behind = self._start[name] + self.at - request.num_computed_tokens
        if behind:
            request.num_computed_tokens += behind
            request.append_output_token_ids([self._tokens[name]] * behind)


class VirtualEngine:
    """An engine on a virtual clock: tasks are added, and each `step` is an iteration."""

    def __init__(
        self,
        profile: StepProfile,
        *,
        scheduler: Literal["justitia", "stock"] = "justitia",
        kv_blocks: int | None = None,
        block_size: int | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int = 32768,
        prefix_caching: bool = False,
        stock_policy: Literal["priority", "fcfs"] = "priority",
        displace_margin: float | None = None,
        shortcuts: bool = True,
    ) -> None:
        """`kv_blocks`, `block_size` and `max_num_seqs` are the profile's unless given. `stock_policy` is for "stock",
        `displace_margin` (see `SchedulerSettings`) for ours."""
        self.profile = profile
        self.now_s = 0.0  # the virtual clock
        self.iterations = 0  # that computed something
        self.max_model_len = max_model_len
        self._blocks = profile.kv_blocks if kv_blocks is None else kv_blocks
        self._block_size = profile.block_size if block_size is None else block_size
        if self._blocks < 1 or self._block_size < 1:
            raise ValueError(f"{self._blocks} blocks of {self._block_size} tokens hold nothing")
        self._scheduler = scheduler_of(
            partial(_ModellessJustitia if scheduler == "justitia" else _Modelless, shortcuts=shortcuts),
            self._blocks,
            block_size=self._block_size,
            max_num_seqs=profile.max_num_seqs if max_num_seqs is None else max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=prefix_caching,
            scheduling_policy=stock_policy,
            additional_config={"justitia": {"displace_margin": displace_margin}},
        )
        if prefix_caching:
            init_none_hash(sha256)
        self._hasher = get_request_block_hasher(self._block_size, sha256) if prefix_caching else None
        self._shortcuts = shortcuts
        self._lull: _Lull | None = None
        self._arrivals = 0
        # By request. Ids of tokens are numbers that no other task has, or no other beginning.
        self._tokens: dict[str, int] = {}
        self._cached: dict[str, int] = {}
        self._beginnings: dict[str, int] = {}

    @property
    def preemptions(self) -> int:
        return self._scheduler.victims

    @property
    def recomputed_tokens(self) -> int:
        """Computed tokens that victims lost. Of some the prefix cache may still have known."""
        return self._scheduler.lost_tokens

    @property
    def capacity_tokens(self) -> int:
        return self._blocks * self._block_size

    @property
    def held_tokens(self) -> int:
        """Tokens of KV that the blocks in use can hold. Blocks that only the prefix cache knows are free."""
        return (self._blocks - self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()) * self._block_size

    @property
    def waiting(self) -> int:
        """Tasks in the engine's own queue, those that were preempted among them."""
        return self._scheduler.get_request_counts()[1]

    @property
    def idle(self) -> bool:
        return not self._scheduler.requests

    def wait_until(self, time_s: float) -> None:
        """Lets time pass without an iteration. The clock never goes back."""
        self.now_s = max(self.now_s, time_s)

    def add(self, task: VirtualTask) -> None:
        """The task arrives now. Raises `ValueError`, and nothing has changed, when it cannot run here."""
        name = str(task.key)
        length = task.prompt_tokens + task.output_tokens
        if task.prompt_tokens < 1 or task.output_tokens < 1:
            raise ValueError(f"task {task.key}: {task.prompt_tokens} + {task.output_tokens} tokens are no request")
        if length > min(self.capacity_tokens, self.max_model_len):
            raise ValueError(
                f"task {task.key}: {length} tokens are more than the {self.capacity_tokens} of the KV cache,"
                f" or the {self.max_model_len} of the longest sequence"
            )
        ends = [end for _, end in task.prefix]
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"task {task.key}: the beginnings in {task.prefix} do not follow each other")
        if name in self._tokens:
            raise ValueError(f"task {task.key} is here already")
        token = self._arrivals
        prompt = [token] * task.prompt_tokens if self._hasher is None else self._prompt(task, token)
        priority, xargs = to_fields(task.hints)
        self._arrivals += 1
        if task.prefix and task.prefix[-1][1] >= length:
            token = self._beginnings.setdefault(task.prefix[-1][0], -1 - len(self._beginnings))
        self._tokens[name] = token
        self._rouse()
        self._scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=task.output_tokens, ignore_eos=True, extra_args=xargs),
                pooling_params=None,
                arrival_time=float(self._arrivals),
                priority=priority,
                block_hasher=self._hasher,
            )
        )

    def change_tag(self, key: int, tag: int) -> None:
        """Changes a task's tag, as a gateway does. Raises `TypeError` with a stock scheduler."""
        self._rouse()
        self._ours().change_tag(key, tag)

    def keep(self, agent: str, iterations: int) -> None:
        """Keeps the agent's KV while it waits for its tool, as a gateway does; 0 ends it. Raises `TypeError` with a stock
        scheduler."""
        self._rouse()
        self._ours().keep(agent, iterations)

    def _ours(self) -> JustitiaScheduler:
        if not isinstance(self._scheduler, JustitiaScheduler):
            raise TypeError("a stock scheduler takes no changes")
        return self._scheduler

    def abort(self, key: int) -> None:
        """Ends a task that waits or runs; does nothing for one that is not here."""
        self._rouse()
        self._scheduler.finish_requests(str(key), RequestStatus.FINISHED_ABORTED)
        self._forget(str(key))

    def step(self) -> Step:
        """One iteration. The clock stands still, and nothing is counted, when there was nothing to compute."""
        lull = self._lull
        ending = lull.advance() if lull is not None else None
        if lull is None or ending is None:
            self._rouse()
            return self._full_step()
        at, count = lull.at, len(lull.rows)
        self._tick(0, count, lull.kv_tokens + count * at)
        if ending:
            self._rouse()
            # One that waits may have its place now.
            if self._scheduler.running and not self.waiting:
                self._lull = _Lull(self._scheduler, self._tokens)
            return Step(self._ended(ending), self._running())
        return Step([], [Running(key, kv_tokens + at, output + at) for key, kv_tokens, output in lull.rows])

    def _full_step(self) -> Step:
        scheduler = self._scheduler
        victims = scheduler.victims
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        for admitted in output.scheduled_new_reqs:
            self._cached.setdefault(admitted.req_id, admitted.num_computed_tokens)
        if not scheduled:
            return Step([], self._running())
        requests = [scheduler.requests[name] for name in scheduled]
        prefill_tokens = decodes = kv_tokens = chunks = 0
        for request, count in zip(requests, scheduled.values(), strict=True):
            computed = request.num_computed_tokens  # with those of this iteration
            kv_tokens += computed
            chunks += request.is_prefill_chunk
            # A preempted request computes its output again as if it were prompt.
            if count == 1 and computed > request.num_prompt_tokens and not request.is_prefill_chunk:
                decodes += 1
            else:
                prefill_tokens += count
        self._tick(prefill_tokens, decodes, kv_tokens)
        if self._shortcuts:
            scheduler.deliver(scheduled, self._tokens)
        else:
            scheduler.update_from_output(output, self._output(requests))
        ending = [request for request in requests if request.is_finished()]
        # What waits was passed over for want of memory or of a place, not of tokens in this iteration's budget.
        if (
            self._shortcuts
            and not chunks
            and scheduler.victims == victims
            and len(requests) - len(ending) == len(scheduler.running) > 0
            and output.total_num_scheduled_tokens < scheduler.max_num_scheduled_tokens
            and not (ending and self.waiting)
        ):
            self._lull = _Lull(scheduler, self._tokens)
        return Step(self._ended(ending), self._running())

    def _output(self, requests: list[Request]) -> ModelRunnerOutput:
        return ModelRunnerOutput(
            req_ids=[request.request_id for request in requests],
            req_id_to_index={request.request_id: i for i, request in enumerate(requests)},
            sampled_token_ids=[[] if r.is_prefill_chunk else [self._tokens[r.request_id]] for r in requests],
        )

    def _ended(self, requests: list[Request]) -> list[Ended]:
        costs = self._scheduler.costs if isinstance(self._scheduler, _ModellessJustitia) else {}
        ended = [
            Ended(int(name), request.num_output_tokens, self._cached[name], costs.pop(name, None))
            for request in requests
            for name in (request.request_id,)
        ]
        for request in requests:
            self._forget(request.request_id)
        return ended

    def _running(self) -> list[Running]:
        return [
            Running(int(request.request_id), request.num_computed_tokens, request.num_output_tokens)
            for request in self._scheduler.running
        ]

    def _tick(self, prefill_tokens: int, decodes: int, kv_tokens: int) -> None:
        self.iterations += 1
        self.now_s += self.profile.step_s(prefill_tokens, decodes, kv_tokens)

    def _rouse(self) -> None:
        if self._lull is not None:
            self._lull.end()
            self._lull = None

    def _forget(self, name: str) -> None:
        self._tokens.pop(name, None)
        self._cached.pop(name, None)

    def _prompt(self, task: VirtualTask, own: int) -> list[int]:
        """Ids that are the same as another prompt's exactly where it shares a beginning."""
        prompt: list[int] = []
        for name, end in task.prefix:
            token = self._beginnings.setdefault(name, -1 - len(self._beginnings))
            prompt += [token] * (min(end, task.prompt_tokens) - len(prompt))
        return prompt + [own] * (task.prompt_tokens - len(prompt))


def scheduler_of(kind: Callable[..., Made], blocks: int, **arguments: Any) -> Made:
    """A scheduler without an engine. `arguments`: vLLM's, `block_size` and `max_model_len` among them."""
    config = _configuration(**arguments)
    config.cache_config.num_gpu_blocks = blocks + 1  # vLLM's null block
    block_size = arguments["block_size"]
    # Of the model, only the sizes of a token's keys and values; nothing follows from them.
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
    )


def _configuration(**arguments: Any) -> VllmConfig:
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": arguments["max_model_len"],
        "dtype": "float32",
    }
    with _alone(), tempfile.TemporaryDirectory(prefix="justitia-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(model))
        return EngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="float32",
            enforce_eager=True,
            enable_chunked_prefill=True,
            **arguments,
        ).create_engine_config()
