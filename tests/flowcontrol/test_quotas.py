"""Counts, rates and days, by hand-worked cases and against sums of fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.quotas import DAY_S, DRAIN_WINDOW, MAX_RETRY_AFTER_S, DayTotal, Load, TokenBucket

S = 10**9
MINUTE = 60 * S


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
