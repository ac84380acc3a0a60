"""`GET /v1/usage`: what each tenant used, for billing, as JSON or CSV.

A tenant sees its own use. Tenants with `admin` see all, and so does every client where no keys are configured.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import msgspec
from fastapi import APIRouter, Request, Response

from gateway.api.instrumented import caller, own_routes
from gateway.flowcontrol.quotas import DAY_S
from gateway.flowcontrol.records import HOUR_S, UsageRow
from gateway.protocol.errors import Forbidden, InvalidRequest, NoState
from gateway.state import StateError
from gateway.telemetry.request_span import Observer
from gateway.tenancy.tenants import Tenants

# Rows of one answer. More would block the event loop, and are better requested by month.
MAX_ROWS = 50_000
# The store is queried for so much time at once.
_STRIDE_S = 31 * DAY_S
_LATEST_S = datetime(9999, 1, 1, tzinfo=UTC).timestamp()

HEADER = ("tenant", "hour", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "kv_token_iterations")


class UsageStore(Protocol):
    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        """The use in hours that begin at `since` or later and before `until`, by hour and tenant. Raises `StateError`."""
        ...


def usage_routes(
    tenants: Tenants,
    observer: Observer,
    store: UsageStore,
    flush: Callable[[], Awaitable[None]],
    wall: Callable[[], float] = time.time,
) -> APIRouter:
    """flush: returns when all use until now is in the store. wall: seconds since 1970."""
    router = own_routes(observer)

    @router.get("/v1/usage", responses={200: {"content": {"text/csv": {}}}, NoState.status: {}})
    async def usage(
        request: Request,
        since: str | None = None,
        until: str | None = None,
        tenant: str | None = None,
        by: str = "hour",
        format: str = "json",  # noqa: A002 (the parameter's name)
    ) -> Response:
        """Use by hour or day, in UTC. `since` is rounded down to the beginning of its hour or day, and is midnight by default;
        `until` is rounded up to the end of its hour or day, and is now by default."""
        asking = caller(request, tenants)
        if not tenants.sees_all(asking):
            if tenant not in (None, asking.name):
                raise Forbidden("this key may only see the usage of its own tenant", param="tenant")
            tenant = asking.name
        step_s = {"hour": HOUR_S, "day": DAY_S}[_one_of("by", by, ("hour", "day"))]
        _one_of("format", format, ("json", "csv"))
        now_s = wall()
        begin = int(_moment("since", since, now_s - now_s % DAY_S) // step_s) * step_s
        end = _round_up(_moment("until", until, now_s), step_s)
        if begin > end:
            raise InvalidRequest("since is after until", param="since")
        end = max(begin, min(end, _round_up(now_s, step_s)))
        try:
            await flush()
            rows = await _rows(store, begin, end, tenant, step_s)
        except StateError as error:
            raise NoState(f"usage is temporarily unavailable: {error}", retry_after_s=5) from error
        if format == "csv":
            name = f"usage-{_iso(begin)[:10]}.csv"
            headers = {"content-disposition": f'attachment; filename="{name}"'}
            return Response(to_csv(rows), headers=headers, media_type="text/csv; charset=utf-8; header=present")
        data = [dict(zip(HEADER, _values(row), strict=True)) for row in rows]
        answer = {"object": "list", "since": _iso(begin), "until": _iso(end), "by": by, "data": data}
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router


def to_csv(rows: list[UsageRow]) -> str:
    """As RFC 4180 defines it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(HEADER)
    for row in rows:
        tenant, *values = _values(row)
        writer.writerow([_no_formula(tenant), *values])
    return text.getvalue()


async def _rows(store: UsageStore, begin: int, end: int, tenant: str | None, step_s: int) -> list[UsageRow]:
    """Raises `StateError`, and `InvalidRequest` for too many rows."""
    rows: list[UsageRow] = []
    for since in range(begin, end, _STRIDE_S):
        hours = await store.usage(since, min(since + _STRIDE_S, end), tenant)
        rows += hours if step_s == HOUR_S else _by_step(hours, step_s)
        if len(rows) > MAX_ROWS:
            raise InvalidRequest(f"more than {MAX_ROWS} rows match: request a shorter time, one tenant, or by=day")
    return rows


def _by_step(hours: list[UsageRow], step_s: int) -> list[UsageRow]:
    """One row for each tenant and day, ordered by day, then by tenant."""
    sums: dict[tuple[int, str], UsageRow] = {}
    for row in hours:
        key = row.hour // step_s * step_s, row.tenant
        row = msgspec.structs.replace(row, hour=key[0])
        sums[key] = sums[key].plus(row) if key in sums else row
    return [sums[key] for key in sorted(sums)]


def _values(row: UsageRow) -> tuple[Any, ...]:
    """In the order of `HEADER`."""
    return (
        row.tenant,
        _iso(row.hour),
        row.requests,
        row.prompt_tokens,
        row.cached_tokens,
        row.completion_tokens,
        row.kv_cost,
    )


def _no_formula(text: str) -> str:
    """Text that begins like this is a formula to a spreadsheet. No tenant's name does, but other programs may write to the
    store."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def _round_up(seconds: float, step_s: int) -> int:
    return math.ceil(seconds / step_s) * step_s


def _iso(at: int) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InvalidRequest(f"{name} must be {' or '.join(known)}, not {value[:20]!r}", param=name)
    return value


def _moment(name: Literal["since", "until"], text: str | None, otherwise: float) -> float:
    """Seconds since 1970, given as such or as an ISO date or time, which is in UTC unless it has a zone."""
    if text is None:
        return otherwise
    try:
        seconds = float(text) if text.isdecimal() else _of_iso(text)
    except (ValueError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds <= _LATEST_S:
        raise InvalidRequest(
            f"{name} must be an ISO date or time, such as 2026-10-01 or 2026-10-01T13:00Z, or seconds since 1970,"
            f" not {text[:40]!r}",
            param=name,
        )
    return seconds


def _of_iso(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
