"""Tenants at run time: who a request belongs to, what its tenant may have, and what it has used.

All bounds of the queue are here, those of each tenant and those of all together. Nothing here waits or keeps a file; it
holds what a reload must not lose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from gateway.config.settings import MIB, TenantSettings
from gateway.flowcontrol.quotas import DAY_S, DayTotal, Load, TokenBucket
from gateway.protocol.errors import BodyTooLarge, Forbidden, QueueFull, QuotaSpent, Reason, Unauthorized
from gateway.protocol.identify import DEFAULT_TENANT
from gateway.state.types import TenantUsage, UsageRow, hour_of
from gateway.tenancy.keys import Keys, KeysError

_BEARER = "bearer "


class Tenant:
    """settings: as of the last reload."""

    def __init__(self, name: str, settings: TenantSettings, now_ns: int) -> None:
        self.name = name
        self.settings = settings
        self.load = Load()
        self.tokens = TokenBucket(settings.tokens_per_minute, now_ns)
        self.kv_today = DayTotal()

    @property
    def weight(self) -> float:
        return self.settings.weight


class Tenants:
    """max_waiting, max_waiting_bytes: of all tenants together. clock_ns: monotonic; wall: seconds since 1970."""

    def __init__(
        self,
        keys: Keys,
        settings: Mapping[str, TenantSettings],
        *,
        max_waiting: int,
        max_waiting_bytes: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.keys = keys
        self.settings = settings
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self.load = Load()  # of all
        self._clock_ns, self._wall = clock_ns, wall
        self._tenants: dict[str, Tenant] = {}

    def __iter__(self) -> Iterator[Tenant]:
        """Those that have been here."""
        return iter(self._tenants.values())

    # Who it is

    def authenticate(self, headers: Mapping[str, str]) -> Tenant:
        """By the key in `Authorization: Bearer`, `x-api-key` or `api-key`; `headers` by lower-case name. Without keys everybody
        is the one tenant that there is. Raises `Unauthorized`."""
        if not self.keys.configured:
            return self.named(DEFAULT_TENANT)
        given = list(_secrets(headers))
        for secret in given:
            if (name := self.keys.tenant_of(secret)) is not None:
                return self.named(name)
        raise Unauthorized(
            "the API key is not known here, or was revoked"
            if given
            else "an API key is needed, in one of the headers Authorization (Bearer), x-api-key, api-key"
        )

    def named(self, name: str) -> Tenant:
        """With the limits of the settings, or none."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name, self._settings_of(name), self._clock_ns())
        return tenant

    def sees_all(self, tenant: Tenant) -> bool:
        """Whether it may see what is other tenants', and end their agents."""
        return tenant.settings.admin or not self.keys.configured

    def are_several(self) -> bool:
        """Whether requests of more than one tenant may come."""
        return len(self.keys.tenants) > 1

    def weight_of(self, tenant: Tenant, asked: float | None) -> float:
        """The weight of an agent among its tenant's. Raises `Forbidden` for more than the tenant's clients may set."""
        most = tenant.settings.max_agent_weight
        if asked is None:
            return 1.0
        if asked > most:
            raise Forbidden(
                f"tenant {tenant.name} may not weigh an agent more than {most:g} (max_agent_weight)",
                param="x-agent-weight",
            )
        return asked

    # What comes and goes

    def enter(self, tenant: Tenant, body_bytes: int) -> None:
        """A task is about to wait. Raises `QueueFull`, `QuotaSpent`, or `BodyTooLarge` for what would never fit; then nothing
        has changed."""
        now_ns = self._clock_ns()
        self._check_quotas(tenant, now_ns)
        self._check_room(tenant, body_bytes, now_ns)
        for load in (self.load, tenant.load):
            load.enter(body_bytes)

    def released(self, tenant: Tenant, body_bytes: int) -> None:
        """A waiting task has gone to the engine."""
        for load in (self.load, tenant.load):
            load.released(body_bytes)

    def requeued(self, tenant: Tenant, body_bytes: int) -> None:
        """The engine lost a task in flight. It waits again, whatever the limits: it was let in once."""
        for load in (self.load, tenant.load):
            load.requeued(body_bytes)

    def left(self, tenant: Tenant, body_bytes: int, *, waiting: bool) -> None:
        """A task has ended, or was given up; `waiting`: before it was released."""
        now_ns = self._clock_ns()
        for load in (self.load, tenant.load):
            load.left(now_ns, body_bytes, waiting=waiting)

    # What is used

    def charge(self, tenant: Tenant, used: TenantUsage) -> UsageRow:
        """A task has ended; or more is known of one that had, and the difference, which may be negative, is charged without a
        request. What was cached was not computed, and is no part of `tokens_per_minute`. Returns what is to be added to the
        books of this hour."""
        now_s = self._wall()
        computed = max(0, used.prompt_tokens - used.cached_tokens) + used.completion_tokens
        tenant.tokens.spend(self._clock_ns(), computed)
        tenant.kv_today.add(now_s, used.kv_cost)
        tokens = used.prompt_tokens, used.cached_tokens, used.completion_tokens
        return UsageRow(tenant.name, hour_of(now_s), used.requests, *tokens, used.kv_cost)

    def restore(self, rows: Iterable[UsageRow]) -> None:
        """After a start, once: what was used before it. Only today's counts, and only for the quota of a day: a minute's begin
        full."""
        now_s = self._wall()
        midnight = now_s - now_s % DAY_S
        for row in rows:
            if row.hour >= midnight:
                self.named(row.tenant).kv_today.add(now_s, row.kv_cost)

    # What changes

    def replace(self, keys: Keys, settings: Mapping[str, TenantSettings]) -> None:
        """Other keys and limits from now on. What is there stays, and what was used is not forgotten. Raises `KeysError` where
        there would be no keys any more: that would let everybody in."""
        if self.keys.configured and not keys.configured:
            raise KeysError("the file of keys is gone, or holds none any more; to serve without keys, start again")
        self.keys, self.settings = keys, settings
        for tenant in self:
            tenant.settings = self._settings_of(tenant.name)
            tenant.tokens.set_rate(self._clock_ns(), tenant.settings.tokens_per_minute)

    def _settings_of(self, name: str) -> TenantSettings:
        return self.settings.get(name) or TenantSettings()

    def _check_quotas(self, tenant: Tenant, now_ns: int) -> None:
        limits = tenant.settings
        if limits.kv_per_day is not None and tenant.kv_today.used(now_s := self._wall()) >= limits.kv_per_day:
            raise QuotaSpent(
                f"tenant {tenant.name} has used its {limits.kv_per_day:g} KV token·iterations of today, in UTC (kv_per_day)",
                retry_after_s=DayTotal.begins_anew_in_s(now_s),
                reason=Reason.KV_PER_DAY,
            )
        if (opens_in_s := tenant.tokens.opens_in_s(now_ns)) > 0:
            raise QuotaSpent(
                f"tenant {tenant.name} has used its {limits.tokens_per_minute} tokens a minute (tokens_per_minute),"
                f" for the next {opens_in_s} s",
                retry_after_s=opens_in_s,
                reason=Reason.TOKENS_PER_MINUTE,
            )

    def _check_room(self, tenant: Tenant, body_bytes: int, now_ns: int) -> None:
        limits, its = tenant.settings, tenant.load
        name = f"of tenant {tenant.name}"
        if limits.max_tasks is not None and its.tasks >= limits.max_tasks:
            raise QueueFull(
                f"{its.tasks} tasks {name} are here already, of at most {limits.max_tasks} (max_tasks)",
                retry_after_s=its.retry_after_s(now_ns, its.tasks),
                reason=Reason.TASKS,
            )
        its_bytes = None if limits.max_waiting_mib is None else int(limits.max_waiting_mib * MIB)
        _check_waiting(its, name, limits.max_waiting, its_bytes, body_bytes, now_ns, Reason.TENANT_QUEUE_FULL)
        _check_waiting(
            self.load, "in all", self.max_waiting, self.max_waiting_bytes, body_bytes, now_ns, Reason.QUEUE_FULL
        )


def _check_waiting(
    load: Load, whose: str, tasks: int | None, size: int | None, body_bytes: int, now_ns: int, full: Reason
) -> None:
    """tasks, size: the most tasks that may wait, and bytes of their bodies. full: why, if there are as many tasks."""
    most = "" if size is None else f"{size / MIB:g} MiB {whose} (max_waiting_mib)"
    if size is not None and body_bytes > size:
        raise BodyTooLarge(f"a body of {body_bytes} bytes is more than may ever wait, {most}")
    if tasks is not None and load.waiting >= tasks:
        raise QueueFull(
            f"{load.waiting} tasks {whose} are waiting already, of at most {tasks} (max_waiting)",
            retry_after_s=load.retry_after_s(now_ns, load.waiting),
            reason=full,
        )
    if size is not None and load.waiting_bytes + body_bytes > size:
        raise QueueFull(
            f"bodies of {load.waiting_bytes} bytes are waiting already, and {body_bytes} more would be more than {most}",
            retry_after_s=load.retry_after_s(now_ns, load.waiting),
            reason=Reason.BYTES,
        )


def _secrets(headers: Mapping[str, str]) -> Iterator[str]:
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        yield authorization[len(_BEARER) :].strip()
    for header in ("x-api-key", "api-key"):
        if (secret := headers.get(header)) is not None:
            yield secret.strip()
