"""The scheduler's side of the link: what it reports to the gateway, when, and which changes it takes in a step."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import vllm
from vllm.logger import init_logger

from engine.link import PROTOCOL, Change, Ended, EngineLink, Hello, LinkError, Report

if TYPE_CHECKING:
    from engine.scheduler.scheduler import JustitiaScheduler

logger = init_logger(__name__)

# A report names the waiting tasks unless there are more.
NAMED_WAITING = 256


class Reporting:
    """Reads the scheduler, never changes it. Without an address nothing is sent or received."""

    def __init__(self, scheduler: JustitiaScheduler, address: str | None, interval_s: float) -> None:
        self._scheduler = scheduler
        self._interval_s = interval_s
        self._engine_id = uuid.uuid4().hex
        self._iteration = 0
        self._costs: dict[int, float] = defaultdict(float)  # of tasks that have ended and were not reported
        self._reported, self._reported_s = (0, 0, 0), 0.0
        self._listened_s = 0.0
        self.link: EngineLink | None = None
        if address:
            self._open(address)

    def changes(self) -> Iterator[Change]:
        """Those that the next step has to take: of what came, and of what an earlier step had no time for."""
        if self.link is None:
            return
        due = time.perf_counter() >= self._listened_s + self._interval_s
        if due:
            self._listened_s = time.perf_counter()
        if due or self.link.left:
            yield from self.link.changes(listen=due)

    def ended(self, task: int, cost: float) -> None:
        """All of the task's sequences have ended. cost: in KV token·iterations."""
        if self.link is not None:
            self._costs[task] += cost

    def stepped(self, tokens: int) -> None:
        """A step's output is back. tokens: those that it computed.

        vLLM also makes steps without any, only to let the worker know what ended. They are no iterations.
        """
        if tokens > 0:
            self._iteration += 1
        if self.link is not None and self._has_news(self.link):
            self.publish()

    def publish(self) -> None:
        if self.link is None:
            return
        self._reported, self._reported_s = self._state(), time.perf_counter()
        if self._costs:
            self.link.ended(Ended(self._engine_id, dict(self._costs)))
            self._costs.clear()
        whole, self.link.snapshot_wanted = self.link.snapshot_wanted, False
        self.link.publish(self.report(whole=whole))

    def report(self, *, whole: bool = False) -> Report:
        """The engine's state; `whole`: with what is left out unless a snapshot was asked for."""
        scheduler = self._scheduler
        running: list[Any] = scheduler.running
        if scheduler.passed_over:
            # They hold what another engine has computed, or is sending.
            running = [*running, *(request for request in scheduler.passed_over if request.num_computed_tokens > 0)]
        waiting = len(scheduler.waiting) + len(scheduler.passed_over)
        named = waiting and (whole or waiting <= NAMED_WAITING)
        return Report(
            engine_id=self._engine_id,
            iteration=self._iteration,
            # Blocks that only the prefix cache remembers are free: vLLM takes them when it needs them.
            free_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks() // scheduler.groups,
            running=len(scheduler.running),
            waiting=waiting,
            preempted=scheduler.preempted,
            recomputed_tokens=scheduler.recomputed_tokens,
            displaced=scheduler.displaced,
            displaced_tokens=scheduler.displaced_tokens,
            prefill_iterations=scheduler.times.prefill_iterations,
            kept_blocks=scheduler.kept.num_kept_blocks // scheduler.groups if scheduler.kept is not None else 0,
            tasks=[request.justitia_hints.task for request in running],
            kv_tokens=[request.num_computed_tokens for request in running],
            output_tokens=[request.num_output_tokens for request in running],
            waiting_tasks=[*scheduler.waiting.tasks(), *scheduler.passed_over.tasks()] if named else [],
            agents=scheduler.ledger.by_agent(running) if whole else {},
            heard=self.link.heard if self.link is not None else {},
            refused=self.link.refused if self.link is not None else 0,
        )

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    def _state(self) -> tuple[int, int, int]:
        return len(self._scheduler.running), len(self._scheduler.waiting), self._scheduler.preempted

    def _has_news(self, link: EngineLink) -> bool:
        """Whether more has happened than that each running task has a token more, which is reported now and then."""
        return bool(
            self._costs
            or not self._scheduler.steady
            or link.snapshot_wanted
            or self._state() != self._reported
            or time.perf_counter() >= self._reported_s + self._interval_s
        )

    def _open(self, address: str) -> None:
        scheduler = self._scheduler
        if scheduler.parallel_config.data_parallel_index > 0:
            # The gateway listens at one address. The other ranks honour its order and report nothing.
            logger.info("the link reports data-parallel rank 0 only")
            return
        hello = Hello(
            protocol=PROTOCOL,
            engine_id=self._engine_id,
            engine_version=vllm.__version__,
            # One block is vLLM's null block, which no request can hold.
            total_blocks=(scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1) // scheduler.groups,
            block_size=scheduler.block_size,
            max_num_seqs=scheduler.max_num_running_reqs,
            max_model_len=scheduler.max_model_len,
            prefix_caching=scheduler.kept is not None,
            displace_margin=scheduler.settings.displace_margin,
        )
        try:
            self.link = EngineLink(address, hello)
        except LinkError as error:
            logger.warning("%s; serving without it", error)
            return
        self.link.publish(self.report())
