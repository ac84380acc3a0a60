"""`GET /v1/usage`: who sees what, nothing missing and nothing twice, and a CSV that any program reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from gateway.api.usage import HEADER, MAX_ROWS, to_csv, usage_routes
from gateway.config.settings import TenantSettings
from gateway.flowcontrol import Now, Quotas
from gateway.flowcontrol.records import TenantUsage, UsageRow
from gateway.state import StateError
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.request_span import Observer
from gateway.tenancy.keys import Keys, add_key
from gateway.tenancy.tenants import Tenants

DAY, HOUR = 86_400, 3600
NOON = int(datetime(2026, 10, 1, 12, tzinfo=UTC).timestamp())
NOW = NOON + 1800


class Books:
    """A store whose rows are written only when they are flushed."""

    def __init__(self) -> None:
        self.rows: list[UsageRow] = []
        self.unwritten: list[UsageRow] = []
        self.asked: list[tuple[int, int]] = []
        self.gone = False

    async def flush(self) -> None:
        for row in self.unwritten:
            for place, known in enumerate(self.rows):
                if (known.tenant, known.hour) == (row.tenant, row.hour):
                    self.rows[place] = known.plus(row)
                    break
            else:
                self.rows.append(row)
        self.unwritten.clear()

    async def usage(self, since: int, until: int, tenant: str | None = None) -> list[UsageRow]:
        if self.gone:
            raise StateError("the store is gone")
        self.asked.append((since, until))
        found = [row for row in self.rows if since <= row.hour < until and tenant in (None, row.tenant)]
        return sorted(found, key=lambda row: (row.hour, row.tenant))


class Scene:
    def __init__(self, keys: Keys | None = None) -> None:
        self.books = Books()
        self.now = float(NOW)
        self.tenants = Tenants(keys or Keys(), {"boss": TenantSettings(admin=True)})
        self.quotas = Quotas(1, 1)
        observer = Observer(Metrics(CollectorRegistry(), version="", policy=""))
        app = FastAPI()
        app.include_router(usage_routes(self.tenants, observer, self.books, self.books.flush, wall=lambda: self.now))

        self.client = TestClient(app)

    def use(self, tenant: str, *, hours_ago: int = 0, **used: Any) -> None:
        then = Now(0, NOW - hours_ago * HOUR)
        account = self.quotas.account(tenant, then.ns)
        self.books.unwritten.append(self.quotas.charge(then, account, TenantUsage(**used)))

    def get(self, key: str | None = None, **query: object) -> Any:
        return self.client.get("/v1/usage", params=query, headers={"x-api-key": key} if key else {})

    def rows(self, key: str | None = None, **query: object) -> list[tuple[str, str, int]]:
        answer = self.get(key, **query)
        assert answer.status_code == 200, answer.text
        return [(row["tenant"], row["hour"], row["requests"]) for row in answer.json()["data"]]


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    with made.client:
        yield made


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Scene, dict[str, str]]]:
    secrets = {name: add_key(tmp_path / "k.json", name, "", datetime.now(UTC))[1] for name in ("red", "blue", "boss")}
    made = Scene(Keys.load(tmp_path / "k.json"))
    with made.client:
        yield made, secrets


def test_what_was_used_is_there_once_written_or_not(scene: Scene) -> None:
    scene.use("red", requests=1, prompt_tokens=100, cached_tokens=40, completion_tokens=20, kv_cost=1234.5)
    answer = scene.get()
    assert answer.json() == {
        "object": "list",
        "since": "2026-10-01T00:00:00Z",
        "until": "2026-10-01T13:00:00Z",
        "by": "hour",
        "data": [
            {
                "tenant": "red",
                "hour": "2026-10-01T12:00:00Z",
                "requests": 1,
                "prompt_tokens": 100,
                "cached_tokens": 40,
                "completion_tokens": 20,
                "kv_token_iterations": 1234.5,
            }
        ],
    }
    scene.use("red", requests=1)
    scene.use("red", kv_cost=-0.5)
    assert scene.rows() == scene.rows() == [("red", "2026-10-01T12:00:00Z", 2)]


def test_by_hour_in_order_and_by_day(scene: Scene) -> None:
    for tenant in ("red", "blue"):
        for hours_ago in (0, 1, 13, 14, 40):
            scene.use(tenant, hours_ago=hours_ago, requests=1, kv_cost=hours_ago)
    assert scene.rows() == [
        ("blue", "2026-10-01T11:00:00Z", 1),
        ("red", "2026-10-01T11:00:00Z", 1),
        ("blue", "2026-10-01T12:00:00Z", 1),
        ("red", "2026-10-01T12:00:00Z", 1),
    ]
    days = scene.get(by="day", since="2026-09-29T23:30").json()
    assert (days["since"], days["until"]) == ("2026-09-29T00:00:00Z", "2026-10-02T00:00:00Z")
    assert [(row["tenant"], row["hour"], row["requests"], row["kv_token_iterations"]) for row in days["data"]] == [
        ("blue", "2026-09-29T00:00:00Z", 1, 40),
        ("red", "2026-09-29T00:00:00Z", 1, 40),
        ("blue", "2026-09-30T00:00:00Z", 2, 27),
        ("red", "2026-09-30T00:00:00Z", 2, 27),
        ("blue", "2026-10-01T00:00:00Z", 2, 1),
        ("red", "2026-10-01T00:00:00Z", 2, 1),
    ]


@pytest.mark.parametrize(
    ("query", "hours"),
    [
        ({"since": "2026-10-01T11:59:59Z"}, [11, 12]),
        ({"since": "2026-10-01T12:00"}, [12]),
        ({"since": NOON, "until": NOON + 1}, [12]),
        ({"since": NOON - 1, "until": NOON}, [11]),
        ({"until": "2026-10-01T12:00"}, [10, 11]),
        ({"since": "2026-10-01T13:00+02:00", "until": "2026-10-01T14:00+02:00"}, [11]),
        ({"since": "2026-10-01", "until": "2026-10-02"}, [10, 11, 12]),
        ({"since": "2026-10-02", "until": "2026-10-03"}, []),
        ({"since": NOON, "until": NOON}, []),
        ({"since": "0"}, [10, 11, 12]),
        ({"since": "9998-01-01", "until": "9998-01-01"}, []),
    ],
)
def test_from_when_and_until_when(scene: Scene, query: dict[str, object], hours: list[int]) -> None:
    for hours_ago in (0, 1, 2):
        scene.use("red", hours_ago=hours_ago, requests=1)
    assert [int(hour[11:13]) for _, hour, _ in scene.rows(**query)] == hours


def test_a_long_time_is_asked_for_in_pieces_that_meet(scene: Scene) -> None:
    scene.get(since="2025-01-01", until="9998-01-01")
    asked = scene.books.asked
    assert asked[0][0] == datetime(2025, 1, 1, tzinfo=UTC).timestamp()
    assert asked[-1][1] == NOON + HOUR, "not beyond now"
    assert [until for _, until in asked[:-1]] == [since for since, _ in asked[1:]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"since": "yesterday"}, "since"),
        ({"since": "-5"}, "since"),
        ({"until": "1e9"}, "until"),
        ({"until": "9" * 400}, "until"),
        ({"since": "0001-01-01T00:00+23:59"}, "since"),
        ({"since": "2026-10-02"}, "since"),
        ({"since": NOON, "until": NOON - HOUR}, "since"),
        ({"by": "week"}, "by"),
        ({"format": "xml"}, "format"),
    ],
)
def test_what_cannot_be_asked_for_is_said(scene: Scene, query: dict[str, object], param: str) -> None:
    answer = scene.get(**query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_too_many_rows_are_refused_and_not_made(scene: Scene) -> None:
    scene.books.rows = [UsageRow(f"t{number}", NOON, 1) for number in range(MAX_ROWS + 1)]
    answer = scene.get()
    assert answer.status_code == 400
    assert "request a shorter time" in answer.json()["error"]["message"]
    assert len(scene.rows(tenant="t7")) == 1


def test_a_store_that_is_gone_is_503(scene: Scene) -> None:
    scene.books.gone = True
    answer = scene.get()
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "no_state", "5")


def test_a_key_sees_its_own_tenant(keyed: tuple[Scene, dict[str, str]]) -> None:
    scene, secrets = keyed
    for tenant in ("red", "blue", "boss"):
        scene.use(tenant, requests=1)
    hour = "2026-10-01T12:00:00Z"
    assert scene.get().status_code == 401
    assert scene.get("jk_00000000_" + 64 * "0").status_code == 401
    assert scene.rows(secrets["red"]) == scene.rows(secrets["red"], tenant="red") == [("red", hour, 1)]
    for tenant in ("blue", "nobody"):
        answer = scene.get(secrets["red"], tenant=tenant)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert scene.rows(secrets["boss"]) == [(name, hour, 1) for name in ("blue", "boss", "red")]
    assert scene.rows(secrets["boss"], tenant="red") == [("red", hour, 1)]
    assert scene.rows(secrets["boss"], tenant="nobody") == []


def test_as_csv(scene: Scene) -> None:
    scene.use("red", requests=2, prompt_tokens=100, cached_tokens=40, completion_tokens=20, kv_cost=1234.5)
    answer = scene.get(format="csv", since="2026-10-01")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-2026-10-01.csv"'
    assert answer.text == (
        "tenant,hour,requests,prompt_tokens,cached_tokens,completion_tokens,kv_token_iterations\r\n"
        "red,2026-10-01T12:00:00Z,2,100,40,20,1234.5\r\n"
    )


@pytest.mark.parametrize("tenant", ["=1+1", "+1", "-1", "@a", "\ta", "\ra", '=cmd|"/c"!A1,x', 'a"b', "a,b", "a\r\nb"])
def test_no_name_is_a_formula_or_breaks_a_row(tenant: str) -> None:
    text = to_csv([UsageRow(tenant, 0), UsageRow("b", 0)])
    header, first, second = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert tuple(header) == HEADER
    assert first[0].removeprefix("'") == tenant
    assert first[0][0] not in "=+-@\t\r\n"
    assert second == ["b", "1970-01-01T00:00:00Z", "0", "0", "0", "0", "0.0"]
