"""What may be in the queue at once, and what may be used: exact counts, by tenant and of all together.

Nanoseconds are of a monotonic clock, seconds since 1970 of the wall clock. A call that cannot be right raises an error, and
nothing has changed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import msgspec

from gateway.flowcontrol.concurrency import Part, fits
from gateway.flowcontrol.effects import Now
from gateway.flowcontrol.records import TenantUsage, UsageRow, hour_of
from gateway.protocol.errors import BodyTooLarge, QueueFull, QuotaSpent, Reason

MAX_RETRY_AFTER_S = 30
# Tasks over whose ends the drain rate is taken.
DRAIN_WINDOW = 64

MIB = 2**20
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


class Limits(Protocol):
    """What a tenant may have; None for no limit of its own."""

    @property
    def weight(self) -> float: ...
    @property
    def max_tasks(self) -> int | None: ...
    @property
    def max_waiting(self) -> int | None: ...
    @property
    def max_waiting_mib(self) -> float | None: ...
    @property
    def max_queue_s(self) -> float | None: ...
    @property
    def tokens_per_minute(self) -> int | None: ...
    @property
    def kv_per_day(self) -> float | None: ...


class NoLimits(msgspec.Struct, frozen=True):
    """Of a tenant that the settings do not name."""

    weight: float = 1.0
    max_tasks: int | None = None
    max_waiting: int | None = None
    max_waiting_mib: float | None = None
    max_queue_s: float | None = None
    tokens_per_minute: int | None = None
    kv_per_day: float | None = None


NO_LIMITS = NoLimits()


class Account:
    """What a tenant has in the queue and at the engine, and what it has used."""

    def __init__(self, name: str, limits: Limits, now_ns: int) -> None:
        self.name = name
        self.limits = limits  # as of the last change of settings
        self.load = Load()
        self.tokens = TokenBucket(limits.tokens_per_minute, now_ns)
        self.kv_today = DayTotal()


class Quotas:
    """The accounts of all tenants, and the bounds of the queue, which they share as `concurrency` says."""

    def __init__(self, max_waiting: int, max_waiting_bytes: int) -> None:
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self.load = Load()  # of all tenants
        self._limits: Mapping[str, Limits] = {}
        self._accounts: dict[str, Account] = {}

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def account(self, name: str, now_ns: int) -> Account:
        """The tenant's account, with the limits of the settings or none."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name, self._limits.get(name, NO_LIMITS), now_ns)
        return account

    def set_limits(self, now: Now, limits: Mapping[str, Limits]) -> None:
        """Other limits from now on. What is there stays, and what was used is not forgotten. limits: of every known tenant."""
        self._limits = limits
        for name in limits:
            self.account(name, now.ns)
        for account in self:
            account.limits = limits.get(account.name, NO_LIMITS)
            account.tokens.set_rate(now.ns, account.limits.tokens_per_minute)

    def check(self, now: Now, account: Account, body_bytes: int) -> None:
        """Whether a task may come to wait. Raises `QueueFull`, `QuotaSpent`, or `BodyTooLarge` for one that never may."""
        self._check_use(now, account)
        self._check_tasks(now, account)
        self._check_bytes(now, account, body_bytes)

    def enter(self, account: Account, body_bytes: int) -> None:
        """A task waits."""
        self.load.enter(body_bytes)
        account.load.enter(body_bytes)

    def released(self, account: Account, body_bytes: int) -> None:
        """A task that waited is in flight."""
        self.load.released(body_bytes)
        account.load.released(body_bytes)

    def requeued(self, account: Account, body_bytes: int) -> None:
        """A task in flight waits again, whatever the limits: it was let in once."""
        self.load.requeued(body_bytes)
        account.load.requeued(body_bytes)

    def left(self, now: Now, account: Account, body_bytes: int, *, waiting: bool) -> None:
        """A task was settled. waiting: it was not in flight."""
        self.load.left(now.ns, body_bytes, waiting=waiting)
        account.load.left(now.ns, body_bytes, waiting=waiting)

    def charge(self, now: Now, account: Account, used: TenantUsage) -> UsageRow:
        """Counts what a task has used; or the difference, which may be negative, of one whose cost has become known. Returns
        what is to be added to this hour. Cached tokens were not computed, and are no part of `tokens_per_minute`."""
        computed = max(0, used.prompt_tokens - used.cached_tokens) + used.completion_tokens
        account.tokens.spend(now.ns, computed)
        account.kv_today.add(now.wall_s, used.kv_cost)
        tokens = used.prompt_tokens, used.cached_tokens, used.completion_tokens
        return UsageRow(account.name, hour_of(now.wall_s), used.requests, *tokens, used.kv_cost)

    def restore(self, now: Now, rows: Iterable[UsageRow]) -> None:
        """After a start, once: what was used before it. Only today's counts, for the quota of a day; a minute begins full."""
        midnight = now.wall_s - now.wall_s % DAY_S
        for row in rows:
            if row.hour >= midnight:
                self.account(row.tenant, now.ns).kv_today.add(now.wall_s, row.kv_cost)

    def _check_use(self, now: Now, account: Account) -> None:
        limits = account.limits
        if limits.kv_per_day is not None and account.kv_today.used(now.wall_s) >= limits.kv_per_day:
            raise QuotaSpent(
                f"tenant {account.name} has used its {limits.kv_per_day:g} KV token·iterations of today, in UTC (kv_per_day)",
                retry_after_s=DayTotal.begins_anew_in_s(now.wall_s),
                reason=Reason.KV_PER_DAY,
            )
        if (opens_in_s := account.tokens.opens_in_s(now.ns)) > 0:
            raise QuotaSpent(
                f"tenant {account.name} has used its {limits.tokens_per_minute} tokens a minute (tokens_per_minute),"
                f" for the next {opens_in_s} s",
                retry_after_s=opens_in_s,
                reason=Reason.TOKENS_PER_MINUTE,
            )

    def _check_tasks(self, now: Now, account: Account) -> None:
        limits, load = account.limits, account.load
        if limits.max_tasks is not None and load.tasks >= limits.max_tasks:
            raise QueueFull(
                f"tenant {account.name} already has {load.tasks} of at most {limits.max_tasks} tasks at once (max_tasks)",
                retry_after_s=load.retry_after_s(now.ns, load.tasks),
                reason=Reason.TASKS,
            )
        if limits.max_waiting is not None and load.waiting >= limits.max_waiting:
            raise QueueFull(
                f"tenant {account.name} already has {load.waiting} of at most {limits.max_waiting} waiting tasks (max_waiting)",
                retry_after_s=load.retry_after_s(now.ns, load.waiting),
                reason=Reason.TENANT_QUEUE_FULL,
            )
        if not self._fits(account, 1, self.max_waiting, lambda load: load.waiting):
            raise QueueFull(
                f"the queue is full: {self.load.waiting} tasks wait, of at most {self.max_waiting} (max_waiting), and tenant"
                f" {account.name} has its share of them",
                retry_after_s=self.load.retry_after_s(now.ns, self.load.waiting),
                reason=Reason.QUEUE_FULL,
            )

    def _check_bytes(self, now: Now, account: Account, body_bytes: int) -> None:
        mib, load = account.limits.max_waiting_mib, account.load
        if mib is not None:
            limit = int(mib * MIB)
            if body_bytes > limit:
                raise BodyTooLarge(
                    f"a request body of {body_bytes} bytes exceeds the {mib:g} MiB that may wait of tenant {account.name}"
                    " (max_waiting_mib)"
                )
            if load.waiting_bytes + body_bytes > limit:
                raise QueueFull(
                    f"request bodies of {load.waiting_bytes} bytes of tenant {account.name} wait already; {body_bytes} more"
                    f" exceed its {mib:g} MiB (max_waiting_mib)",
                    retry_after_s=load.retry_after_s(now.ns, load.waiting),
                    reason=Reason.BYTES,
                )
        most = self.max_waiting_bytes
        if body_bytes > most:
            raise BodyTooLarge(
                f"a request body of {body_bytes} bytes exceeds the {most / MIB:g} MiB that may wait in all (max_waiting_mib)"
            )
        if not self._fits(account, body_bytes, most, lambda load: load.waiting_bytes):
            raise QueueFull(
                f"request bodies of {self.load.waiting_bytes} bytes wait already; {body_bytes} more exceed the"
                f" {most / MIB:g} MiB of all tenants (max_waiting_mib), or what other tenants are kept of them",
                retry_after_s=self.load.retry_after_s(now.ns, self.load.waiting),
                reason=Reason.BYTES,
            )

    def _fits(self, account: Account, more: int, limit: int, amount: Callable[[Load], int]) -> bool:
        """Whether the tenant may have so much more of a bound of all tenants. amount: what a load has of it."""
        if 2 * (amount(self.load) + more) <= limit:
            return True
        mine = Part(amount(account.load), account.limits.weight)
        others = (Part(amount(each.load), each.limits.weight) for each in self if each is not account)
        # A tenant that is not known any more is kept no room, once nothing of it is here.
        known = (each for each in self if each.name in self._limits or each.load.tasks)
        return fits(limit, more, mine, others, sum(each.limits.weight for each in known))
