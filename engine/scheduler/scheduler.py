"""vLLM's scheduler, with the gateway's order: `--scheduler-cls engine.scheduler.JustitiaScheduler`.

What to schedule, block by block, stays vLLM's. What changes: the order of the waiting, the choice of the victim when memory
is full, which free blocks are taken last, and that the gateway is told and obeyed (`engine.link`).

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
  still delivered. Whom we displace so is kept out of the queue until the step is scheduled, as vLLM resumes nobody in the
  step that preempts him.

`AsyncScheduler` is the base because vLLM turns async scheduling off for a subclass of plain `Scheduler`.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import vllm
from vllm.logger import init_logger
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
from engine.link import PROTOCOL, Ended, EngineLink, Hello, LinkError, Report
from engine.scheduler.kept_blocks import KeptBlocks
from engine.scheduler.ledger import Ledger
from engine.scheduler.step_times import StepTimes
from engine.scheduler.waiting_queue import WaitingQueue, hints_of, place_of, retag

logger = init_logger(__name__)

# A report names the waiting tasks unless there are more.
NAMED_WAITING = 256
# How often the gateway is heard, and told that tasks decode, while nothing else happens.
LINK_INTERVAL_S = 0.05
# Tags that came before their tasks. A task's number never repeats, so what is left over does no harm.
EARLY_TAGS = 4096
# A task is displaced so often at most; and of all that the engine computes, this share at most is lost by displacing.
DISPLACED_AT_MOST = 2
DISPLACED_SHARE = 0.05


def victims_last(request: Request) -> tuple[int, str, int, int, float, str]:
    """The order of the running: the next victim is the largest.

    That is a task of the agent with the largest tag, and of that agent the one that has computed the fewest tokens, of
    equals the one that came last.
    """
    hints = hints_of(request)
    return hints.tag, hints.agent, -request.num_computed_tokens, hints.task, request.arrival_time, request.request_id


class JustitiaScheduler(AsyncScheduler):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """Takes vLLM's arguments. `additional_config["justitia"]` may have

    link: the address of the link; without it nobody is told, and nobody obeyed.
    link_interval_s: how often the gateway is heard, and told, while tasks run; default 0.05. Of what happens beside that they
        decode, it is told at once.
    displace_margin: a waiting task that finds no room displaces running ones whose tags are larger by more than this, in
        token·iterations per unit of weight; without it none does.

    The counters are since the start: preempted requests, computed tokens that they lost, and how much of both was displaced.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if findings := _misfits():
            raise RuntimeError("; ".join((*findings, "vLLM's own scheduler can be chosen: --engine-scheduler stock")))
        super().__init__(*args, **kwargs)
        self.waiting: WaitingQueue = WaitingQueue()
        self._passed_over = WaitingQueue()
        # Until vLLM 0.30 `skipped_waiting`.
        setattr(
            self, "kv_holding_waiting" if hasattr(self, "kv_holding_waiting") else "skipped_waiting", self._passed_over
        )
        self.policy = SchedulingPolicy.FCFS
        self.preempted = self.recomputed_tokens = self.displaced = self.displaced_tokens = 0
        # A model with several kinds of attention keeps a block in each group for the same tokens. Reports count such
        # sets. In a group with full attention a request has the blocks of all its tokens until it ends.
        groups = self.kv_cache_config.kv_cache_groups
        self._groups = max(1, len(groups))
        self._whole_group = next(
            (i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, FullAttentionSpec)), None
        )
        self.ledger = Ledger(self.block_size, self._blocks_of)
        pool = self.kv_cache_manager.block_pool
        self._kept: KeptBlocks | None = None
        if self.kv_cache_manager.enable_caching:
            self._kept = pool.free_block_queue = KeptBlocks(pool.free_block_queue.get_all_free_blocks())
        settings = settings_of(self.vllm_config.additional_config)
        margin = settings.get("displace_margin")
        self._displace_margin = None if margin is None else float(margin)
        self._by_task: dict[int, list[Request]] = defaultdict(list)
        self._early_tags: dict[int, int] = {}
        self._last_blocks: dict[str, tuple[int, dict[int, Any]]] = {}  # by agent: its tag, and hashes by block
        self._remembered = 0  # blocks in them
        self._gone: dict[str, Request] = {}  # preempted, and not back yet
        self._partial_costs: dict[int, float] = defaultdict(float)  # by task, of whose sequences some have ended
        self._costs: dict[int, float] = defaultdict(float)  # by task that has ended and was not reported
        self._steady = False
        self._times = StepTimes()
        self._computed_tokens = 0
        self._engine_id = uuid.uuid4().hex
        self._iteration = 0
        self._link_interval_s = float(settings.get("link_interval_s", LINK_INTERVAL_S))
        self._heard_s = 0.0
        self._told, self._told_s = (0, 0, 0), 0.0
        self._link = self._open_link(settings.get("link"))

    # What the gateway may ask for

    def change_tag(self, task: int, tag: int) -> None:
        """Of a task that waits or runs, or is still on its way here: the link is faster."""
        if task in self._early_tags or task not in self._by_task:
            self._early_tags[task] = to_tag(tag)
            while len(self._early_tags) > EARLY_TAGS:
                del self._early_tags[next(iter(self._early_tags))]
        for request in self._by_task.get(task, ()):
            retag(request, to_tag(tag))
            for queue in (self.waiting, self._passed_over):
                if request in queue:
                    queue.add_request(request)

    def keep(self, agent: str, iterations: int) -> None:
        """Take the free blocks with what the agent's last tasks have computed after all others, for so many iterations; 0:
        no longer."""
        if self._kept is None:
            return
        if iterations <= 0:
            self._kept.let_go(agent)
        elif agent in self._last_blocks:
            tag, hashes = self._last_blocks[agent]
            pool = self.kv_cache_manager.block_pool.blocks
            # Who has it now, or what was computed in it since, is no concern of this agent.
            blocks = [
                pool[i] for i, block_hash in hashes.items() if not pool[i].ref_cnt and pool[i].block_hash == block_hash
            ]
            self._kept.keep(agent, tag, blocks, self.ledger.iteration + iterations)

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
        if self._link is not None:
            due = time.perf_counter() >= self._heard_s + self._link_interval_s
            if due or self._link.left:
                self._obey(self._link, listen=due)
        if self._kept is not None and 0 < self._kept.next_end <= self.ledger.iteration:
            self._kept.end_keepings(self.ledger.iteration)
        displaced = self._displace() if self._displace_margin is not None else []
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
        # vLLM also comes here with empty steps, which only tell the worker what ended. They are no iterations.
        if scheduler_output.total_num_scheduled_tokens > 0:
            self._iteration += 1
        if self._link is not None and self._has_news(self._link):
            self._publish()
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        # Aborts come between steps, and the last one is followed by none.
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        self._publish()
        return finished

    def shutdown(self) -> None:
        if self._link is not None:
            self._link.close()
        super().shutdown()

    def _select_waiting_queue_for_scheduling(self) -> RequestQueue | None:
        """Until vLLM 0.30, which else would take all that were passed over before anybody who waits."""
        queues = [queue for queue in (self.waiting, self._passed_over) if queue]
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
                cost = self._partial_costs.pop(hints.task)
                if self._link is not None:
                    self._costs[hints.task] += cost
        self._gone.pop(request.request_id, None)
        if self._kept is not None and hints.agent:
            self._remember(request)
        return super()._free_request(request, *args, **kwargs)

    # How it works

    def report(self, *, whole: bool = False) -> Report:
        """The state as the gateway is told it; `whole`: with what is left out at other times."""
        running: list[Any] = self.running
        if self._passed_over:
            # They hold what another engine has computed, or is sending.
            running = [*running, *(request for request in self._passed_over if request.num_computed_tokens > 0)]
        waiting = len(self.waiting) + len(self._passed_over)
        named = waiting and (whole or waiting <= NAMED_WAITING)
        return Report(
            engine_id=self._engine_id,
            iteration=self._iteration,
            # Blocks that only the prefix cache remembers are free: vLLM takes them when it needs them.
            free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks() // self._groups,
            running=len(self.running),
            waiting=waiting,
            preempted=self.preempted,
            recomputed_tokens=self.recomputed_tokens,
            displaced=self.displaced,
            displaced_tokens=self.displaced_tokens,
            prefill_iterations=self._times.prefill_iterations,
            kept_blocks=self._kept.num_kept_blocks // self._groups if self._kept is not None else 0,
            tasks=[request.justitia_hints.task for request in running],
            kv_tokens=[request.num_computed_tokens for request in running],
            output_tokens=[request.num_output_tokens for request in running],
            waiting_tasks=[*self.waiting.tasks(), *self._passed_over.tasks()] if named else [],
            agents=self.ledger.by_agent(running) if whole else {},
            heard=self._link.heard if self._link is not None else {},
            refused=self._link.refused if self._link is not None else 0,
        )

    def _obey(self, link: EngineLink, listen: bool) -> None:
        if listen:
            self._heard_s = time.perf_counter()
        for change in link.changes(listen=listen):
            for task, tag in change.tags.items():
                self.change_tag(task, tag)
            for agent, iterations in change.keep.items():
                self.keep(agent, iterations)

    def _order_matters(self) -> bool:
        """Whether a request may find no block, or no tokens left in this step's budget."""
        if not self._steady:
            return len(self.running) > 1
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if free >= len(self.running) * self._groups:
            return False
        size = self.block_size
        return free < self._groups * sum(not request.num_computed_tokens % size for request in self.running)

    def _note(self, output: SchedulerOutput) -> None:
        """What the step has changed."""
        scheduled = output.num_scheduled_tokens
        admitted = {new.req_id: self.requests[new.req_id] for new in output.scheduled_new_reqs}
        for name in [n for n, request in self._gone.items() if request.status == RequestStatus.RUNNING]:
            admitted[name] = self._gone.pop(name)
        for name, request in admitted.items():
            agent = hints_of(request).agent
            self._recall(agent)
            if self._kept is not None:
                self._kept.let_go(agent)  # it is back
            self.ledger.admit(request, request.num_computed_tokens - scheduled[name])
        total = output.total_num_scheduled_tokens
        # Each of them decodes, one token, and none was cut short. So it is in the next step, but for those admitted there.
        self._steady = (
            total == len(scheduled) == len(self.running)
            and total < self.max_num_scheduled_tokens
            and not self.num_spec_tokens
            and not self.num_lookahead_tokens
        )
        if total > 0:
            self._computed_tokens += total
            if self._steady and not admitted:
                self.ledger.steady_step()
            else:
                self.ledger.step(self.running, scheduled)
            self._times.step(time.perf_counter(), total - len(scheduled))
        else:
            self._times.pause()

    def _displace(self) -> list[Request]:
        """Preempt the running tasks that have to make room for the first that waits, if they are enough; who they are.

        There is no end to a quarrel over memory that both sides can begin again. So no agent displaces a task twice, no
        task is displaced more than `DISPLACED_AT_MOST` times, and what is lost stays below `DISPLACED_SHARE` of the work.
        """
        if not self.waiting or self._passed_over or self.pause_state != PauseState.UNPAUSED:
            return []
        if self.connector is not None:
            return []  # it may still be reading the blocks, and they would not be free in this step
        first = self.waiting.peek_request()
        if first.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return []
        assert self._displace_margin is not None
        urgent = hints_of(first)
        # As if the prefix cache knew nothing of it: to ask would count as a lookup.
        blocks = self._groups * math.ceil(first.num_tokens / self.block_size) + getattr(
            self.kv_cache_manager, "watermark_blocks", 0
        )
        blocks -= self.kv_cache_manager.block_pool.get_num_free_blocks()
        slots = len(self.running) + 1 - self.max_num_running_reqs
        # Those that stay are scheduled first, and take what they need.
        next_blocks, tokens = {}, 0
        for request in self.running:
            ahead = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            tokens += ahead
            upto = request.num_computed_tokens + min(ahead, self.max_num_scheduled_tokens)
            taken = self._groups * (math.ceil(upto / self.block_size) - len(self._blocks_of(request)))
            next_blocks[request.request_id] = max(0, taken)
        if tokens >= self.max_num_scheduled_tokens:
            return []  # nobody is admitted in this step
        blocks += sum(next_blocks.values())
        victims: list[Any] = []
        lost = self.displaced_tokens
        self.running.sort(key=victims_last)
        for request in reversed(self.running):
            if slots <= 0 and blocks <= 0:
                break
            hints = hints_of(request)
            if hints.tag <= urgent.tag + self._displace_margin:
                return []
            by: tuple[str, ...] = getattr(request, "justitia_displaced_by", ())
            if (
                hints.agent == urgent.agent
                or urgent.agent in by
                or len(by) >= DISPLACED_AT_MOST
                or lost + request.num_computed_tokens > DISPLACED_SHARE * self._computed_tokens
            ):
                continue
            victims.append(request)
            lost += request.num_computed_tokens
            slots -= 1
            blocks -= next_blocks[request.request_id]
            blocks -= self._groups * sum(block.ref_cnt == 1 for block in self._blocks_of(request))
        if slots > 0 or blocks > 0:
            return []
        now = time.monotonic()
        for victim in victims:
            self.displaced += 1
            victim.justitia_displaced_by = (*getattr(victim, "justitia_displaced_by", ()), urgent.agent)
            self.running.remove(victim)
            self._preempt_request(victim, now)
            self.waiting.remove_request(victim)
        self.displaced_tokens = lost
        return victims

    def _remember(self, request: Request) -> None:
        """The blocks that its agent's next task may begin with, the first to be taken first."""
        hints = hints_of(request)
        hashes = self._recall(hints.agent)
        pool = self.kv_cache_manager.block_pool.blocks
        for group in self.kv_cache_manager.get_blocks(request.request_id).blocks:
            for block in reversed(group):
                # Not those of another pool.
                if block.block_hash is not None and block.block_id < len(pool) and pool[block.block_id] is block:
                    hashes.pop(block.block_id, None)  # what several of its tasks have is taken last
                    hashes[block.block_id] = block.block_hash
        self._last_blocks[hints.agent] = hints.tag, hashes
        self._remembered += len(hashes)
        while self._remembered > self.kv_cache_manager.block_pool.num_gpu_blocks and len(self._last_blocks) > 1:
            self._recall(next(iter(self._last_blocks)))

    def _recall(self, agent: str) -> dict[int, Any]:
        """What its last tasks have computed, the hash by block; it is then forgotten."""
        _, hashes = self._last_blocks.pop(agent, (0, {}))
        self._remembered -= len(hashes)
        return hashes

    def _blocks_of(self, request: Request) -> Sequence[KVCacheBlock]:
        """In the order of its tokens, where there is a group that has them all."""
        if self._whole_group is None:
            return ()
        blocks: Sequence[KVCacheBlock] = self.kv_cache_manager.get_blocks(request.request_id).blocks[self._whole_group]
        return blocks

    def _has_news(self, link: EngineLink) -> bool:
        """More than that each running task has a token more: that is told now and then."""
        if self._costs or not self._steady or link.snapshot_wanted:
            return True
        state = len(self.running), len(self.waiting), self.preempted
        return state != self._told or time.perf_counter() >= self._told_s + self._link_interval_s

    def _publish(self) -> None:
        if self._link is None:
            return
        self._told, self._told_s = (len(self.running), len(self.waiting), self.preempted), time.perf_counter()
        if self._costs:
            self._link.ended(Ended(self._engine_id, dict(self._costs)))
            self._costs.clear()
        whole, self._link.snapshot_wanted = self._link.snapshot_wanted, False
        self._link.publish(self.report(whole=whole))

    def _open_link(self, address: Any) -> EngineLink | None:
        if not address:
            return None
        if self.parallel_config.data_parallel_index > 0:
            # The gateway listens at one address. The other ranks honour its order and stay silent.
            logger.info("the link reports data-parallel rank 0 only")
            return None
        hello = Hello(
            protocol=PROTOCOL,
            engine_id=self._engine_id,
            engine_version=vllm.__version__,
            # One block is vLLM's null block, which no request can hold.
            total_blocks=(self.kv_cache_manager.block_pool.num_gpu_blocks - 1) // self._groups,
            block_size=self.block_size,
            max_num_seqs=self.max_num_running_reqs,
            max_model_len=self.max_model_len,
            prefix_caching=self._kept is not None,
            displace_margin=self._displace_margin,
        )
        try:
            link = EngineLink(str(address), hello)
        except LinkError as error:
            logger.warning("%s; serving without it", error)
            return None
        self._link = link
        link.publish(self.report())
        return link


@cache
def _misfits() -> tuple[str, ...]:
    """What we miss in this vLLM; read once, since it takes some reading."""
    return tuple(compat.check())


def settings_of(additional_config: Any) -> dict[str, Any]:
    """`additional_config["justitia"]`; empty when there is none."""
    justitia = additional_config.get("justitia") if isinstance(additional_config, dict) else None
    return justitia if isinstance(justitia, dict) else {}
