"""Who a request belongs to, what may come in, and what it is told when it may not."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from gateway.config.settings import TenantSettings
from gateway.flowcontrol.fairqueue import Iterations, ReleaseLimits
from gateway.flowcontrol.quotas import DAY_S
from gateway.flowcontrol.records import TenantUsage, UsageRow
from gateway.protocol.errors import (
    BodyTooLarge,
    Forbidden,
    GatewayError,
    QueueFull,
    QuotaSpent,
    Reason,
    Unauthorized,
)
from gateway.protocol.identify import DEFAULT_TENANT
from gateway.telemetry.metrics import MAX_TENANTS, Metrics
from gateway.tenancy.keys import Keys, KeysError, add_key, revoke_key
from gateway.tenancy.tenants import MIB, Tenants
from tests.flowcontrol.fairqueue.driver import Driver

S = 10**9
NOW = datetime(2026, 10, 1, tzinfo=UTC)
MIDNIGHT = NOW.timestamp()


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.ns = 5 * S
        self.wall = MIDNIGHT + 12 * 3600

    def passes(self, seconds: float) -> None:
        self.ns += int(seconds * S)
        self.wall += seconds


def made(
    keys: Keys | None = None,
    clock: Clock | None = None,
    *,
    max_waiting: int = 1000,
    max_waiting_bytes: int = 2**30,
    **tenants: TenantSettings,
) -> Tenants:
    clock = clock or Clock()
    return Tenants(
        keys or Keys(),
        tenants,
        max_waiting=max_waiting,
        max_waiting_bytes=max_waiting_bytes,
        clock_ns=lambda: clock.ns,
        wall=lambda: clock.wall,
    )


# Who it is


def test_without_keys_everybody_is_the_one_tenant() -> None:
    tenants = made(default=TenantSettings(max_tasks=3))
    for headers in ({}, {"authorization": "Bearer whatever"}, {"x-api-key": "k"}):
        tenant = tenants.authenticate(headers)
        assert (tenant.name, tenant.settings.max_tasks) == (DEFAULT_TENANT, 3)
    assert tenants.sees_all(tenant)


def test_with_keys_a_key_says_who_it_is(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, red = add_key(path, "red", "", NOW)
    kept, gone = add_key(path, "blue", "", NOW)
    revoke_key(path, kept.id, NOW)
    tenants = made(Keys.load(path), red=TenantSettings(weight=2))
    for headers in (
        {"authorization": f"Bearer {red}"},
        {"authorization": f"bEARER  {red} "},
        {"x-api-key": red},
        {"api-key": red},
        {"authorization": "Basic dXNlcg==", "x-api-key": red},
        {"authorization": "Bearer of-another-proxy", "x-api-key": red},
    ):
        assert tenants.authenticate(headers).name == "red"
    assert tenants.authenticate(headers) is tenants.authenticate({"api-key": red}), "one, with its counts"
    assert not tenants.sees_all(tenants.named("red"))
    for headers in ({}, {"authorization": red}, {"authorization": "Bearer"}, {"cookie": red}):
        with pytest.raises(Unauthorized, match="an API key is needed") as error:
            tenants.authenticate(headers)
    for headers in ({"authorization": f"Bearer {gone}"}, {"x-api-key": "sk-1"}, {"x-api-key": ""}):
        with pytest.raises(Unauthorized, match="is not known here, or was revoked") as error:
            tenants.authenticate(headers)
    assert error.value.headers() == {"www-authenticate": "Bearer"}
    assert error.value.status == 401


def test_a_tenant_with_a_key_and_no_entry_has_no_limits(tmp_path: Path) -> None:
    _, key = add_key(tmp_path / "k.json", "new", "", NOW)
    tenant = made(Keys.load(tmp_path / "k.json")).authenticate({"x-api-key": key})
    assert tenant.settings == TenantSettings() and tenant.weight == 1.0


def test_weights_that_clients_may_set() -> None:
    tenants = made(red=TenantSettings(max_agent_weight=4))
    red, blue = tenants.named("red"), tenants.named("blue")
    assert [tenants.weight_of(red, asked) for asked in (None, 0.5, 4)] == [1, 0.5, 4]
    assert [tenants.weight_of(blue, asked) for asked in (None, 0.5, 1)] == [1, 0.5, 1]
    with pytest.raises(
        Forbidden, match=r"tenant blue may not weigh an agent more than 1 \(max_agent_weight\)"
    ) as error:
        tenants.weight_of(blue, 1.001)
    assert (error.value.status, error.value.param) == (403, "x-agent-weight")


def test_a_reload_keeps_what_is_there_and_never_opens_the_door(tmp_path: Path) -> None:
    path, clock = tmp_path / "k.json", Clock()
    _, key = add_key(path, "red", "", NOW)
    tenants = made(Keys.load(path), clock, red=TenantSettings(tokens_per_minute=60, max_tasks=2))
    red = tenants.authenticate({"x-api-key": key})
    tenants.enter(red, 1)
    tenants.charge(red, TenantUsage(1, completion_tokens=120, kv_cost=7))
    tenants.replace(Keys.load(path), {"red": TenantSettings(tokens_per_minute=120, max_tasks=1, kv_per_day=7)})
    assert tenants.authenticate({"x-api-key": key}) is red
    assert (red.load.tasks, red.settings.max_tasks) == (1, 1)
    assert red.tokens.opens_in_s(clock.ns) == 31, "60 overdrawn, and 2 a second now"
    assert red.kv_today.used(clock.wall) == 7
    path.unlink()
    with pytest.raises(KeysError, match="is gone"):
        tenants.replace(Keys.load(path), {})
    assert red.settings.max_tasks == 1, "nothing has changed"
    with pytest.raises(Unauthorized):
        tenants.authenticate({})


# What may come in


def refused(tenants: Tenants, name: str, body_bytes: int = 10) -> GatewayError:
    tenant = tenants.named(name)
    before = [(load.waiting, load.in_flight, load.waiting_bytes) for load in (tenants.load, tenant.load)]
    with pytest.raises(GatewayError) as error:
        tenants.enter(tenant, body_bytes)
    after = [(load.waiting, load.in_flight, load.waiting_bytes) for load in (tenants.load, tenant.load)]
    assert after == before
    return error.value


def test_tasks_at_once() -> None:
    tenants = made(red=TenantSettings(max_tasks=2))
    red = tenants.named("red")
    tenants.enter(red, 10)
    tenants.released(red, 10)
    tenants.enter(red, 10)
    error = refused(tenants, "red")
    assert isinstance(error, QueueFull)
    assert (error.status, error.reason, error.retry_after_s) == (429, Reason.TASKS, 30)
    assert error.message == "2 tasks of tenant red are here already, of at most 2 (max_tasks)"
    tenants.enter(tenants.named("blue"), 10)
    tenants.left(red, 10, waiting=False)
    tenants.enter(red, 10)


def test_tasks_waiting_of_one_and_of_all() -> None:
    tenants = made(max_waiting=3, red=TenantSettings(max_waiting=2))
    red, blue = tenants.named("red"), tenants.named("blue")
    tenants.enter(red, 10)
    tenants.enter(red, 10)
    error = refused(tenants, "red")
    assert (error.reason, error.code) == (Reason.TENANT_QUEUE_FULL, "queue_full")
    assert error.message == "2 tasks of tenant red are waiting already, of at most 2 (max_waiting)"
    tenants.enter(blue, 10)
    error = refused(tenants, "blue")
    assert (error.reason, error.message) == (
        Reason.QUEUE_FULL,
        "3 tasks in all are waiting already, of at most 3 (max_waiting)",
    )
    tenants.released(red, 10)
    tenants.enter(blue, 10)
    tenants.requeued(red, 10)
    assert tenants.load.waiting == 4, "what was let in once is not thrown out"
    assert refused(tenants, "blue").reason == Reason.QUEUE_FULL


def test_bytes_that_wait_of_one_and_of_all() -> None:
    tenants = made(max_waiting_bytes=3 * MIB, red=TenantSettings(max_waiting_mib=2))
    red = tenants.named("red")
    tenants.enter(red, 2 * MIB)
    error = refused(tenants, "red", 1)
    assert (error.reason, error.status) == (Reason.BYTES, 429)
    assert "1 more would be more than 2 MiB of tenant red (max_waiting_mib)" in error.message
    tenants.released(red, 2 * MIB)
    tenants.enter(red, MIB)
    tenants.enter(tenants.named("blue"), 2 * MIB)
    error = refused(tenants, "blue", 1)
    assert "more than 3 MiB in all (max_waiting_mib)" in error.message


def test_a_body_that_could_never_wait_is_not_told_to_come_again() -> None:
    tenants = made(max_waiting=1, max_waiting_bytes=3 * MIB, red=TenantSettings(max_waiting_mib=2))
    for name, size in (("red", 2 * MIB + 1), ("blue", 3 * MIB + 1)):
        error = refused(tenants, name, size)
        assert isinstance(error, BodyTooLarge) and (error.status, error.retry_after_s) == (413, None)


def test_when_to_come_again_is_by_the_tenants_own_rate() -> None:
    clock = Clock()
    tenants = made(clock=clock, red=TenantSettings(max_waiting=4), blue=TenantSettings(max_waiting=4))
    for name, every_s in (("red", 1), ("blue", 3)):
        tenant = tenants.named(name)
        for _ in range(4):
            clock.passes(every_s)
            tenants.enter(tenant, 0)
            tenants.released(tenant, 0)
            tenants.left(tenant, 0, waiting=False)
        for _ in range(4):
            tenants.enter(tenant, 0)
        assert refused(tenants, name).retry_after_s == {"red": 3, "blue": 9}[name]


def test_tokens_a_minute_are_charged_at_the_end_and_made_up_for() -> None:
    clock = Clock()
    tenants = made(clock=clock, red=TenantSettings(tokens_per_minute=600))
    red = tenants.named("red")
    tenants.enter(red, 0)
    tenants.enter(red, 0)
    tenants.charge(red, TenantUsage(1, prompt_tokens=1000, cached_tokens=900, completion_tokens=499))
    tenants.enter(red, 0)
    tenants.charge(red, TenantUsage(1, completion_tokens=101))
    error = refused(tenants, "red")
    assert isinstance(error, QuotaSpent)
    assert (error.status, error.reason, error.retry_after_s) == (429, Reason.TOKENS_PER_MINUTE, 11)
    assert error.message == "tenant red has used its 600 tokens a minute (tokens_per_minute), for the next 11 s"
    assert error.headers() == {"retry-after": "11"}
    tenants.enter(tenants.named("blue"), 0)
    clock.passes(10)
    assert refused(tenants, "red").retry_after_s == 1
    clock.passes(1)
    tenants.enter(red, 0)


def test_kv_of_a_day_until_midnight() -> None:
    clock = Clock()
    tenants = made(clock=clock, red=TenantSettings(kv_per_day=5e9))
    red = tenants.named("red")
    tenants.charge(red, TenantUsage(1, kv_cost=5e9 - 1))
    tenants.enter(red, 0)
    tenants.charge(red, TenantUsage(kv_cost=1))
    error = refused(tenants, "red")
    assert (error.reason, error.retry_after_s) == (Reason.KV_PER_DAY, 12 * 3600)
    assert error.message == "tenant red has used its 5e+09 KV token·iterations of today, in UTC (kv_per_day)"
    tenants.charge(red, TenantUsage(kv_cost=-1))
    tenants.enter(red, 0)
    tenants.charge(red, TenantUsage(kv_cost=1))
    clock.passes(12 * 3600 - 0.5)
    assert refused(tenants, "red").retry_after_s == 1
    clock.passes(0.5)
    tenants.enter(red, 0)


def test_the_books_of_the_hour() -> None:
    clock = Clock()
    tenants = made(clock=clock)
    clock.passes(1800)
    row = tenants.charge(tenants.named("red"), TenantUsage(1, 100, 40, 20, 5.5))
    assert row == UsageRow("red", int(MIDNIGHT) + 12 * 3600, 1, 100, 40, 20, 5.5)


def test_after_a_restart_todays_use_counts() -> None:
    clock = Clock()
    tenants = made(clock=clock, red=TenantSettings(kv_per_day=10))
    hour = int(MIDNIGHT)
    tenants.restore(
        [
            UsageRow("red", hour - 3600, kv_cost=100),
            UsageRow("red", hour, kv_cost=4),
            UsageRow("red", hour + 3600, kv_cost=5),
            UsageRow("blue", hour, kv_cost=50),
        ]
    )
    red = tenants.named("red")
    tenants.enter(red, 0)
    tenants.charge(red, TenantUsage(1, kv_cost=1))
    assert refused(tenants, "red").reason == Reason.KV_PER_DAY
    tenants.enter(tenants.named("blue"), 0)


def test_metrics_of_tenants_have_bounded_labels() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    clock = Clock()
    tenants = made(clock=clock)
    for number in range(MAX_TENANTS + 5):
        name = f"t{number}"
        metrics.tenants.rejected(name, Reason.TASKS)
        metrics.tenants.charged(tenants.charge(tenants.named(name), TenantUsage(1, 10, 4, 2, 7.5)))
    metrics.tenants.charged(tenants.charge(tenants.named("t0"), TenantUsage(kv_cost=-1.5)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"justitia_{name}", labels)

    assert value("rejected_total", reason="tasks") == MAX_TENANTS + 5
    assert value("rejected_total", reason="bytes") == 0, "there from the start"
    assert (value("tenant_rejected_total", tenant="t0"), value("tenant_rejected_total", tenant="other")) == (1, 5)
    assert value("tenant_requests_total", tenant="t0") == 1
    kinds = [value("tenant_tokens_total", tenant="other", kind=kind) for kind in ("prompt", "cached", "completion")]
    assert kinds == [50, 20, 10]
    assert value("tenant_kv_token_iterations_total", tenant="t0") == 7.5


# Weights


def test_tenants_of_weights_two_and_one_share_two_to_one() -> None:
    tenants = made(red=TenantSettings(weight=2.0), blue=TenantSettings())
    driver = Driver(limits=ReleaseLimits(beta=10, in_flight=1))
    served = dict.fromkeys(("red", "blue"), 0.0)
    for number in range(90):
        for name in served:
            tenant = tenants.named(name)
            driver.enqueue(f"{name}/{number}", 50, tenant=tenant.name, tenant_weight=tenant.weight)
    for _ in range(90):
        (release,) = driver.queue.release(driver.now)
        tenant_name = release.task.agent_id.partition("/")[0]
        served[tenant_name] += 50
        driver.now = Iterations(driver.now + 0.5)
        driver.complete(release.task.id, 50, 50)
        assert abs(served["red"] - 2 * served["blue"]) <= 100, "never further apart than a task or two"
    assert served == {"red": 3000, "blue": 1500}


def test_without_weights_they_share_alike() -> None:
    """The control."""
    driver = Driver(limits=ReleaseLimits(beta=10, in_flight=1))
    for number in range(60):
        for name in ("red", "blue"):
            driver.enqueue(f"{name}/{number}", 50, tenant=name, tenant_weight=1)
    served = []
    for _ in range(60):
        (release,) = driver.queue.release(driver.now)
        served.append(release.task.agent_id.partition("/")[0])
        driver.now = Iterations(driver.now + 0.5)
        driver.complete(release.task.id, 50, 50)
    assert served.count("red") == served.count("blue") == 30


# Whatever happens


NAMES = ("red", "blue", "green")


class TenantsMachine(RuleBasedStateMachine):
    """What enters leaves, nothing is counted below zero, and nobody is let in above a limit, nor kept out below it."""

    @initialize(
        max_waiting=st.integers(1, 6),
        max_bytes=st.integers(1, 40),
        limits=st.tuples(*(st.tuples(*[st.none() | st.integers(1, 6)] * 3) for _ in NAMES)),
        rates=st.tuples(*(st.none() | st.integers(1, 200) for _ in NAMES)),
        days=st.tuples(*(st.none() | st.integers(1, 500) for _ in NAMES)),
    )
    def begin(self, max_waiting: int, max_bytes: int, limits: tuple, rates: tuple, days: tuple) -> None:  # type: ignore[type-arg]
        self.clock = Clock()
        self.max_waiting, self.max_bytes = max_waiting, max_bytes
        self.limits = dict(zip(NAMES, limits, strict=True))
        self.rates = dict(zip(NAMES, rates, strict=True))
        self.days = dict(zip(NAMES, days, strict=True))
        self.tenants = made(clock=self.clock, max_waiting=max_waiting, max_waiting_bytes=max_bytes, **self.settings())
        self.waiting: list[tuple[str, int]] = []
        self.in_flight: list[tuple[str, int]] = []
        self.levels = {name: Fraction(rate or 0) for name, rate in self.rates.items()}
        self.used: list[tuple[float, str, float]] = []

    def settings(self) -> dict[str, TenantSettings]:
        return {
            name: TenantSettings(
                max_tasks=tasks,
                max_waiting=waiting,
                max_waiting_mib=None if size is None else 8 * size / MIB,
                tokens_per_minute=self.rates[name],
                kv_per_day=self.days[name],
            )
            for name, (tasks, waiting, size) in self.limits.items()
        }

    def why_not(self, name: str, size: int) -> set[Reason | None]:
        """All that speaks against a task; None: it could never get in."""
        tasks, waiting, most = self.limits[name]
        mine = [body for whose, body in self.waiting if whose == name]
        in_flight = sum(whose == name for whose, _ in self.in_flight)
        day = self.clock.wall // DAY_S
        used = sum(cost for at, whose, cost in self.used if whose == name and at // DAY_S == day)
        against: dict[Reason | None, bool] = {
            Reason.TASKS: tasks is not None and len(mine) + in_flight >= tasks,
            Reason.TENANT_QUEUE_FULL: waiting is not None and len(mine) >= waiting,
            Reason.QUEUE_FULL: len(self.waiting) >= self.max_waiting,
            Reason.BYTES: (most is not None and sum(mine) + size > 8 * most)
            or sum(body for _, body in self.waiting) + size > self.max_bytes,
            None: (most is not None and size > 8 * most) or size > self.max_bytes,
            Reason.TOKENS_PER_MINUTE: self.rates[name] is not None and self.levels[name] <= 0,
            Reason.KV_PER_DAY: self.days[name] is not None and used >= self.days[name],
        }
        return {reason for reason, holds in against.items() if holds}

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 50))
    def enter(self, name: str, size: int) -> None:
        against, error = self.why_not(name, size), None
        try:
            self.tenants.enter(self.tenants.named(name), size)
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
        self.tenants.released(self.tenants.named(task[0]), task[1])
        self.in_flight.append(task)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        task = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        self.tenants.requeued(self.tenants.named(task[0]), task[1])
        self.waiting.append(task)

    @precondition(lambda self: self.waiting or self.in_flight)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.waiting) + len(self.in_flight) - 1))
        waits = place < len(self.waiting)
        name, size = self.waiting.pop(place) if waits else self.in_flight.pop(place - len(self.waiting))
        self.tenants.left(self.tenants.named(name), size, waiting=waits)

    @rule(
        name=st.sampled_from(NAMES),
        prompt=st.integers(0, 100),
        cached=st.integers(0, 100),
        answer=st.integers(0, 100),
        cost=st.integers(0, 200),
    )
    def charge(self, name: str, prompt: int, cached: int, answer: int, cost: int) -> None:
        cached = min(cached, prompt)
        row = self.tenants.charge(self.tenants.named(name), TenantUsage(1, prompt, cached, answer, cost))
        assert row.hour <= self.clock.wall < row.hour + 3600
        self.levels[name] -= prompt - cached + answer
        self.used.append((self.clock.wall, name, cost))

    @rule(seconds=st.integers(0, 90) | st.sampled_from([3600, 7 * 3600, 86_400]))
    def time_passes(self, seconds: int) -> None:
        self.clock.passes(seconds)
        for name, rate in self.rates.items():
            if rate is not None:
                self.levels[name] = min(Fraction(rate), self.levels[name] + Fraction(rate * seconds, 60))

    @rule(name=st.sampled_from(NAMES), limits=st.tuples(*[st.none() | st.integers(1, 6)] * 3))
    def reload(self, name: str, limits: tuple) -> None:  # type: ignore[type-arg]
        self.limits[name] = limits
        self.tenants.replace(self.tenants.keys, self.settings())

    @rule(name=st.sampled_from(NAMES))
    def a_call_that_cannot_be_changes_nothing(self, name: str) -> None:
        for call in (
            lambda: self.tenants.released(self.tenants.named(name), 10_000),
            lambda: self.tenants.left(self.tenants.named(name), 10_000, waiting=True),
        ):
            with pytest.raises(ValueError, match="no task with 10000 bytes"):
                call()

    @invariant()
    def counts_are_what_is_there(self) -> None:
        for name in (None, *NAMES):
            load = self.tenants.load if name is None else self.tenants.named(name).load
            mine = [size for whose, size in self.waiting if name in (None, whose)]
            assert load.waiting == len(mine) >= 0
            assert load.waiting_bytes == sum(mine) >= 0
            assert load.in_flight == sum(name in (None, whose) for whose, _ in self.in_flight)

    def teardown(self) -> None:
        """All that entered can leave."""
        if not hasattr(self, "tenants"):
            return
        for tasks, waits in ((self.waiting, True), (self.in_flight, False)):
            while tasks:
                name, size = tasks.pop()
                self.tenants.left(self.tenants.named(name), size, waiting=waits)
        self.counts_are_what_is_there()


TestTenantsMachine = TenantsMachine.TestCase
TestTenantsMachine.settings = hypothesis_settings(max_examples=150, stateful_step_count=40, deadline=None)
