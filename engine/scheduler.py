"""vLLM's scheduler, with the gateway's order: `--scheduler-cls engine.scheduler.JustitiaScheduler`.

What to schedule, block by block, stays vLLM's. Three things change: the order of the waiting, the choice of the victim
when memory is full, and a report to the gateway after every iteration.

How little has to be replaced for that (vLLM 0.32, `Scheduler.schedule`):

* Everything that waits passes through `self.waiting` and `self.kv_holding_waiting`, and only through `RequestQueue`'s
  methods. So a queue of our own gives the order, also to requests that are preempted or passed over in a scan.
* `self.policy` is read, after `__init__` has made the queues from it, in one place only: where a running request finds
  no block and a victim must give some back. With PRIORITY the victim is the largest `(priority, arrival_time)`; with
  FCFS it is `self.running[-1]`. So FCFS there, and a sorted `self.running`, make the victim the last in our order. It
  then is never before the request that asked: vLLM visits `self.running` from the front, hence what it gives up is not
  yet part of the step, and a request that is itself the last is its own victim.
* Nothing else depends on the order of `self.running`: the worker finds requests by id, speculative and structured
  output are kept by id, and async scheduling keeps its placeholders on the request. Admitted requests are appended to
  it after the last victim of a step was chosen, so sorting once at the start of each step is enough.
* vLLM preempts by recomputation. What a victim loses is what it has computed.

`AsyncScheduler` is the base because vLLM turns async scheduling off for a subclass of plain `Scheduler`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from engine.link import PROTOCOL, Hello, Holding, LinkError, LinkPublisher, Report
from engine.waiting_queue import WaitingQueue, hints_of

logger = init_logger(__name__)


def victims_last(request: Request) -> tuple[int, str, int, int, float, str]:
    """The order of the running: the next victim is the largest.

    That is a task of the agent with the largest tag, and of that agent the one that has computed the fewest tokens, of
    equals the one that came last.
    """
    hints = hints_of(request)
    return hints.tag, hints.agent, -request.num_computed_tokens, hints.task, request.arrival_time, request.request_id


class JustitiaScheduler(AsyncScheduler):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """Takes vLLM's arguments. The link is `additional_config["justitia"]["link"]`; without it nobody is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting = WaitingQueue()
        self.kv_holding_waiting = WaitingQueue()
        self.policy = SchedulingPolicy.FCFS
        self._engine_id = uuid.uuid4().hex
        self._iteration = 0
        self._preempted = 0
        # A model with several kinds of attention keeps a block in each group for the same tokens. Reports count such
        # sets.
        self._groups = max(1, len(self.kv_cache_config.kv_cache_groups))
        self._link = self._open_link()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.running.sort(key=victims_last)
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        # vLLM also comes here with empty steps, which only tell the worker what ended. They are no iterations.
        if scheduler_output.total_num_scheduled_tokens > 0:
            self._iteration += 1
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

    def report(self) -> Report:
        """The state as the gateway is told it."""
        held: dict[int, Holding] = {}
        for request in (*self.running, *self.kv_holding_waiting):
            task = hints_of(request).task
            if task < 0:
                continue
            kv_tokens, output_tokens = request.num_computed_tokens, request.num_output_tokens
            if task in held:  # a body with `n` > 1 is one task and several requests
                kv_tokens, output_tokens = kv_tokens + held[task].kv_tokens, output_tokens + held[task].output_tokens
            held[task] = Holding(kv_tokens, output_tokens)
        return Report(
            engine_id=self._engine_id,
            iteration=self._iteration,
            # Blocks that only the prefix cache remembers are free: vLLM takes them when it needs them.
            free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks() // self._groups,
            running=len(self.running),
            waiting=len(self.waiting) + len(self.kv_holding_waiting),
            preempted=self._preempted,
            held=held,
        )

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        self._preempted += 1
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _publish(self) -> None:
        if self._link is not None:
            self._link.publish(self.report())

    def _open_link(self) -> LinkPublisher | None:
        address = link_address(self.vllm_config.additional_config)
        if address is None:
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
        )
        try:
            link = LinkPublisher(address, hello)
        except LinkError as error:
            logger.warning("%s; serving without it", error)
            return None
        link.publish(self.report())
        return link


def link_address(additional_config: Any) -> str | None:
    """`additional_config["justitia"]["link"]`, or None."""
    justitia = additional_config.get("justitia") if isinstance(additional_config, dict) else None
    address = justitia.get("link") if isinstance(justitia, dict) else None
    return str(address) if address else None
