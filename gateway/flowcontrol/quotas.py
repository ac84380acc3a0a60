"""What may be in the queue at once, and what may be used: exact counts, and no clock.

Nanoseconds are of a monotonic clock, seconds since 1970 of the wall's. A call that cannot be right raises `ValueError`, and
nothing has changed.
"""

from __future__ import annotations

import math
from collections import deque

MAX_RETRY_AFTER_S = 30
# Tasks over whose ends the drain rate is taken.
DRAIN_WINDOW = 64

_SECOND_NS = 10**9
_MINUTE_NS = 60 * _SECOND_NS
DAY_S = 86_400


class Load:
    """What is there of a tenant's, or of all: tasks that wait, with the bytes of their bodies, and tasks in flight."""

    def __init__(self) -> None:
        self.waiting = 0
        self.in_flight = 0
        self.waiting_bytes = 0
        self._ends: deque[int] = deque(maxlen=DRAIN_WINDOW)

    @property
    def tasks(self) -> int:
        return self.waiting + self.in_flight

    def enter(self, body_bytes: int) -> None:
        if body_bytes < 0:
            raise ValueError(f"a body of {body_bytes} bytes")
        self.waiting += 1
        self.waiting_bytes += body_bytes

    def released(self, body_bytes: int) -> None:
        self._check_waiting(body_bytes)
        self.waiting -= 1
        self.waiting_bytes -= body_bytes
        self.in_flight += 1

    def requeued(self, body_bytes: int) -> None:
        self._check_in_flight()
        self.in_flight -= 1
        self.enter(body_bytes)

    def left(self, now_ns: int, body_bytes: int, *, waiting: bool) -> None:
        """A task has ended, or was given up."""
        if waiting:
            self._check_waiting(body_bytes)
            self.waiting -= 1
            self.waiting_bytes -= body_bytes
        else:
            self._check_in_flight()
            self.in_flight -= 1
            self._ends.append(now_ns)

    def retry_after_s(self, now_ns: int, tasks: int) -> int:
        """Whole seconds until so many tasks should have ended, at the rate of the last ends; at most 30, which it is also
        while there is no rate to go by."""
        if len(self._ends) < 2:
            return MAX_RETRY_AFTER_S
        span_ns = max(now_ns - self._ends[0], _SECOND_NS // 1000)
        seconds = -(-tasks * span_ns // (len(self._ends) * _SECOND_NS))
        return max(1, min(MAX_RETRY_AFTER_S, seconds))

    def _check_waiting(self, body_bytes: int) -> None:
        if not (self.waiting > 0 and 0 <= body_bytes <= self.waiting_bytes):
            raise ValueError(f"no task with {body_bytes} bytes is waiting")

    def _check_in_flight(self) -> None:
        if self.in_flight <= 0:
            raise ValueError("no task is in flight")


class TokenBucket:
    """Tokens a minute. The bucket holds a minute's worth and fills evenly. What a task uses is known when it ends, so the
    bucket may be overdrawn; it is open while there is anything in it.

    It is no sliding window, since that would forget after a minute by how much it was overdrawn: with a bucket, a tenant
    comes to no more than its rate in the long run, however large its tasks are. And it is two numbers. They are whole, in
    token·nanoseconds (a token is as many as a minute has), so that nothing is lost to rounding.

    per_minute: None for no limit. It starts full.
    """

    def __init__(self, per_minute: int | None, now_ns: int) -> None:
        self._per_minute = per_minute
        self._level = (per_minute or 0) * _MINUTE_NS
        self._filled_ns = now_ns

    def set_rate(self, now_ns: int, per_minute: int | None) -> None:
        """What was overdrawn stays so; one that had no limit is full."""
        self._fill(now_ns)
        if per_minute is not None:
            full = per_minute * _MINUTE_NS
            self._level = full if self._per_minute is None else min(self._level, full)
        self._per_minute = per_minute

    def spend(self, now_ns: int, tokens: int) -> None:
        if tokens < 0:
            raise ValueError(f"{tokens} tokens cannot be spent")
        self._fill(now_ns)
        self._level -= tokens * _MINUTE_NS

    def opens_in_s(self, now_ns: int) -> int:
        """Whole seconds until there is anything in it; 0: now."""
        self._fill(now_ns)
        if self._per_minute is None or self._level > 0:
            return 0
        return -self._level // (self._per_minute * _SECOND_NS) + 1

    def _fill(self, now_ns: int) -> None:
        passed_ns = max(0, now_ns - self._filled_ns)
        self._filled_ns += passed_ns
        if self._per_minute is None:
            self._level = 0
        else:
            self._level = min(self._per_minute * _MINUTE_NS, self._level + passed_ns * self._per_minute)


class DayTotal:
    """What was used on a day, in UTC: it begins anew at midnight."""

    def __init__(self) -> None:
        self._day = 0
        self._used = 0.0

    def add(self, now_s: float, amount: float) -> None:
        """A correction may be negative; one that comes after midnight finds nothing to take back."""
        if not math.isfinite(amount):
            raise ValueError(f"{amount} cannot be used")
        self._used = max(0.0, self.used(now_s) + amount)

    def used(self, now_s: float) -> float:
        """So far. When the wall clock is set to another day, that is a new day too."""
        day = int(now_s // DAY_S)
        if day != self._day:
            self._day, self._used = day, 0.0
        return self._used

    @staticmethod
    def begins_anew_in_s(now_s: float) -> int:
        """Whole seconds until midnight in UTC."""
        return max(1, math.ceil(DAY_S - now_s % DAY_S))
