"""The memory that is in flight: what it is now, and what it will be at its worst.

Each sequence at the engine holds one token more with each iteration, until it ends and gives back all. So with the lengths as
predicted, the memory held at any iteration to come is known; its peaks are where tasks end. A task j that began at s_j with
p_j tokens, grows by k_j an iteration (its sequences) and ends at e_j, holds p_j + k_j·(t − s_j) at iteration t < e_j, and at
t all tasks that have not ended hold

    Σ (p_j − k_j·s_j)  +  t · Σ k_j                                                                          [tokens]

A task that outlives its prediction is expected to go on for a share of what it has already done. The idea of admitting by
the peak to come is from Gong et al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import NamedTuple

from gateway.flowcontrol.fairqueue.types import Iterations, Task, TaskId

# More of what a task has done that has outlived its prediction: the mean residual of a heavy-tailed length.
OUTLIVED = 0.25
# Of how many of the engine's words on what it holds the mean is taken.
WORDS = 100
# Of how many ended tasks the lengths are compared with those predicted.
LENGTHS = 100
# Iterations, and tokens, by which a task may differ from what was reckoned before it is reckoned anew.
SLACK = 8.0


class _Growth(NamedTuple):
    """A tuple, since they are compared and walked for every decision: by end, and then by task."""

    end: float
    task_id: TaskId
    base: float  # what it would have held at iteration 0
    rate: float
    began: float
    prompt_tokens: float


class Forecast:
    """Tokens of KV, over iterations of the service clock."""

    def __init__(self) -> None:
        self._by_id: dict[TaskId, _Growth] = {}
        self._by_end: list[_Growth] = []
        self._base = 0.0  # sums over all
        self._rate = 0.0
        self._scale = 1.0  # what the engine really holds, over what was reckoned
        self._true_lengths = self._predicted_lengths = LENGTHS * 1.0  # sums, in which each task counts less with time

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, now: Iterations, task: Task) -> None:
        """A task begins."""
        self._put(self._begin(now, task))

    def remove(self, task_id: TaskId) -> None:
        growth = self._by_id.pop(task_id)
        del self._by_end[bisect_left(self._by_end, growth)]
        # Exactly zero when nothing is left, whatever rounding did.
        self._base = self._base - growth.base if self._by_id else 0.0
        self._rate = self._rate - growth.rate if self._by_id else 0.0

    def observe(self, now: Iterations, task_id: TaskId, kv_tokens: float, output_tokens: float) -> None:
        """The engine says what a task holds, and has produced: its prompt, and when it began to decode, follow."""
        growth = self._by_id[task_id]
        prompt_tokens = kv_tokens - output_tokens
        behind = now - output_tokens / growth.rate - growth.began
        if abs(behind) > SLACK or abs(prompt_tokens - growth.prompt_tokens) > SLACK:
            self.remove(task_id)
            began, end = growth.began + behind, growth.end + behind
            self._put(_growth(end, task_id, began, prompt_tokens, growth.rate))

    def calibrate(self, now: Iterations, held_tokens: float) -> None:
        """The engine says what it holds altogether: more than reckoned since blocks are not full, less since tasks share."""
        reckoned = self._base + self._rate * now
        if reckoned > 0 and 0 < held_tokens < math.inf:
            self._scale += (held_tokens / reckoned - self._scale) / WORDS

    def learn(self, task: Task, output_tokens: float) -> None:
        """A task has ended, with so many tokens. Where lengths are predicted too long on average, or too short, those of
        the tasks to come are taken to be so too."""
        keep = 1 - 1 / LENGTHS
        self._true_lengths = keep * self._true_lengths + output_tokens
        self._predicted_lengths = keep * self._predicted_lengths + _decode_tokens(task)

    def held(self, now: Iterations) -> float:
        """By what is in flight, now."""
        return self._scale * (self._base + self._rate * now)

    def peak(self, now: Iterations) -> float:
        """The most that will be held from now on by what is in flight."""
        self._prolong(now)
        base, rate = self._base, self._rate
        peak = base + rate * now
        for growth in self._by_end:
            peak = max(peak, base + rate * growth.end)
            base, rate = base - growth.base, rate - growth.rate
        return self._scale * peak

    def fits(self, now: Iterations, task: Task, room: float) -> bool:
        """Whether what is in flight, and `task`, if it began now, will at no time hold more than `room`."""
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
