"""The memory of the tasks in flight: now, and at its peak.

Each sequence at the engine holds one token more with each iteration, until it ends and frees them all. So with the lengths as
predicted, the memory held at any iteration to come is known; its peaks are where tasks end. A task j that began at s_j with
p_j tokens, grows by k_j an iteration (its sequences) and ends at e_j, holds p_j + k_j·(t − s_j) at iteration t < e_j, and at
t all tasks that have not ended hold

    Σ (p_j − k_j·s_j)  +  t · Σ k_j                                                                          [tokens]

A task that outlives its prediction is expected to go on for a share of the iterations it has already run. The idea of
admitting by the future peak is from Gong et al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import NamedTuple

from gateway.flowcontrol.fairqueue.types import Iterations, Task, TaskId

# A task that outlives its prediction runs for this share of its iterations more: the mean residual of a heavy-tailed length.
OUTLIVED = 0.25
# Engine reports averaged when calibrating against measured KV.
CALIBRATION_REPORTS = 100
# Completed tasks over which true lengths are compared with predicted ones.
LEARNED_LENGTHS = 100
# Iterations, and tokens, by which a report may differ from the forecast of a task before the forecast is made anew.
SLACK = 8.0


class _Growth(NamedTuple):
    """A task in flight, as predicted. A tuple, since every decision compares and walks them: by end, and then by task."""

    end: float
    task_id: TaskId
    base: float  # tokens that it would have held at iteration 0
    rate: float  # tokens an iteration
    began: float
    prompt_tokens: float


class Forecast:
    """The tasks in flight, in tokens of KV over iterations of the service clock."""

    def __init__(self) -> None:
        self._by_id: dict[TaskId, _Growth] = {}
        self._by_end: list[_Growth] = []
        self._base = 0.0  # sums over all
        self._rate = 0.0
        self._scale = 1.0  # tokens that the engine really holds, over those predicted
        # Sums, in which each task counts less with time.
        self._true_lengths = self._predicted_lengths = LEARNED_LENGTHS * 1.0

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, now: Iterations, task: Task) -> None:
        """A task begins."""
        self._put(self._begin(now, task))

    def remove(self, task_id: TaskId) -> None:
        """A task has ended. Raises `KeyError` for an unknown one."""
        growth = self._by_id.pop(task_id)
        del self._by_end[bisect_left(self._by_end, growth)]
        # Exactly zero when nothing is left, whatever rounding did.
        self._base = self._base - growth.base if self._by_id else 0.0
        self._rate = self._rate - growth.rate if self._by_id else 0.0

    def observe(self, now: Iterations, task_id: TaskId, kv_tokens: float, output_tokens: float) -> None:
        """The engine reports what a task holds, and has produced: its prompt, and when it began to decode, follow from that."""
        growth = self._by_id[task_id]
        prompt_tokens = kv_tokens - output_tokens
        behind = now - output_tokens / growth.rate - growth.began
        if abs(behind) > SLACK or abs(prompt_tokens - growth.prompt_tokens) > SLACK:
            self.remove(task_id)
            began, end = growth.began + behind, growth.end + behind
            self._put(_growth(end, task_id, began, prompt_tokens, growth.rate))

    def calibrate(self, now: Iterations, held_tokens: float) -> None:
        """The engine reports the tokens it holds: more than predicted since blocks are not full, less since tasks share."""
        predicted = self._base + self._rate * now
        if predicted > 0 and 0 < held_tokens < math.inf:
            self._scale += (held_tokens / predicted - self._scale) / CALIBRATION_REPORTS

    def learn(self, task: Task, output_tokens: float) -> None:
        """A task has ended with this many output tokens. If lengths are predicted too long on average, or too short, those of
        later tasks are corrected by the same factor."""
        keep = 1 - 1 / LEARNED_LENGTHS
        self._true_lengths = keep * self._true_lengths + output_tokens
        self._predicted_lengths = keep * self._predicted_lengths + _decode_tokens(task)

    def held(self, now: Iterations) -> float:
        """Tokens that the tasks in flight hold now."""
        return self._scale * (self._base + self._rate * now)

    def peak(self, now: Iterations) -> float:
        """The most tokens that the tasks in flight will hold at one time from now on."""
        self._prolong(now)
        base, rate = self._base, self._rate
        peak = base + rate * now
        for growth in self._by_end:
            peak = max(peak, base + rate * growth.end)
            base, rate = base - growth.base, rate - growth.rate
        return self._scale * peak

    def fits(self, now: Iterations, task: Task, room: float) -> bool:
        """Whether the tasks in flight, and `task`, if it began now, will at no time hold more than `room` tokens."""
        self._prolong(now)
        room /= self._scale
        end_of_new, _, base_of_new, rate_of_new, _, _ = self._begin(now, task)
        base, rate = self._base + base_of_new, self._rate + rate_of_new
        if base + rate * now > room:
            return False
        last = max(end_of_new, self._by_end[-1].end) if self._by_end else end_of_new
        if base + rate * last <= room:  # even if nothing ended before that
            return True
        for end, _, base_of_ended, rate_of_ended, _, _ in self._by_end:
            if end > end_of_new:
                if base + rate * end_of_new > room:
                    return False
                base, rate = base - base_of_new, rate - rate_of_new
                end_of_new = math.inf
            if base + rate * end > room:
                return False
            base -= base_of_ended
            rate -= rate_of_ended
        return end_of_new == math.inf or base + rate * end_of_new <= room

    def _prolong(self, now: Iterations) -> None:
        """Move the ends that have passed."""
        while self._by_end and self._by_end[0].end <= now:
            growth = self._by_end[0]
            self.remove(growth.task_id)
            self._put(growth._replace(end=now + max(1.0, OUTLIVED * (now - growth.began))))

    def _put(self, growth: _Growth) -> None:
        self._by_id[growth.task_id] = growth
        insort(self._by_end, growth)
        self._base += growth.base
        self._rate += growth.rate

    def _begin(self, now: Iterations, task: Task) -> _Growth:
        lengths = self._true_lengths / self._predicted_lengths
        iterations = max(1.0, _decode_tokens(task) / task.sequences * lengths)
        return _growth(now + iterations, task.id, now, task.prompt_tokens, float(task.sequences))


def _growth(end: float, task_id: TaskId, began: float, prompt_tokens: float, rate: float) -> _Growth:
    return _Growth(end, task_id, prompt_tokens - rate * began, rate, began, prompt_tokens)


def _decode_tokens(task: Task) -> float:
    return max(0.0, task.memory_tokens - task.prompt_tokens)
