"""Counts, rates and days, by hand-worked cases and against sums of fractions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.config.settings import TenantSettings
from gateway.flowcontrol import Now
from gateway.flowcontrol.quotas import (
    DAY_S,
    DRAIN_WINDOW,
    MAX_RETRY_AFTER_S,
    MIB,
    Account,
    DayTotal,
    Load,
    Quotas,
    TokenBucket,
)
from gateway.flowcontrol.records import TenantUsage, UsageRow
from gateway.protocol.errors import BodyTooLarge, GatewayError, QueueFull, QuotaSpent, Reason
from tests.flowcontrol.test_concurrency import has_room

S = 10**9
MINUTE = 60 * S
MIDNIGHT = datetime(2026, 10, 1, tzinfo=UTC).timestamp()
NOON = MIDNIGHT + 12 * 3600


def test_a_bucket_holds_a_minutes_worth_and_fills_evenly() -> None:
    bucket = TokenBucket(60, 0)
    bucket.spend(0, 59)
    assert bucket.opens_in_s(0) == 0
    bucket.spend(0, 1)
    assert bucket.opens_in_s(0) == 1, "empty is not open"
    assert bucket.opens_in_s(1) == 0, "a nanosecond's worth is something"
    bucket.spend(10 * MINUTE, 60)
    assert bucket.opens_in_s(10 * MINUTE) == 1, "never more than a minute's worth"


def test_what_is_overdrawn_has_to_be_made_up_for() -> None:
    bucket = TokenBucket(60, 0)
    bucket.spend(0, 60 + 120)
    assert bucket.opens_in_s(0) == 121
    assert bucket.opens_in_s(60 * S) == 61
    assert bucket.opens_in_s(120 * S) == 1
    assert bucket.opens_in_s(120 * S + 1) == 0


def test_a_fraction_of_a_second_is_a_whole_one() -> None:
    bucket = TokenBucket(1000, 0)
    bucket.spend(0, 1001)
    assert bucket.opens_in_s(0) == 1  # 0.06 s
    bucket.spend(0, 100)
    assert bucket.opens_in_s(0) == 7  # 6.06 s


def test_without_a_rate_it_is_open_and_with_one_it_begins_full() -> None:
    bucket = TokenBucket(None, 0)
    bucket.spend(0, 10**12)
    assert bucket.opens_in_s(0) == 0
    bucket.set_rate(S, 60)
    bucket.spend(S, 59)
    assert bucket.opens_in_s(S) == 0
    bucket.set_rate(S, None)
    bucket.spend(S, 10**6)
    assert bucket.opens_in_s(S) == 0


def test_another_rate_keeps_what_was_overdrawn() -> None:
    bucket = TokenBucket(60, 0)
    bucket.spend(0, 120)
    bucket.set_rate(0, 600)
    assert bucket.opens_in_s(0) == 7
    bucket.set_rate(0, 6)
    assert bucket.opens_in_s(0) == 601
    full = TokenBucket(600, 0)
    full.set_rate(0, 60)
    full.spend(0, 60)
    assert full.opens_in_s(0) == 1, "no more than a minute's worth of the new rate"


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(60, 5 * MINUTE)
    bucket.spend(5 * MINUTE, 60)
    assert bucket.opens_in_s(4 * MINUTE) == 1
    assert bucket.opens_in_s(5 * MINUTE) == 1


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.integers(0, 3 * MINUTE), st.integers(0, 10**6)), max_size=30),
)
def test_it_agrees_with_fractions(per_minute: int, steps: list[tuple[int, int]]) -> None:
    bucket, now = TokenBucket(per_minute, 0), 0
    level = full = Fraction(per_minute)
    for passed, tokens in steps:
        now += passed
        level = min(full, level + Fraction(passed * per_minute, MINUTE)) - tokens
        bucket.spend(now, tokens)
        opens = bucket.opens_in_s(now)
        assert (opens == 0) == (level > 0)
        if opens:
            rate = Fraction(per_minute, 60)
            assert level + opens * rate > 0 >= level + (opens - 1) * rate, "not a second sooner, not one later"


def test_a_day_begins_anew_at_midnight_in_utc() -> None:
    total = DayTotal()
    noon = 20_000 * DAY_S + DAY_S // 2
    total.add(noon, 5.0)
    total.add(noon + 1, 2.5)
    assert total.used(noon + 2) == 7.5
    assert total.used(20_001 * DAY_S - 1e-3) == 7.5
    assert total.used(20_001 * DAY_S) == 0.0
    assert DayTotal.begins_anew_in_s(noon) == DAY_S // 2
    assert DayTotal.begins_anew_in_s(20_001 * DAY_S - 0.001) == 1
    assert DayTotal.begins_anew_in_s(20_001 * DAY_S) == DAY_S
    assert DayTotal.begins_anew_in_s(noon + 0.5) == DAY_S // 2


def test_a_correction_after_midnight_finds_nothing_to_take_back() -> None:
    total = DayTotal()
    total.add(0.0, 5.0)
    total.add(0.0, -2.0)
    assert total.used(0.0) == 3.0
    total.add(DAY_S, -2.0)
    assert total.used(DAY_S) == 0.0


def test_a_clock_that_is_set_back_is_another_day() -> None:
    total = DayTotal()
    total.add(400 * DAY_S, 5.0)
    assert total.used(10 * DAY_S) == 0.0, "or a quota could be spent for a year"


@pytest.mark.parametrize(
    "refused",
    [
        lambda load, bucket, total: load.released(0),
        lambda load, bucket, total: load.requeued(0),
        lambda load, bucket, total: load.left(0, 0, waiting=True),
        lambda load, bucket, total: load.left(0, 0, waiting=False),
        lambda load, bucket, total: load.enter(-1),
        lambda load, bucket, total: bucket.spend(0, -1),
        lambda load, bucket, total: total.add(0, float("nan")),
        lambda load, bucket, total: total.add(0, float("inf")),
    ],
)
def test_what_cannot_be_is_refused(refused) -> None:  # type: ignore[no-untyped-def]
    load, bucket, total = Load(), TokenBucket(1, 0), DayTotal()
    with pytest.raises(ValueError, match=r"."):
        refused(load, bucket, total)
    assert (load.waiting, load.in_flight, load.waiting_bytes) == (0, 0, 0)
    assert bucket.opens_in_s(0) == 0
    assert total.used(0) == 0


def test_more_bytes_than_wait_cannot_leave() -> None:
    load = Load()
    load.enter(10)
    for act in (load.released, lambda size: load.left(0, size, waiting=True)):
        with pytest.raises(ValueError, match="no task with 11 bytes"):
            act(11)
    assert (load.waiting, load.waiting_bytes) == (1, 10)


def ended(times: list[int]) -> Load:
    load = Load()
    for at in times:
        load.enter(0)
        load.released(0)
        load.left(at, 0, waiting=False)
    return load


def test_when_to_come_again_follows_the_last_ends() -> None:
    assert Load().retry_after_s(0, 5) == MAX_RETRY_AFTER_S, "there is nothing to go by"
    assert ended([0]).retry_after_s(S, 5) == MAX_RETRY_AFTER_S
    load = ended([0, S, 2 * S, 3 * S])
    assert load.retry_after_s(4 * S, 5) == 5, "one a second"
    assert load.retry_after_s(4 * S, 1) == 1
    assert load.retry_after_s(4 * S, 100) == MAX_RETRY_AFTER_S
    assert load.retry_after_s(8 * S, 5) == 10, "and it becomes later while none ends"
    assert ended([0] * 10).retry_after_s(0, 1) == 1, "at least one second"
    slow = ended([0, *range(1000 * S, (1000 + DRAIN_WINDOW - 1) * S, S)])
    slow_and_one = ended([0, *range(1000 * S, (1000 + DRAIN_WINDOW) * S, S)])
    assert slow.retry_after_s(1064 * S, 1) == 17
    assert slow_and_one.retry_after_s(1064 * S, 10) == 10, "only the last ends count"


def test_who_gives_up_waiting_says_nothing_of_the_rate() -> None:
    load = Load()
    for _ in range(10):
        load.enter(0)
        load.left(0, 0, waiting=True)
    assert load.retry_after_s(S, 1) == MAX_RETRY_AFTER_S


# Of tenants, and of all together


class Books:
    """Quotas, and both clocks, moved by hand."""

    def __init__(self, *, max_waiting: int = 1000, max_waiting_bytes: int = 2**30, **limits: TenantSettings) -> None:
        self.now = Now(5 * S, NOON)
        self.quotas = Quotas(max_waiting, max_waiting_bytes)
        self.limits = limits

    @property
    def limits(self) -> dict[str, TenantSettings]:
        return self._limits

    @limits.setter
    def limits(self, limits: dict[str, TenantSettings]) -> None:
        self._limits = limits
        self.quotas.set_limits(self.now, limits)

    def passes(self, seconds: float) -> None:
        self.now = Now(self.now.ns + int(seconds * S), self.now.wall_s + seconds)

    def account(self, name: str) -> Account:
        return self.quotas.account(name, self.now.ns)

    def enter(self, name: str, body_bytes: int) -> None:
        """As flow control does. Raises what `Quotas.check` raises."""
        self.quotas.check(self.now, self.account(name), body_bytes)
        self.quotas.enter(self.account(name), body_bytes)

    def refused(self, name: str, body_bytes: int = 10) -> GatewayError:
        before = self.counts(name)
        with pytest.raises(GatewayError) as error:
            self.enter(name, body_bytes)
        assert self.counts(name) == before
        return error.value

    def released(self, name: str, body_bytes: int) -> None:
        self.quotas.released(self.account(name), body_bytes)

    def requeued(self, name: str, body_bytes: int) -> None:
        self.quotas.requeued(self.account(name), body_bytes)

    def left(self, name: str, body_bytes: int, *, waiting: bool) -> None:
        self.quotas.left(self.now, self.account(name), body_bytes, waiting=waiting)

    def charge(self, name: str, used: TenantUsage) -> UsageRow:
        return self.quotas.charge(self.now, self.account(name), used)

    def counts(self, name: str) -> list[tuple[int, int, int]]:
        loads = self.quotas.load, self.account(name).load
        return [(load.waiting, load.in_flight, load.waiting_bytes) for load in loads]


def test_tasks_at_once() -> None:
    books = Books(red=TenantSettings(max_tasks=2))
    books.enter("red", 10)
    books.released("red", 10)
    books.enter("red", 10)
    error = books.refused("red")
    assert isinstance(error, QueueFull)
    assert (error.status, error.reason, error.retry_after_s) == (429, Reason.TASKS, 30)
    assert error.message == "tenant red already has 2 of at most 2 tasks at once (max_tasks)"
    books.enter("blue", 10)
    books.left("red", 10, waiting=False)
    books.enter("red", 10)


def test_tasks_waiting_of_one_and_of_all() -> None:
    books = Books(max_waiting=3, red=TenantSettings(max_waiting=2))
    books.enter("red", 10)
    books.enter("red", 10)
    error = books.refused("red")
    assert (error.reason, error.code) == (Reason.TENANT_QUEUE_FULL, "queue_full")
    assert error.message == "tenant red already has 2 of at most 2 waiting tasks (max_waiting)"
    books.enter("blue", 10)
    error = books.refused("blue")
    assert (error.reason, error.message) == (
        Reason.QUEUE_FULL,
        "the queue is full: 3 tasks wait, of at most 3 (max_waiting), and tenant blue has its share of them",
    )
    books.released("red", 10)
    books.enter("blue", 10)
    books.requeued("red", 10)
    assert books.quotas.load.waiting == 4, "what was let in once is not thrown out"
    assert books.refused("blue").reason == Reason.QUEUE_FULL


def test_bytes_that_wait_of_one_and_of_all() -> None:
    books = Books(max_waiting_bytes=3 * MIB, red=TenantSettings(max_waiting_mib=2))
    books.enter("red", 2 * MIB)
    error = books.refused("red", 1)
    assert (error.reason, error.status) == (Reason.BYTES, 429)
    assert "1 more exceed its 2 MiB (max_waiting_mib)" in error.message
    books.released("red", 2 * MIB)
    books.enter("red", MIB)
    books.enter("blue", 2 * MIB)
    error = books.refused("blue", 1)
    assert "1 more exceed the 3 MiB of all tenants (max_waiting_mib)" in error.message


def test_a_body_that_could_never_wait_is_not_to_come_again() -> None:
    books = Books(max_waiting=1, max_waiting_bytes=3 * MIB, red=TenantSettings(max_waiting_mib=2))
    for name, size in (("red", 2 * MIB + 1), ("blue", 3 * MIB + 1)):
        error = books.refused(name, size)
        assert isinstance(error, BodyTooLarge) and (error.status, error.retry_after_s) == (413, None)


def test_when_to_come_again_is_by_the_tenants_own_rate() -> None:
    books = Books(red=TenantSettings(max_waiting=4), blue=TenantSettings(max_waiting=4))
    for name, every_s in (("red", 1), ("blue", 3)):
        for _ in range(4):
            books.passes(every_s)
            books.enter(name, 0)
            books.released(name, 0)
            books.left(name, 0, waiting=False)
        for _ in range(4):
            books.enter(name, 0)
        assert books.refused(name).retry_after_s == {"red": 3, "blue": 9}[name]


def test_tokens_a_minute_are_charged_at_the_end_and_made_up_for() -> None:
    books = Books(red=TenantSettings(tokens_per_minute=600))
    books.enter("red", 0)
    books.enter("red", 0)
    books.charge("red", TenantUsage(1, prompt_tokens=1000, cached_tokens=900, completion_tokens=499))
    books.enter("red", 0)
    books.charge("red", TenantUsage(1, completion_tokens=101))
    error = books.refused("red")
    assert isinstance(error, QuotaSpent)
    assert (error.status, error.reason, error.retry_after_s) == (429, Reason.TOKENS_PER_MINUTE, 11)
    assert error.message == "tenant red has used its 600 tokens a minute (tokens_per_minute), for the next 11 s"
    assert error.headers() == {"retry-after": "11"}
    books.enter("blue", 0)
    books.passes(10)
    assert books.refused("red").retry_after_s == 1
    books.passes(1)
    books.enter("red", 0)


def test_kv_of_a_day_until_midnight() -> None:
    books = Books(red=TenantSettings(kv_per_day=5e9))
    books.charge("red", TenantUsage(1, kv_cost=5e9 - 1))
    books.enter("red", 0)
    books.charge("red", TenantUsage(kv_cost=1))
    error = books.refused("red")
    assert (error.reason, error.retry_after_s) == (Reason.KV_PER_DAY, 12 * 3600)
    assert error.message == "tenant red has used its 5e+09 KV token·iterations of today, in UTC (kv_per_day)"
    books.charge("red", TenantUsage(kv_cost=-1))
    books.enter("red", 0)
    books.charge("red", TenantUsage(kv_cost=1))
    books.passes(12 * 3600 - 0.5)
    assert books.refused("red").retry_after_s == 1
    books.passes(0.5)
    books.enter("red", 0)


def test_one_tenant_leaves_room_in_the_queue_for_another() -> None:
    books = Books(max_waiting=8, max_waiting_bytes=80, red=TenantSettings(), blue=TenantSettings())
    for _ in range(6):
        books.enter("red", 1)
    assert books.refused("red", 1).reason == Reason.QUEUE_FULL
    for _ in range(2):
        books.enter("blue", 1)
    assert books.refused("blue", 1).reason == Reason.QUEUE_FULL
    for _ in range(6):
        books.released("red", 1)
    books.enter("red", 60)
    assert books.refused("red", 1).reason == Reason.BYTES
    books.enter("blue", 18)


def test_the_rooms_of_the_queue_follow_the_weights() -> None:
    books = Books(max_waiting=8, red=TenantSettings(weight=3), blue=TenantSettings())
    for _ in range(7):
        books.enter("red", 0)
    assert books.refused("red", 0).reason == Reason.QUEUE_FULL
    books.enter("blue", 0)
    books.limits = {"red": TenantSettings(), "blue": TenantSettings(weight=3)}
    for _ in range(2):
        books.enter("blue", 0)  # its share is three now, whatever is there of the other
    assert books.refused("blue", 0).reason == Reason.QUEUE_FULL


def test_a_tenant_that_is_gone_is_kept_no_room() -> None:
    books = Books(max_waiting=8, red=TenantSettings(), blue=TenantSettings())
    books.enter("blue", 0)
    books.limits = {"red": TenantSettings()}
    for _ in range(6):
        books.enter("red", 0)
    assert books.refused("red", 0).reason == Reason.QUEUE_FULL, "what it still has counts"
    books.left("blue", 0, waiting=True)
    for _ in range(2):
        books.enter("red", 0)


def test_other_limits_keep_what_is_there_and_what_was_used() -> None:
    books = Books(red=TenantSettings(tokens_per_minute=60, max_tasks=2))
    red = books.account("red")
    books.enter("red", 1)
    books.charge("red", TenantUsage(1, completion_tokens=120, kv_cost=7))
    books.limits = {"red": TenantSettings(tokens_per_minute=120, max_tasks=1, kv_per_day=7)}
    assert books.account("red") is red
    assert (red.load.tasks, red.limits.max_tasks) == (1, 1)
    assert red.tokens.opens_in_s(books.now.ns) == 31, "60 overdrawn, and 2 a second now"
    assert red.kv_today.used(books.now.wall_s) == 7
    assert books.refused("red").reason == Reason.KV_PER_DAY
    books.limits = {}
    books.enter("red", 10)  # a tenant that the settings do not name has no limits


def test_the_books_of_the_hour() -> None:
    books = Books()
    books.passes(1800)
    row = books.charge("red", TenantUsage(1, 100, 40, 20, 5.5))
    assert row == UsageRow("red", int(MIDNIGHT) + 12 * 3600, 1, 100, 40, 20, 5.5)


def test_after_a_restart_todays_use_counts() -> None:
    books = Books(red=TenantSettings(kv_per_day=10))
    hour = int(MIDNIGHT)
    books.quotas.restore(
        books.now,
        [
            UsageRow("red", hour - 3600, kv_cost=100),
            UsageRow("red", hour, kv_cost=4),
            UsageRow("red", hour + 3600, kv_cost=5),
            UsageRow("blue", hour, kv_cost=50),
        ],
    )
    books.enter("red", 0)
    books.charge("red", TenantUsage(1, kv_cost=1))
    assert books.refused("red").reason == Reason.KV_PER_DAY
    books.enter("blue", 0)


# Whatever happens


NAMES = ("red", "blue", "green")


class QuotasMachine(RuleBasedStateMachine):
    """What enters leaves, nothing is counted below zero, and no task is let in above a limit, nor kept out below it."""

    @initialize(
        max_waiting=st.integers(1, 6),
        max_bytes=st.integers(1, 40),
        limits=st.tuples(*(st.tuples(*[st.none() | st.integers(1, 6)] * 3) for _ in NAMES)),
        rates=st.tuples(*(st.none() | st.integers(1, 200) for _ in NAMES)),
        days=st.tuples(*(st.none() | st.integers(1, 500) for _ in NAMES)),
        weights=st.tuples(*(st.sampled_from([0.3, 1.0, 2.0]) for _ in NAMES)),
    )
    def begin(  # type: ignore[type-arg]
        self, max_waiting: int, max_bytes: int, limits: tuple, rates: tuple, days: tuple, weights: tuple
    ) -> None:
        self.max_waiting, self.max_bytes = max_waiting, max_bytes
        self.limits = dict(zip(NAMES, limits, strict=True))
        self.rates = dict(zip(NAMES, rates, strict=True))
        self.days = dict(zip(NAMES, days, strict=True))
        self.weights = dict(zip(NAMES, weights, strict=True))
        self.books = Books(max_waiting=max_waiting, max_waiting_bytes=max_bytes, **self.settings())
        self.waiting: list[tuple[str, int]] = []
        self.in_flight: list[tuple[str, int]] = []
        self.levels = {name: Fraction(rate or 0) for name, rate in self.rates.items()}
        self.used: list[tuple[float, str, float]] = []

    def settings(self) -> dict[str, TenantSettings]:
        return {
            name: TenantSettings(
                weight=self.weights[name],
                max_tasks=tasks,
                max_waiting=waiting,
                max_waiting_mib=None if size is None else 8 * size / MIB,
                tokens_per_minute=self.rates[name],
                kv_per_day=self.days[name],
            )
            for name, (tasks, waiting, size) in self.limits.items()
        }

    def has_room(self, limit: int, name: str, more: int, amount: Callable[[int], int]) -> bool:
        """By the rule for bounds that are shared. Its own test holds `has_room` to what it promises."""
        held = [sum(amount(size) for whose, size in self.waiting if whose == each) for each in NAMES]
        return has_room(limit, list(self.weights.values()), held, NAMES.index(name), more)

    def why_not(self, name: str, size: int) -> set[Reason | None]:
        """All that speaks against a task; None: it could never get in."""
        tasks, waiting, most = self.limits[name]
        mine = [body for whose, body in self.waiting if whose == name]
        in_flight = sum(whose == name for whose, _ in self.in_flight)
        day = self.books.now.wall_s // DAY_S
        used = sum(cost for at, whose, cost in self.used if whose == name and at // DAY_S == day)
        against: dict[Reason | None, bool] = {
            Reason.TASKS: tasks is not None and len(mine) + in_flight >= tasks,
            Reason.TENANT_QUEUE_FULL: waiting is not None and len(mine) >= waiting,
            Reason.QUEUE_FULL: not self.has_room(self.max_waiting, name, 1, lambda size: 1),
            Reason.BYTES: (most is not None and sum(mine) + size > 8 * most)
            or not self.has_room(self.max_bytes, name, size, lambda size: size),
            None: (most is not None and size > 8 * most) or size > self.max_bytes,
            Reason.TOKENS_PER_MINUTE: self.rates[name] is not None and self.levels[name] <= 0,
            Reason.KV_PER_DAY: self.days[name] is not None and used >= self.days[name],
        }
        return {reason for reason, holds in against.items() if holds}

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 50))
    def enter(self, name: str, size: int) -> None:
        against, error = self.why_not(name, size), None
        try:
            self.books.enter(name, size)
        except GatewayError as refused:
            error = refused
        if error is None:
            assert not against
            self.waiting.append((name, size))
        elif isinstance(error, BodyTooLarge):
            assert None in against
        else:
            assert error.reason in against
            assert error.retry_after_s is not None and error.retry_after_s >= 1
            assert isinstance(error, QuotaSpent) or error.retry_after_s <= 30

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        task = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.books.released(task[0], task[1])
        self.in_flight.append(task)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        task = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.books.requeued(task[0], task[1])
        self.waiting.append(task)

    @precondition(lambda self: self.waiting or self.in_flight)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.waiting) + len(self.in_flight) - 1))
        waits = place < len(self.waiting)
        name, size = self.waiting.pop(place) if waits else self.in_flight.pop(place - len(self.waiting))
        self.books.left(name, size, waiting=waits)

    @rule(
        name=st.sampled_from(NAMES),
        prompt=st.integers(0, 100),
        cached=st.integers(0, 100),
        answer=st.integers(0, 100),
        cost=st.integers(0, 200),
    )
    def charge(self, name: str, prompt: int, cached: int, answer: int, cost: int) -> None:
        cached = min(cached, prompt)
        row = self.books.charge(name, TenantUsage(1, prompt, cached, answer, cost))
        assert row.hour <= self.books.now.wall_s < row.hour + 3600
        self.levels[name] -= prompt - cached + answer
        self.used.append((self.books.now.wall_s, name, cost))

    @rule(seconds=st.integers(0, 90) | st.sampled_from([3600, 7 * 3600, 86_400]))
    def time_passes(self, seconds: int) -> None:
        self.books.passes(seconds)
        for name, rate in self.rates.items():
            if rate is not None:
                self.levels[name] = min(Fraction(rate), self.levels[name] + Fraction(rate * seconds, 60))

    @rule(name=st.sampled_from(NAMES), limits=st.tuples(*[st.none() | st.integers(1, 6)] * 3))
    def reload(self, name: str, limits: tuple) -> None:  # type: ignore[type-arg]
        self.limits[name] = limits
        self.books.limits = self.settings()

    @rule(name=st.sampled_from(NAMES))
    def a_call_that_cannot_be_changes_nothing(self, name: str) -> None:
        for call in (
            lambda: self.books.released(name, 10_000),
            lambda: self.books.left(name, 10_000, waiting=True),
        ):
            with pytest.raises(ValueError, match="no task with 10000 bytes"):
                call()

    @invariant()
    def counts_are_what_is_there(self) -> None:
        for name in (None, *NAMES):
            load = self.books.quotas.load if name is None else self.books.account(name).load
            mine = [size for whose, size in self.waiting if name in (None, whose)]
            assert load.waiting == len(mine) >= 0
            assert load.waiting_bytes == sum(mine) >= 0
            assert load.in_flight == sum(name in (None, whose) for whose, _ in self.in_flight)

    def teardown(self) -> None:
        """All that entered can leave."""
        if not hasattr(self, "books"):
            return
        for tasks, waits in ((self.waiting, True), (self.in_flight, False)):
            while tasks:
                name, size = tasks.pop()
                self.books.left(name, size, waiting=waits)
        self.counts_are_what_is_there()


TestQuotasMachine = QuotasMachine.TestCase
TestQuotasMachine.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
