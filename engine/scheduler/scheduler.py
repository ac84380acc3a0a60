"""vLLM's scheduler, with the gateway's order: `--scheduler-cls engine.scheduler.JustitiaScheduler`.

What to schedule, block by block, stays vLLM's. What changes: the order of the waiting, the choice of the victim when memory
is full, which free blocks are taken last, and that the engine reports to the gateway and takes its changes (`engine.link`).

How little has to be replaced for that (vLLM 0.27 to 0.33, `Scheduler.schedule`; `engine.compat` checks it):

* Everything that waits passes through `self.waiting` and a second queue for those that were passed over, and only through
  `RequestQueue`'s methods. So a queue of our own gives the order, also to requests that are preempted or passed over in a scan.
* `self.policy` is read, after `__init__` has made the queues from it, in one place only: where a running request finds
  no block and a victim must give some back. With PRIORITY the victim is the largest `(priority, arrival_time)`; with
  FCFS it is `self.running[-1]`. So FCFS there, and a sorted `self.running`, make the victim the last in our order. It
  then is never before the request that asked: vLLM visits `self.running` from the front, hence what it gives up is not
  yet part of the step, and a request that is itself the last is its own victim.
* Nothing else depends on the order of `self.running`: the worker finds requests by id, speculative and structured
  output are kept by id, and async scheduling keeps its placeholders on the request. Admitted requests are appended to
  it after the last victim of a step was chosen, so sorting once at the start of each step is enough; and where the step
  can run out of neither blocks nor tokens, any order has the same outcome, and the sorting is left out.
* vLLM preempts by recomputation. What a victim loses is what it has computed.
* A running request can be preempted between steps, as vLLM's own `reset_prefix_cache` does it: what it has in flight is
  still delivered. Tasks that are displaced so stay out of the queue until the step is scheduled, as vLLM resumes no request
  in the step that preempts it.

`AsyncScheduler` is the base because vLLM turns async scheduling off for a subclass of plain `Scheduler`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from engine import compat
from engine.hints import to_tag
from engine.scheduler.displacement import Room, Running, choose_victims
from engine.scheduler.kept_blocks import KeptBlocks, LastBlocks
from engine.scheduler.ledger import Ledger
from engine.scheduler.order import hints_of, place_of, retag, victims_last
from engine.scheduler.reporting import Reporting
from engine.scheduler.step_times import StepTimes
from engine.scheduler.waiting_queue import WaitingQueue

LINK_INTERVAL_S = 0.05
# Tags that came before their tasks. A task's number never repeats, so what is left over does no harm.
EARLY_TAGS = 4096


class SchedulerSettings(NamedTuple):
    """What `additional_config["justitia"]` may have for the scheduler."""

    # Address of the link; without it nothing is reported, and the gateway can change nothing.
    link: str | None = None
    # Seconds between looks at what the gateway sent, and between reports while tasks only decode. All else that happens is
    # reported at once.
    link_interval_s: float = LINK_INTERVAL_S
    # A waiting task that finds no room displaces running ones whose tags are larger by more than this, in token·iterations
    # per unit of weight. None: no task is displaced.
    displace_margin: float | None = None


def settings_of(additional_config: Any) -> SchedulerSettings:
    justitia = additional_config.get("justitia") if isinstance(additional_config, dict) else None
    if not isinstance(justitia, dict):
        return SchedulerSettings()
    address, margin = justitia.get("link"), justitia.get("displace_margin")
    return SchedulerSettings(
        link=str(address) if address else None,
        link_interval_s=float(justitia.get("link_interval_s", LINK_INTERVAL_S)),
        displace_margin=None if margin is None else float(margin),
    )


class JustitiaScheduler(AsyncScheduler):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """vLLM's scheduler with the gateway's order. Takes vLLM's arguments, and `SchedulerSettings` from its configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if findings := _misfits():
            raise RuntimeError("; ".join((*findings, "vLLM's own scheduler can be chosen: --engine-scheduler stock")))
        super().__init__(*args, **kwargs)
        self.settings = settings_of(self.vllm_config.additional_config)
        self.waiting: WaitingQueue = WaitingQueue()
        self.passed_over = WaitingQueue()
        # Until vLLM 0.30 `skipped_waiting`.
        setattr(
            self, "kv_holding_waiting" if hasattr(self, "kv_holding_waiting") else "skipped_waiting", self.passed_over
        )
        self.policy = SchedulingPolicy.FCFS
        # Since the start: preempted requests, computed tokens that they lost, and how much of both was displaced.
        self.preempted = self.recomputed_tokens = self.displaced = self.displaced_tokens = 0
        self.computed_tokens = 0  # since the start, by all requests
        # A model with several kinds of attention keeps a block in each group for the same tokens. Reports count such
        # sets. In a group with full attention a request has the blocks of all its tokens until it ends.
        groups = self.kv_cache_config.kv_cache_groups
        self.groups = max(1, len(groups))
        self._whole_group = next(
            (i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, FullAttentionSpec)), None
        )
        self.ledger = Ledger(self.block_size, self._blocks_of)
        self.times = StepTimes()
        pool = self.kv_cache_manager.block_pool
        self.kept: KeptBlocks | None = None  # None: without prefix caching there is nothing to keep
        if self.kv_cache_manager.enable_caching:
            self.kept = pool.free_block_queue = KeptBlocks(pool.free_block_queue.get_all_free_blocks())
        self._last_blocks = LastBlocks(pool)
        self._by_task: dict[int, list[Request]] = defaultdict(list)
        self._early_tags: dict[int, int] = {}
        self._gone: dict[str, Request] = {}  # preempted, and not back yet
        self._partial_costs: dict[int, float] = defaultdict(float)  # by task, of whose sequences some have ended
        self.steady = (
            False  # whether in the last step each running request decoded one token, and nothing else happened
        )
        self.reporting = Reporting(self, self.settings.link, self.settings.link_interval_s)

    # What the gateway may ask for

    def change_tag(self, task: int, tag: int) -> None:
        """Gives a task another tag. It may wait, run, or still be on its way, since the link is faster than HTTP."""
        if task in self._early_tags or task not in self._by_task:
            self._early_tags[task] = to_tag(tag)
            while len(self._early_tags) > EARLY_TAGS:
                del self._early_tags[next(iter(self._early_tags))]
        for request in self._by_task.get(task, ()):
            retag(request, to_tag(tag))
            for queue in (self.waiting, self.passed_over):
                if request in queue:
                    queue.add_request(request)

    def keep(self, agent: str, iterations: int) -> None:
        """For so many iterations, takes the free blocks that the agent's last tasks computed after all others; 0 ends it."""
        if self.kept is None:
            return
        if iterations <= 0:
            self.kept.let_go(agent)
        elif (last := self._last_blocks.free(agent)) is not None:
            self.kept.keep(agent, last.tag, last.blocks, self.ledger.iteration + iterations)

    # What vLLM calls

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:  # else more of a streaming session
            self.ledger.open(request)
            task = hints_of(request).task
            if task >= 0:
                self._by_task[task].append(request)
                if task in self._early_tags:  # which stays: the task may have several sequences
                    retag(request, self._early_tags[task])
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        for change in self.reporting.changes():
            for task, tag in change.tags.items():
                self.change_tag(task, tag)
            for agent, iterations in change.keep.items():
                self.keep(agent, iterations)
        if self.kept is not None and 0 < self.kept.next_end <= self.ledger.iteration:
            self.kept.end_keepings(self.ledger.iteration)
        margin = self.settings.displace_margin
        displaced = [] if margin is None else self._displace(margin)
        if self._order_matters():
            self.running.sort(key=victims_last)
        output = super().schedule(throttle_prefills)
        for request in displaced:
            self.waiting.add_request(request)
        self._note(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        self.reporting.stepped(scheduler_output.total_num_scheduled_tokens)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        # Aborts come between steps, and the last one is followed by none.
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        self.reporting.publish()
        return finished

    def shutdown(self) -> None:
        self.reporting.close()
        super().shutdown()

    def _select_waiting_queue_for_scheduling(self) -> RequestQueue | None:
        """Until vLLM 0.30, which else would take all that were passed over before any that waits."""
        queues = [queue for queue in (self.waiting, self.passed_over) if queue]
        return min(queues, key=lambda queue: place_of(queue.peek_request()), default=None)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.preempted += 1
        self.recomputed_tokens += request.num_computed_tokens
        self.ledger.leave(request)
        self._gone[request.request_id] = request
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        hints = hints_of(request)
        # The token that a step samples counts as held in it, as in the formula of a cost.
        held = request.justitia_cost = self.ledger.leave(request) + request.num_output_tokens
        if hints.task >= 0:
            others = self._by_task[hints.task]
            others.remove(request)
            self._partial_costs[hints.task] += held
            if not others:
                del self._by_task[hints.task]
                self.reporting.ended(hints.task, self._partial_costs.pop(hints.task))
        self._gone.pop(request.request_id, None)
        if self.kept is not None and hints.agent:
            self._last_blocks.remember(hints, self.kv_cache_manager.get_blocks(request.request_id).blocks)
        return super()._free_request(request, *args, **kwargs)

    # How it works

    def _order_matters(self) -> bool:
        """Whether a request may find no block, or no tokens left in this step's budget."""
        if not self.steady:
            return len(self.running) > 1
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if free >= len(self.running) * self.groups:
            return False
        size = self.block_size
        return free < self.groups * sum(not request.num_computed_tokens % size for request in self.running)

    def _note(self, output: SchedulerOutput) -> None:
        """Records what the step has changed."""
        scheduled = output.num_scheduled_tokens
        admitted = {new.req_id: self.requests[new.req_id] for new in output.scheduled_new_reqs}
        for name in [n for n, request in self._gone.items() if request.status == RequestStatus.RUNNING]:
            admitted[name] = self._gone.pop(name)
        for name, request in admitted.items():
            agent = hints_of(request).agent
            self._last_blocks.forget(agent)
            if self.kept is not None:
                self.kept.let_go(agent)  # it is back
            self.ledger.admit(request, request.num_computed_tokens - scheduled[name])
        total = output.total_num_scheduled_tokens
        # Each of them decodes, one token, and none was cut short. So it is in the next step, but for those admitted there.
        self.steady = (
            total == len(scheduled) == len(self.running)
            and total < self.max_num_scheduled_tokens
            and not self.num_spec_tokens
            and not self.num_lookahead_tokens
        )
        if total > 0:
            self.computed_tokens += total
            if self.steady and not admitted:
                self.ledger.steady_step()
            else:
                self.ledger.step(self.running, scheduled)
            self.times.step(time.perf_counter(), total - len(scheduled))
        else:
            self.times.pause()

    def _displace(self, margin: float) -> list[Request]:
        """Preempts the running tasks that have to make room for the first that waits, if they are enough; returns them."""
        if not self.waiting or self.passed_over or self.pause_state != PauseState.UNPAUSED:
            return []
        if self.connector is not None:
            return []  # it may still be reading the blocks, and they would not be free in this step
        first = self.waiting.peek_request()
        if first.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return []
        memory = self.kv_cache_manager
        room = Room(
            free_slots=self.max_num_running_reqs - len(self.running),
            free_blocks=memory.block_pool.get_num_free_blocks() - getattr(memory, "watermark_blocks", 0),
            block_size=self.block_size,
            groups=self.groups,
            step_tokens=self.max_num_scheduled_tokens,
            computed_tokens=self.computed_tokens,
            displaced_tokens=self.displaced_tokens,
        )
        self.running.sort(key=victims_last)
        running = [self._as_running(request) for request in reversed(self.running)]
        urgent = hints_of(first)
        chosen = choose_victims(urgent, first.num_tokens, running, room, margin, self._own_blocks)
        victims: list[Any] = [self.requests[victim.request_id] for victim in chosen]
        now = time.monotonic()
        for request, victim in zip(victims, chosen, strict=True):
            self.displaced += 1
            self.displaced_tokens += victim.computed_tokens
            request.justitia_displaced_by = (*victim.displaced_by, urgent.agent)
            self.running.remove(request)
            self._preempt_request(request, now)
            self.waiting.remove_request(request)
        return victims

    def _as_running(self, request: Any) -> Running:
        return Running(
            request.request_id,
            hints_of(request),
            computed_tokens=request.num_computed_tokens,
            ahead_tokens=request.num_tokens + request.num_output_placeholders - request.num_computed_tokens,
            blocks=len(self._blocks_of(request)),
            displaced_by=getattr(request, "justitia_displaced_by", ()),
        )

    def _own_blocks(self, request_id: str) -> int:
        """Blocks, over all groups, that are free once this request gives them up."""
        return self.groups * sum(block.ref_cnt == 1 for block in self._blocks_of(self.requests[request_id]))

    def _blocks_of(self, request: Request) -> Sequence[KVCacheBlock]:
        """In the order of its tokens, where there is a group that has them all."""
        if self._whole_group is None:
            return ()
        blocks: Sequence[KVCacheBlock] = self.kv_cache_manager.get_blocks(request.request_id).blocks[self._whole_group]
        return blocks


@cache
def _misfits() -> tuple[str, ...]:
    """What this vLLM lacks; read once, since it takes some reading."""
    return tuple(compat.check())
