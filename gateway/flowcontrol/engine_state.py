"""What the gateway knows of its engine: the service clock τ, the capacity M, and what is waiting, running and held there.

Fed by the link when the engine's scheduler is ours, else by polling a stock vLLM's `/metrics`. It changes nothing but
itself; `release` asks it.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.link import Ended, Hello, Holding, Message, Report
from gateway.flowcontrol.fairqueue import Iterations

SILENCE_S = 5.0
# Iterations that it takes to know what an engine can hold, and over which that is then averaged.
CAPACITY_ENOUGH, CAPACITY_HORIZON = 200.0, 2000.0
# After so many it is taken over again.
CAPACITY_ITERATIONS = 256
# Seconds over which the rate at which an engine serves is averaged, and that it takes to know it.
RATE_HORIZON_S, RATE_ENOUGH_S = 30.0, 1.0
# Tasks that have ended, of which it is known what they held, and not yet asked.
REMEMBERED_ENDS = 4096
# What a stock engine counts is less than that.
MOST_COUNTED = 2.0**53
# Of its metrics the few that are wanted. To parse all of them takes 10 ms, in which no chunk gets through.
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


class ServedCapacity:
    """The effective capacity: KV tokens that decoding tasks hold, on average, in iterations while others wait.

    It is less than the cache, since blocks are rounded up, prompts are being computed, slots can run out, and what is
    reserved for a task is not held at once. A reference that shared out the whole cache would run ahead of any engine.
    """

    def __init__(self) -> None:
        self._iterations = 0.0
        self._mean = 0.0

    def observe(self, iterations: float, held_tokens: float) -> None:
        """So many iterations, while tasks waited."""
        if iterations <= 0:
            return
        self._iterations += iterations
        self._mean += (held_tokens - self._mean) * min(1.0, iterations / min(self._iterations, CAPACITY_HORIZON))

    def tokens(self, capacity_tokens: float) -> float:
        """At most the whole; the whole until there is enough to go by."""
        return min(self._mean, capacity_tokens) if self._iterations >= CAPACITY_ENOUGH else capacity_tokens


class ServedRate:
    """KV token·iterations a second that the engine has done lately, while it had something to do: what was held in each
    iteration, over the time that they took. Of the last half minute or so."""

    def __init__(self) -> None:
        self._work = self._seconds = 0.0

    def observe(self, seconds: float, work: float) -> None:
        """So much was done in this time."""
        if seconds > 0:
            left = math.exp(-seconds / RATE_HORIZON_S)
            self._work = self._work * left + work
            self._seconds = self._seconds * left + seconds

    def per_s(self) -> float | None:
        """None until there is enough to go by."""
        return self._work / self._seconds if self._seconds >= RATE_ENOUGH_S and self._work > 0 else None


class Counters(NamedTuple):
    """What the engine counts, since its start or over all of its lives."""

    preempted: int = 0
    recomputed_tokens: int = 0  # computed, lost by preemption
    displaced: int = 0  # of the preempted: those that gave way to a more urgent task
    displaced_tokens: int = 0
    refused: int = 0  # messages on the link that it could not take

    def grown(self, before: Counters, now: Counters) -> Counters:
        """With what came between. A counter never goes back: what is less is old."""
        return Counters(*(c + max(0, n - b) for c, b, n in zip(self, before, now, strict=True)))


NO_COUNTERS = Counters()


@dataclass(slots=True)
class EngineView:
    """declared_capacity_tokens, declared_max_num_seqs: what the settings say instead of the engine, if they do."""

    declared_capacity_tokens: int | None = None
    declared_max_num_seqs: int | None = None
    up: bool = False  # it answered when it was last asked
    suspect: bool = False  # a task has just been lost: nothing is released until the engine has answered again
    linked: bool = False  # it speaks over the link
    reporting: bool = False  # the link, or /metrics, speaks, and has said who the engine is
    heard_s: float = 0.0  # when it last did, on a monotonic clock
    iterations: float = 0.0  # τ, over all lives of the engine
    engine_capacity_tokens: float = 0.0
    engine_max_num_seqs: int | None = None
    max_model_len: int | None = None  # tokens of the longest sequence
    displace_margin: float | None = None  # see `ReleaseLimits`
    prefix_caching: bool = False  # what one task has computed, the next can begin with
    prefill_iterations: float = 0.0  # that a token of a prompt takes; 0: not known
    running: int = 0
    waiting: int = 0
    held_tokens: float = 0.0
    counters: Counters = NO_COUNTERS  # over all lives of the engine
    restarts: int = 0
    kept_tokens: float = 0.0  # free, with the KV of agents who wait for their tools
    held: dict[int, Holding] = field(default_factory=dict)  # by task
    agents: dict[str, float] = field(default_factory=dict)  # KV tokens by agent, a shared block in part; now and then
    ends: OrderedDict[int, float] = field(default_factory=OrderedDict)  # by task that ended, KV token·iterations held
    _life: str | None = None
    _iteration: float | None = None  # of this life, as are those below; None: not heard yet
    _counters: Counters = NO_COUNTERS
    _blocks: int = 0
    _block_size: int = 0

    @property
    def now(self) -> Iterations:
        return Iterations(self.iterations)

    @property
    def capacity_tokens(self) -> float:
        """M. 0 when neither the settings nor the engine have said it."""
        return self.declared_capacity_tokens or self.engine_capacity_tokens

    @property
    def counts_held(self) -> bool:
        """Whether it says of each task what it held."""
        return self.linked and self.reporting

    @property
    def refill_iterations(self) -> float:
        """What it takes to compute again as much as the whole cache holds; 0 while that is not known, or of no use."""
        return self.prefill_iterations * self.capacity_tokens if self.prefix_caching else 0.0

    def answered(self) -> None:
        self.up, self.suspect = True, False

    def lost(self) -> None:
        """The engine does not answer: whatever it held is gone."""
        self.up = self.suspect = False
        self._forget_tasks()

    def silent(self, now_s: float) -> None:
        """The link repeats itself when nothing changes; after a while without a word it counts as lost."""
        if self.reporting and now_s - self.heard_s > SILENCE_S:
            self.reporting = False
            self._forget_tasks()

    def hear(self, message: Message, now_s: float) -> None:
        """A message from the link. Reports of an engine that has not said hello are not counted."""
        self.heard_s = now_s
        self.linked = True
        if isinstance(message, Hello):
            self._begin_life(message.engine_id)
            self.reporting = True
            self.engine_capacity_tokens = message.capacity_tokens
            self.engine_max_num_seqs = message.max_num_seqs
            self.max_model_len, self.prefix_caching = message.max_model_len, message.prefix_caching
            self.displace_margin = message.displace_margin
            self._blocks, self._block_size = message.total_blocks, message.block_size
        elif message.engine_id == self._life:
            self.reporting = True
            if isinstance(message, Report):
                self._hear_report(message)
            else:
                self._hear_ends(message)

    def held_by(self, task: int) -> float | None:
        """What a task that has ended held, in KV token·iterations, if the engine has said it; it is then forgotten."""
        return self.ends.pop(task, None)

    def read_metrics(self, exposition: str, now_s: float) -> None:
        """A stock vLLM's `/metrics`, for what can be had of it. Raises `ValueError` for anything else."""
        values: dict[str, float] = {}
        capacity_tokens = self.engine_capacity_tokens
        for name, labels, value in _SAMPLE.findall(exposition):
            if name == "vllm:cache_config_info":
                blocks, size = _BLOCKS.search(labels), _BLOCK_SIZE.search(labels)
                if blocks and size:
                    capacity_tokens = int(blocks[1]) * int(size[1])
            else:
                values[name] = values.get(name, 0.0) + float(value)
        iteration, preempted, running, waiting, usage = (values.get(name, 0.0) for name in _READ)
        if _READ[0] not in values:
            raise ValueError("the engine's /metrics have no vllm:iteration_tokens_total")
        told = (capacity_tokens, iteration, preempted, running, waiting, usage)
        if not all(0 <= value <= MOST_COUNTED for value in told):
            raise ValueError("the engine's /metrics have a value that none can have")  # nor NaN
        self.heard_s = now_s
        self.engine_capacity_tokens = capacity_tokens
        if self._life is None or iteration < (self._iteration or 0.0):
            self._begin_life(f"metrics-{self.restarts + (self._life is not None)}")
        self._count(iteration, Counters(int(preempted)))
        self.running = int(running)
        self.waiting = int(waiting)
        self.held_tokens = usage * capacity_tokens
        self.reporting = True

    def _hear_report(self, report: Report) -> None:
        counters = Counters(*(getattr(report, name) for name in Counters._fields))
        self._count(report.iteration, counters)
        self.running, self.waiting, self.held = report.running, report.waiting, report.held
        self.held_tokens = (self._blocks - report.free_blocks) * self._block_size
        self.prefill_iterations = report.prefill_iterations
        self.kept_tokens = report.kept_blocks * self._block_size
        if report.agents or not report.running:
            self.agents = report.agents

    def _hear_ends(self, ended: Ended) -> None:
        for task, cost in ended.costs.items():
            self.ends[task] = self.ends.get(task, 0.0) + cost  # a sequence may have come after the others had ended
        while len(self.ends) > REMEMBERED_ENDS:
            self.ends.popitem(last=False)

    def _begin_life(self, life: str) -> None:
        if life != self._life:
            # What an engine did before we came is not ours to count; a restarted one began again at zero.
            first = self._life is None
            self.restarts += not first
            self._life, self._iteration, self._counters = life, None if first else 0.0, Counters()
            self._forget_tasks()

    def _count(self, iteration: float, counters: Counters) -> None:
        """Counters begin again at zero in each life of the engine; ours go on."""
        if self._iteration is None:
            self._iteration, self._counters = iteration, counters
        self.iterations += max(0.0, iteration - self._iteration)
        self.counters = self.counters.grown(self._counters, counters)
        self._iteration = max(iteration, self._iteration)
        self._counters = Counters(*map(max, counters, self._counters))

    def _forget_tasks(self) -> None:
        self.running = self.waiting = 0
        self.held_tokens = self.kept_tokens = 0.0
        self.held, self.agents = {}, {}
