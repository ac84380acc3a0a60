"""The queue follows its engine: what tasks there hold, how much it holds and serves, how many tasks it takes."""

from __future__ import annotations

from dataclasses import replace

from gateway.flowcontrol.engine_state import CAPACITY_ITERATIONS, EngineState
from gateway.flowcontrol.fairqueue import FairQueue, Iterations, ReleaseLimits, TaskId


class Following:
    """Carries what an engine reports into the queue."""

    def __init__(self, queue: FairQueue) -> None:
        self.shared_tokens = 0.0  # the capacity that the reference shares out
        self._queue = queue
        self._observed_at = self._capacity_at = Iterations(0.0)
        self._observed_s: float | None = None

    def observe(self, now_s: float, engine: EngineState) -> None:
        """After a report: what the engine's tasks hold, and what it was seen to serve."""
        queue, clock = self._queue, engine.now
        decoding = [(TaskId(task), kv_tokens, output) for task, (kv_tokens, output) in engine.held.items() if output]
        if decoding:
            queue.observe_all(clock, decoding)
        # Else the queue counts tasks that are not at the engine yet, or not any more.
        if decoding and len(decoding) == queue.in_flight:
            queue.calibrate(clock, engine.held_tokens)
        passed = clock - self._observed_at
        if decoding and queue.waiting:
            decoding_tokens = sum([kv_tokens for _, kv_tokens, _ in decoding])
            engine.served.observe(passed, min(decoding_tokens, engine.held_tokens))
        if queue.in_flight and self._observed_s is not None:
            engine.rate.observe(now_s - self._observed_s, passed * engine.held_tokens)
        self._observed_at, self._observed_s = clock, now_s

    def capacity(self, engine: EngineState, *, share_served: bool, cost_per_held: float) -> None:
        """M, and the part of it that the reference shares out. See `controller.Options`."""
        queue, clock = self._queue, engine.now
        if not engine.reporting:
            queue.unreserve()  # the clock stands still, and what is kept is not known
        if engine.capacity_tokens != queue.capacity_tokens or clock - self._capacity_at >= CAPACITY_ITERATIONS:
            self._capacity_at = clock
            served = engine.served.tokens(engine.capacity_tokens) if share_served else engine.capacity_tokens
            self.shared_tokens = served * cost_per_held
            queue.set_capacity(clock, engine.capacity_tokens, self.shared_tokens)

    def slots(self, engine: EngineState, limits: ReleaseLimits) -> None:
        """How many tasks may be in flight, and by how much one must come first to displace another."""
        slots = engine.slots(limits.engine_waiting or 0)
        if self._queue.limits.in_flight != slots or self._queue.limits.displace_margin != engine.displace_margin:
            self._queue.limits = replace(limits, in_flight=slots, displace_margin=engine.displace_margin)
