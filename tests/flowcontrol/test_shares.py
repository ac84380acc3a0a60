"""What one tenant does to another at the queue's bounds, and what each limit refuses, as tables over flow control."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config.settings import TenantSettings
from gateway.flowcontrol.concurrency import ConcurrencyLimit
from gateway.flowcontrol.quotas import DAY_S, MIB, NO_LIMITS, NoLimits, Quotas
from gateway.flowcontrol.records import TenantUsage, UsageRow
from gateway.protocol.errors import BodyTooLarge, GatewayError, Outcome, QueueFull, QuotaSpent, Reason
from gateway.protocol.usage import Usage
from gateway.tenancy.tenants import Tenant
from tests.flowcontrol.scene import COST, WALL, Scene

OTHER = {"red": NO_LIMITS, "blue": NO_LIMITS}


def is_taken(scene: Scene, agent: str, tenant: str, **more: Any) -> bool:
    try:
        scene.arrive(agent, tenant, **more)
    except QueueFull as full:
        return full.reason not in (Reason.QUEUE_FULL, Reason.BYTES)
    return True


def flood(scene: Scene, tenant: str, **more: Any) -> int:
    """As many tasks of a tenant as are taken, each of an agent of its own."""
    return next(number for number in range(1000) if not is_taken(scene, f"{tenant}{number}", tenant, **more))


@pytest.mark.parametrize(
    ("limits", "max_waiting", "taken"),
    [
        ({"red": NO_LIMITS}, 20, {"red": 20}),  # alone: all of it
        (OTHER, 20, {"red": 15, "blue": 5}),
        (OTHER, 40, {"red": 30, "blue": 10}),
        ({**OTHER, "green": NO_LIMITS, "pink": NO_LIMITS}, 40, {"red": 25, "blue": 5, "green": 5, "pink": 5}),
        ({"red": NoLimits(weight=3.0), "blue": NO_LIMITS}, 40, {"red": 35, "blue": 5}),
        ({"blue": NO_LIMITS, "red": NoLimits(weight=3.0)}, 40, {"blue": 25, "red": 15}),
        ({}, 20, {"red": 20, "blue": 5}),  # a tenant that was not known: room is made for its share
    ],
)
@pytest.mark.parametrize("unit", ["tasks", "bytes"])
def test_one_tenant_does_not_fill_the_queue_for_others(
    limits: dict[str, NoLimits], max_waiting: int, taken: dict[str, int], unit: str
) -> None:
    """With 20 places, a tenant that floods the queue leaves room for each other one."""
    in_tasks = unit == "tasks"
    scene = Scene(limits=limits, max_waiting=max_waiting if in_tasks else 9999, max_waiting_bytes=100 * max_waiting)
    assert {tenant: flood(scene, tenant, body_bytes=0 if in_tasks else 100) for tenant in taken} == taken
    scene.check()


def test_a_tenant_whose_share_is_less_than_one_task_has_room_for_one() -> None:
    scene = Scene(limits={"red": NO_LIMITS, "blue": NoLimits(weight=0.001)}, max_waiting=20)
    assert (flood(scene, "red"), flood(scene, "blue")) == (19, 1)


def test_a_flood_that_is_served_leaves_room_again() -> None:
    scene = Scene(limits=OTHER, max_waiting=20, slots=4)
    assert flood(scene, "red") == 15
    released = scene.release()
    assert len(released) == 4 and flood(scene, "red") == 4, "what is in flight does not wait"
    for task in released:
        assert scene.lose(task)
    assert flood(scene, "red") == 0 and flood(scene, "blue") == 5, "whatever came back in between"
    scene.check()


LIMITED = [
    # (limits, loads before, error, reason, part of the message)
    (NoLimits(max_tasks=2), 2, QueueFull, Reason.TASKS, "2 of at most 2 tasks at once"),
    (NoLimits(max_waiting=1), 2, QueueFull, Reason.TENANT_QUEUE_FULL, "1 of at most 1 waiting tasks"),
    (NoLimits(max_waiting_mib=150 / MIB), 2, QueueFull, Reason.BYTES, "100 bytes of tenant t wait already; 100 more"),
    (NoLimits(max_waiting_mib=99 / MIB), 0, BodyTooLarge, None, "of tenant t"),
    (NoLimits(kv_per_day=COST), 1, QuotaSpent, Reason.KV_PER_DAY, "kv_per_day"),
    (NoLimits(tokens_per_minute=8), 1, QuotaSpent, Reason.TOKENS_PER_MINUTE, "tokens_per_minute"),
]


@pytest.mark.parametrize(("limits", "tasks", "error", "reason", "message"), LIMITED)
def test_each_limit_of_a_tenant_refuses_and_no_other_tenant_is_touched(
    limits: NoLimits, tasks: int, error: type[GatewayError], reason: Reason | None, message: str
) -> None:
    scene = Scene(limits={"t": limits, "u": NO_LIMITS}, slots=1)
    for _ in range(tasks):
        first = scene.arrive(body_bytes=100)
        scene.release()
    if error is QuotaSpent:
        scene.counts({first: COST})
        scene.settle(first, usage=Usage(10, 4, 6))
    before = scene.contents()
    with pytest.raises(error, match=message) as refused:
        scene.arrive(body_bytes=100)
    assert refused.value.reason == reason and scene.contents() == before
    scene.arrive("a", "u", body_bytes=100)
    scene.quotas.set_limits(scene.now, {})
    scene.arrive(body_bytes=100)
    scene.check()


@pytest.mark.parametrize(
    ("limits", "tasks"),
    [
        (NoLimits(max_tasks=3), 2),
        (NoLimits(max_waiting=2), 2),
        (NoLimits(max_waiting_mib=200 / MIB), 2),
        (NoLimits(max_waiting_mib=100 / MIB), 1),
        (NoLimits(kv_per_day=COST + 0.1), 1),
        (NoLimits(tokens_per_minute=9), 1),
    ],
)
def test_each_limit_of_a_tenant_lets_in_what_is_just_within_it(limits: NoLimits, tasks: int) -> None:
    scene = Scene(limits={"t": limits}, slots=1)
    for _ in range(tasks):
        first = scene.arrive(body_bytes=100)
        scene.release()
    if limits.kv_per_day or limits.tokens_per_minute:
        scene.counts({first: COST})
        scene.settle(first, usage=Usage(10, 4, 6))
    scene.arrive(body_bytes=100)
    scene.check()


def test_the_bound_of_all_on_bytes() -> None:
    scene = Scene(max_waiting_bytes=1000)
    with pytest.raises(BodyTooLarge, match="that may wait in all"):
        scene.arrive(body_bytes=1001)
    task = scene.arrive(body_bytes=1000)
    with pytest.raises(QueueFull, match="1000 bytes wait already; 1 more") as full:
        scene.arrive(body_bytes=1)
    assert full.value.reason is Reason.BYTES and full.value.retry_after_s == 30
    scene.arrive(body_bytes=0)
    scene.release()
    scene.arrive(body_bytes=1000)
    scene.settle(task)
    scene.check()


def test_the_quota_of_a_day_opens_at_midnight_and_says_when() -> None:
    scene = Scene(limits={"t": NoLimits(kv_per_day=COST)}, begin_s=DAY_S - WALL % DAY_S - 90.5)
    scene.serve(held=COST)
    with pytest.raises(QuotaSpent) as spent:
        scene.arrive()
    assert spent.value.retry_after_s == 91
    scene.pass_s(90.5)
    scene.arrive()


def test_the_tokens_of_a_minute_are_those_that_were_computed() -> None:
    scene = Scene(limits={"t": NoLimits(tokens_per_minute=60)})
    scene.settle(scene.released(), usage=Usage(100, 4, 50))
    scene.settle(scene.released(), usage=Usage(100, 8, 100))
    with pytest.raises(QuotaSpent, match="60 tokens a minute") as spent:
        scene.arrive()
    assert spent.value.retry_after_s == 3, "two were overdrawn"
    scene.pass_s(2.001)
    task = scene.released()
    scene.settle(task, Outcome.CANCELLED, None)
    scene.check_over()


def test_the_time_to_come_again_is_the_tenants_own_or_that_of_all() -> None:
    """One task of red ends each second, and ten of blue."""
    limits = {"red": NoLimits(max_waiting=4), "blue": NoLimits(max_tasks=8)}
    scene = Scene(limits=limits, max_waiting=12, slots=8)
    for _ in range(20):
        for tenant, ends in (("red", 1), ("blue", 2)):
            for _ in range(ends):
                scene.settle(scene.released("a", tenant), Outcome.CANCELLED, None)
        scene.pass_s(1)
    for number in range(8):
        scene.arrive(f"b{number}", "blue")
    with pytest.raises(QueueFull, match="max_tasks") as tasks:
        scene.arrive("b", "blue")
    assert tasks.value.retry_after_s == 4
    for number in range(4):
        scene.arrive(f"r{number}", "red")
    with pytest.raises(QueueFull, match="max_waiting") as waiting:
        scene.arrive("r", "red")
    assert waiting.value.retry_after_s == 4
    scene.quotas.set_limits(scene.now, {})
    with pytest.raises(QueueFull, match="12 tasks wait, of at most 12") as all_of_them:
        scene.arrive("r", "red")
    assert all_of_them.value.retry_after_s == 4


def test_use_is_charged_by_the_hour_and_restored_for_the_day() -> None:
    scene = Scene()
    quotas = Quotas(10, 10)
    account = quotas.account("t", 0)
    row = quotas.charge(scene.now, account, TenantUsage(1, 10, 4, 6, 99.0))
    assert row == UsageRow("t", int(WALL) // 3600 * 3600, 1, 10, 4, 6, 99.0)
    assert account.kv_today.used(scene.now.wall_s) == 99
    midnight = int(WALL) // DAY_S * DAY_S
    rows = [UsageRow("t", midnight - 3600, kv_cost=1.0), UsageRow("t", midnight, kv_cost=2.0)]
    quotas.restore(scene.now, [*rows, UsageRow("u", midnight + 3600, kv_cost=4.0)])
    assert [each.kv_today.used(scene.now.wall_s) for each in quotas] == [101, 4]
    assert row.plus(UsageRow("t", row.hour, 2, 3, 5, 7, 11.0)) == UsageRow("t", row.hour, 3, 13, 9, 13, 110.0)


def test_other_limits_leave_what_is_there_and_what_was_used() -> None:
    scene = Scene(limits={"t": NoLimits(tokens_per_minute=60, kv_per_day=100.0)})
    scene.serve(held=99.0)
    task = scene.arrive(body_bytes=7)
    scene.quotas.set_limits(scene.now, {"t": NoLimits(tokens_per_minute=6, kv_per_day=90.0), "new": NO_LIMITS})
    account, new = scene.quotas
    assert (account.load.waiting, account.load.waiting_bytes, new.name) == (1, 7, "new")
    with pytest.raises(QuotaSpent, match="kv_per_day"):
        scene.arrive()
    scene.quotas.set_limits(scene.now, {})
    assert account.limits is NO_LIMITS and new.limits is NO_LIMITS
    scene.arrive()
    scene.settle(task, Outcome.CANCELLED, None)
    scene.check()


def test_where_no_tenants_are_known_the_first_may_have_all() -> None:
    limit = ConcurrencyLimit(10)
    tenant = Tenant("red", TenantSettings())
    assert limit.take(tenant, 6) and limit.take(tenant, 4) and not limit.take(tenant)
    assert (limit.held, limit.held_by("red")) == (10, 10)
