"""What a task cost, however it ended.

One rule for every ending. What the engine counted is right; where it has not reported that, its usage is; where there is no
usage, its last report on the task; then the events that were relayed; and last what was predicted, or the iterations since the
release. A task that never reached the engine costs nothing.
"""

from __future__ import annotations

import math

import msgspec

from gateway.flowcontrol.agents import LiveAgent
from gateway.flowcontrol.effects import Arriving, Ending, EngineId
from gateway.flowcontrol.engine_state import EngineState
from gateway.flowcontrol.estimate import Cost, Estimate
from gateway.flowcontrol.fairqueue import Iterations, TaskId
from gateway.flowcontrol.quotas import Account
from gateway.flowcontrol.records import TenantUsage
from gateway.protocol.errors import Outcome
from gateway.protocol.usage import Usage
from predictor.features import row
from predictor.types import FinishedTask


class LiveTask(msgspec.Struct, eq=False):
    """A task from its arrival to its settlement."""

    id: TaskId
    agent: LiveAgent
    account: Account
    estimate: Estimate
    engine: EngineId
    prompt_bytes: int  # of all prompts
    prompts: int
    sequences: int
    max_tokens: int | None
    decodes: bool
    counted: bool  # the engine reports it by its number
    body_bytes: int
    arrived_s: float  # on the monotonic clock
    since_s: float  # since when it waits, or is in flight
    queued_s: float = 0.0  # seconds spent waiting, before `since_s`
    max_queue_s: float = 0.0  # that it may wait
    waiting: bool = True
    retried: bool = False  # the engine had it, and lost it
    released_at: Iterations | None = None  # on the service clock

    @classmethod
    def of(
        cls, arriving: Arriving, agent: LiveAgent, account: Account, estimate: Estimate, engine: EngineId, now_s: float
    ) -> LiveTask:
        content = arriving.content
        return cls(
            arriving.id,
            agent,
            account,
            estimate,
            engine,
            content.prompt_bytes * arriving.prompts,
            arriving.prompts,
            content.sequences,
            content.max_tokens,
            arriving.decodes,
            arriving.counted,
            arriving.body_bytes,
            now_s if arriving.arrived_s is None else arriving.arrived_s,
            now_s,
        )

    @property
    def left_s(self) -> float:
        """Seconds that it may still wait, from `since_s` on."""
        return self.max_queue_s - self.queued_s

    @property
    def expires_s(self) -> float:
        """When, on the monotonic clock, it will have waited for too long."""
        return self.since_s + self.left_s


def check_usage(usage: Usage | None) -> None:
    """Raises `ValueError` for numbers that no engine can have counted."""
    if usage is not None and not (
        0 <= usage.cached_tokens <= usage.prompt_tokens < math.inf and 0 <= usage.completion_tokens < math.inf
    ):
        raise ValueError(f"no usage of a task: {usage}")


def finished_task(task: LiveTask, usage: Usage, held: float | None) -> FinishedTask:
    """A completed task, as the predictor learns from it. held: KV token·iterations, as the engine counted them."""
    return FinishedTask(
        prompt_bytes=task.prompt_bytes,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        # A prompt that is only read is held for the iteration in which it is: as if one token were decoded.
        decode_tokens=usage.completion_tokens if task.decodes else task.sequences,
        prompts=task.prompts,
        sequences=task.sequences,
        held=held,
        max_tokens=task.max_tokens,
    )


def row_of(task: LiveTask) -> bytes:
    """What was known of the task at its arrival, to train on; empty, if it is not kept."""
    sketch, opening, numbers = task.estimate.sketch, task.agent.opening, task.estimate.numbers
    if not numbers or sketch is None or opening is None:
        return b""
    return row(sketch, opening, numbers).tobytes()


def cost_of_finished(task: FinishedTask, cost: Cost) -> float:
    """KV token·iterations of a completed task: what was held, where that is known; else by the formula."""
    if task.held is not None:
        return task.held
    prompt_tokens, cached_tokens = task.prompt_tokens / task.prompts, task.cached_tokens / task.prompts
    return task.sequences * cost(prompt_tokens, task.decode_tokens / task.sequences, cached_tokens)


def cost_of_broken_off(task: LiveTask, ending: Ending, engine: EngineState, cost: Cost) -> float:
    """KV token·iterations of a task that was not completed, or whose answer does not report its usage."""
    usage, sequences = ending.usage, task.sequences
    counted = engine.take_counted(task.id)
    if counted is not None:
        return counted
    # A stream of Anthropic's begins with a usage that knows the prompt only.
    if usage is not None and (usage.completion_tokens or not task.decodes):
        return cost_of_finished(finished_task(task, usage, None), cost)
    prompt_tokens = task.estimate.prompt_tokens / sequences if usage is None else usage.prompt_tokens / task.prompts
    holding = engine.held.get(task.id)
    if holding is not None:
        kv_tokens, output_tokens = holding
        decoded = output_tokens / sequences
        return sequences * cost(max(0.0, kv_tokens / sequences - decoded), decoded, 0.0)
    if ending.events:
        return sequences * cost(prompt_tokens, ending.events / sequences, 0.0)
    if ending.outcome is Outcome.COMPLETED or ending.made:
        return task.estimate.cost
    if task.released_at is None or ending.outcome is Outcome.INVALID or engine.linked:
        return 0.0
    # An engine without a link reports nothing before the end.
    return min(task.estimate.cost, sequences * cost(prompt_tokens, engine.now - task.released_at, 0.0))


def use_of(task: LiveTask, ending: Ending, cost: float) -> TenantUsage:
    """What the task adds to its tenant's use."""
    usage = ending.usage
    if usage is None and ending.made:
        usage = Usage(round(task.estimate.prompt_tokens * task.prompts / task.sequences), 0, 0)
    if usage is None:
        return TenantUsage(requests=1, kv_cost=cost)
    return TenantUsage(1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, cost)
