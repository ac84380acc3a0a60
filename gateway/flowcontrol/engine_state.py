"""What flow control knows of one engine: the service clock τ, the capacity M, and what waits, runs and is held there.

It is fed with the messages of the link, or, of a stock vLLM, with the same messages made from its `/metrics`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.link import Ended, Hello, Message, Report
from gateway.flowcontrol.fairqueue import Iterations

# Seconds without a report after which the reports count as ceased; an engine whose state does not change repeats its last.
SILENCE_S = 5.0
# Iterations that it takes to know what an engine can hold, and over which that is then averaged.
CAPACITY_ENOUGH, CAPACITY_HORIZON = 200.0, 2000.0
# Iterations after which the capacity is taken over again.
CAPACITY_ITERATIONS = 256
# Seconds over which the rate at which an engine serves is averaged, and that it takes to know it.
RATE_HORIZON_S, RATE_ENOUGH_S = 30.0, 1.0
# Costs of ended tasks that are kept until they are asked for.
REMEMBERED_ENDS = 4096
# Seconds for which nothing is released after the engine could not be reached: at first, at most, and after how many seconds
# without a failure the first one counts again.
BACK_OFF_S, LONGEST_BACK_OFF_S, RECOVERED_S = 0.25, 8.0, 30.0
# Tasks at an engine that has not reported how much memory it has; and at one that has, but not how many tasks it runs at once.
SLOTS_WITHOUT_CAPACITY = 8
SLOTS_OF_STOCK = 256


class ServedCapacity:
    """The effective capacity: KV tokens that decoding tasks hold, on average, in iterations while others wait.

    It is less than the cache, since blocks are rounded up, prompts are being computed, slots can run out, and what is
    reserved for a task is not held at once. A reference that shared out the whole cache would run ahead of any engine.
    """

    def __init__(self) -> None:
        self._iterations = 0.0
        self._mean = 0.0

    def observe(self, iterations: float, held_tokens: float) -> None:
        """iterations: that passed while tasks waited."""
        if iterations <= 0:
            return
        self._iterations += iterations
        self._mean += (held_tokens - self._mean) * min(1.0, iterations / min(self._iterations, CAPACITY_HORIZON))

    def tokens(self, capacity_tokens: float) -> float:
        """At most the whole; the whole until there is enough to go by."""
        return min(self._mean, capacity_tokens) if self._iterations >= CAPACITY_ENOUGH else capacity_tokens


class ServedRate:
    """KV token·iterations a second that the engine has done in about the last half minute, while it had something to do."""

    def __init__(self) -> None:
        self._work = self._seconds = 0.0

    def observe(self, seconds: float, work: float) -> None:
        """work: KV token·iterations done in this time."""
        if seconds > 0:
            left = math.exp(-seconds / RATE_HORIZON_S)
            self._work = self._work * left + work
            self._seconds = self._seconds * left + seconds

    def per_s(self) -> float | None:
        """None until there is enough to go by."""
        return self._work / self._seconds if self._seconds >= RATE_ENOUGH_S and self._work > 0 else None


class Counters(NamedTuple):
    """The engine's own counters, since its start or over all of its lives."""

    preempted: int = 0
    recomputed_tokens: int = 0  # computed, lost by preemption
    displaced: int = 0  # of the preempted: those that gave way to a more urgent task
    displaced_tokens: int = 0
    refused: int = 0  # messages on the link that it could not take

    def grown(self, before: Counters, now: Counters) -> Counters:
        """These and what was counted between two reports. A counter never goes back: a smaller one is old."""
        return Counters(*(c + max(0, n - b) for c, b, n in zip(self, before, now, strict=True)))


NO_COUNTERS = Counters()


@dataclass(slots=True)
class EngineState:
    """Of one engine, over all of its lives: a restart begins a new one."""

    declared_capacity_tokens: int | None = None  # from the settings, which go before the engine's own
    declared_max_num_seqs: int | None = None
    up: bool = False  # it answered its last health check
    suspect: bool = False  # a task was lost: nothing is released until a health check has succeeded
    linked: bool = False  # it reports over the link
    listens: bool = False  # it takes changes over the link
    reporting: bool = False  # reports come, by the link or from /metrics
    reported_s: float = 0.0  # when the last one came, on the monotonic clock
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
    kept_tokens: float = 0.0  # free, with the KV of agents that wait for their tools
    held: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # by task: KV tokens, and output tokens
    agents: dict[str, float] = field(default_factory=dict)  # KV tokens by agent, a shared block in part; now and then
    counted: OrderedDict[int, float] = field(default_factory=OrderedDict)  # by ended task, KV token·iterations held
    rate: ServedRate = field(default_factory=ServedRate)
    served: ServedCapacity = field(default_factory=ServedCapacity)
    _failures: int = 0  # to reach it, in a row
    _failed_s: float = -math.inf
    _resumes_s: float = -math.inf
    _life: str | None = None
    _iteration: float | None = None  # of this life, as are those below; None: no report yet
    _counters: Counters = NO_COUNTERS
    _blocks: int = 0
    _block_size: int = 0

    @property
    def now(self) -> Iterations:
        return Iterations(self.iterations)

    @property
    def capacity_tokens(self) -> float:
        """M. 0 when neither the settings nor the engine give it."""
        return self.declared_capacity_tokens or self.engine_capacity_tokens

    @property
    def counts_held(self) -> bool:
        """Whether it reports what each task held."""
        return self.linked and self.reporting

    @property
    def refill_iterations(self) -> float:
        """What it takes to compute again as much as the whole cache holds; 0 while that is not known, or of no use."""
        return self.prefill_iterations * self.capacity_tokens if self.prefix_caching else 0.0

    def slots(self, engine_waiting: int) -> int:
        """Tasks that may be in flight at once. engine_waiting: those of them that may wait in the engine's own queue."""
        if self.declared_max_num_seqs is not None:
            return self.declared_max_num_seqs
        if not self.capacity_tokens:
            return SLOTS_WITHOUT_CAPACITY
        return (self.engine_max_num_seqs or SLOTS_OF_STOCK) + engine_waiting

    def takes_tasks(self, now_s: float) -> bool:
        return self.up and not self.suspect and now_s >= self._resumes_s

    def answers(self) -> None:
        """A health check has succeeded."""
        self.up, self.suspect = True, False

    def is_down(self) -> None:
        """Health checks fail: whatever it held is gone."""
        self.up = self.suspect = False
        self._forget_tasks()

    def lost_task(self, now_s: float, *, reached: bool) -> None:
        """A task was lost. reached: the engine had it. An engine that answers health checks and takes no connections would
        else be tried again at once, and for ever."""
        self.suspect = True
        if not reached and now_s >= self._resumes_s:  # else it was released before the failure that is being waited out
            self._failures = 1 if now_s - self._failed_s > RECOVERED_S else self._failures + 1
            self._failed_s = now_s
            self._resumes_s = now_s + min(LONGEST_BACK_OFF_S, BACK_OFF_S * 2 ** min(self._failures - 1, 10))

    def check_silence(self, now_s: float) -> None:
        """Reports that have not come for a while have ceased."""
        if self.reporting and now_s - self.reported_s > SILENCE_S:
            self.reporting = False
            self._forget_tasks()

    def take(self, message: Message, now_s: float, *, linked: bool = True) -> None:
        """A message of the link, or one made from `/metrics`. Those of a life that has not begun with a hello are passed
        over."""
        self.reported_s = now_s
        self.linked = self.linked or linked
        if isinstance(message, Hello):
            self._begin_life(message.engine_id)
            self.reporting = True
            self.engine_capacity_tokens = message.capacity_tokens
            self.engine_max_num_seqs = message.max_num_seqs or None
            self.max_model_len, self.prefix_caching = message.max_model_len or None, message.prefix_caching
            self.displace_margin = message.displace_margin
            self._blocks, self._block_size = message.total_blocks, message.block_size
        elif message.engine_id == self._life:
            self.reporting = True
            if isinstance(message, Report):
                self._take_report(message)
            else:
                self._take_ends(message)

    def take_counted(self, task: int) -> float | None:
        """KV token·iterations that an ended task held, if the engine has reported them; they are then forgotten."""
        return self.counted.pop(task, None)

    def _take_report(self, report: Report) -> None:
        counters = Counters(*(getattr(report, name) for name in Counters._fields))
        self._count(report.iteration, counters)
        self.running, self.waiting = report.running, report.waiting
        held = dict(zip(report.tasks, zip(report.kv_tokens, report.output_tokens, strict=True), strict=True))
        # A task of several sequences is there several times, and what is not the gateway's has a number below 0.
        self.held = held if len(held) == len(report.tasks) and -1 not in held else report.held
        self.held_tokens = (self._blocks - report.free_blocks) * self._block_size
        self.prefill_iterations = report.prefill_iterations
        self.kept_tokens = report.kept_blocks * self._block_size
        if report.agents or not report.running:
            self.agents = report.agents

    def _take_ends(self, ended: Ended) -> None:
        for task, cost in ended.costs.items():
            if 0 <= cost < math.inf:
                self.counted[task] = self.counted.get(task, 0.0) + cost  # a sequence may end after the others
        while len(self.counted) > REMEMBERED_ENDS:
            self.counted.popitem(last=False)

    def _begin_life(self, life: str) -> None:
        if life != self._life:
            # What an engine did before the gateway came does not count; a restarted one began again at zero.
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
