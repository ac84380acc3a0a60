"""Which tenant a request belongs to, and what the settings allow it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.config.settings import TenantSettings
from gateway.flowcontrol.fairqueue import Iterations, ReleaseLimits
from gateway.protocol.errors import Forbidden, Unauthorized
from gateway.protocol.identify import DEFAULT_TENANT
from gateway.tenancy.keys import Keys, KeysError, add_key, revoke_key
from gateway.tenancy.tenants import Tenants
from tests.flowcontrol.fairqueue.driver import Driver

NOW = datetime(2026, 10, 1, tzinfo=UTC)


def made(keys: Keys | None = None, **tenants: TenantSettings) -> Tenants:
    return Tenants(keys or Keys(), tenants)


# Which tenant it is


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
    assert tenants.authenticate(headers) is tenants.authenticate({"api-key": red})
    assert not tenants.sees_all(tenants.named("red"))
    for headers in ({}, {"authorization": red}, {"authorization": "Bearer"}, {"cookie": red}):
        with pytest.raises(Unauthorized, match="an API key is needed") as error:
            tenants.authenticate(headers)
    for headers in ({"authorization": f"Bearer {gone}"}, {"x-api-key": "sk-1"}, {"x-api-key": ""}):
        with pytest.raises(Unauthorized, match="is unknown, or was revoked") as error:
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
        Forbidden, match=r"tenant blue may not set an agent's weight above 1 \(max_agent_weight\)"
    ) as error:
        tenants.weight_of(blue, 1.001)
    assert (error.value.status, error.value.param) == (403, "x-agent-weight")


def test_a_reload_changes_limits_and_never_opens_the_door(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    _, key = add_key(path, "red", "", NOW)
    tenants = made(Keys.load(path), red=TenantSettings(max_tasks=2, weight=2))
    assert tenants.authenticate({"x-api-key": key}).settings.max_tasks == 2
    add_key(path, "blue", "", NOW)
    tenants.replace(Keys.load(path), {"red": TenantSettings(max_tasks=1), "gone": TenantSettings(max_tasks=7)})
    red = tenants.authenticate({"x-api-key": key})
    assert (red.settings.max_tasks, red.weight) == (1, 1.0)
    path.unlink()
    with pytest.raises(KeysError, match="is gone"):
        tenants.replace(Keys.load(path), {})
    assert tenants.authenticate({"x-api-key": key}) is red, "nothing has changed"
    with pytest.raises(Unauthorized):
        tenants.authenticate({})


def test_limits_are_of_the_tenants_that_can_come(tmp_path: Path) -> None:
    add_key(tmp_path / "k.json", "red", "", NOW)
    add_key(tmp_path / "k.json", "blue", "", NOW)
    named = TenantSettings(max_tasks=3)
    tenants = made(Keys.load(tmp_path / "k.json"), red=named, later=named)
    assert tenants.limits == {"red": named, "blue": TenantSettings()}
    assert made(Keys(), default=named, later=named).limits == {"default": named}, "without keys there is one tenant"


def test_the_weight_of_all_is_of_those_that_may_come_in(tmp_path: Path) -> None:
    """Shared bounds are divided by it: a tenant without a key would be kept a share in vain."""
    weights = {"red": TenantSettings(weight=2), "later": TenantSettings(weight=8), "default": TenantSettings(weight=3)}
    assert made(**weights).total_weight == 3, "without keys, every request is the default tenant's"
    add_key(tmp_path / "k.json", "red", "", NOW)
    add_key(tmp_path / "k.json", "red", "", NOW)
    add_key(tmp_path / "k.json", "blue", "", NOW)
    tenants = made(Keys.load(tmp_path / "k.json"), **weights)
    assert tenants.total_weight == 2 + 1
    tenants.replace(tenants.keys, {"blue": TenantSettings(weight=5)})
    assert tenants.total_weight == 1 + 5


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
