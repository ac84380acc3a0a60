"""Tenants: whose key a request has, and what the settings allow its tenant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.config.settings import TenantSettings
from gateway.protocol.errors import Forbidden, Unauthorized
from gateway.protocol.identify import DEFAULT_TENANT
from gateway.tenancy.keys import Keys, KeysError

_BEARER = "bearer "
_NO_LIMITS = TenantSettings()


@dataclass(frozen=True, slots=True)
class Tenant:
    """The tenant of one request, with its settings as of now."""

    name: str
    settings: TenantSettings

    @property
    def weight(self) -> float:
        """Its share among tenants."""
        return self.settings.weight


class Tenants:
    """The keys, and the settings of each tenant."""

    def __init__(self, keys: Keys, settings: Mapping[str, TenantSettings]) -> None:
        self.keys = keys
        self.settings = settings
        self._named: dict[str, Tenant] = {}

    @property
    def limits(self) -> dict[str, TenantSettings]:
        """Of every tenant that can come: that has a key; the default one, while there are no keys."""
        names = self.keys.tenants if self.keys.configured else {DEFAULT_TENANT}
        return {name: self.settings.get(name, _NO_LIMITS) for name in names}

    @property
    def total_weight(self) -> float:
        """Of every tenant that can come."""
        return sum(limits.weight for limits in self.limits.values())

    def authenticate(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant of the key in `Authorization: Bearer`, `x-api-key` or `api-key`; headers: by lower-case name. While there
        are no keys, every request is the default tenant's. Raises `Unauthorized`."""
        if not self.keys.configured:
            return self.named(DEFAULT_TENANT)
        given = list(_secrets(headers))
        for secret in given:
            if (name := self.keys.tenant_of(secret)) is not None:
                return self.named(name)
        raise Unauthorized(
            "the API key is unknown, or was revoked"
            if given
            else "an API key is needed, in one of the headers Authorization (Bearer), x-api-key, api-key"
        )

    def named(self, name: str) -> Tenant:
        tenant = self._named.get(name)
        if tenant is None:
            tenant = self._named[name] = Tenant(name, self.settings.get(name, _NO_LIMITS))
        return tenant

    def sees_all(self, tenant: Tenant) -> bool:
        """Whether the tenant may see the agents and the use of other tenants, and end those agents."""
        return tenant.settings.admin or not self.keys.configured

    def weight_of(self, tenant: Tenant, asked: float | None) -> float:
        """The weight of an agent among its tenant's. Raises `Forbidden` for more than the tenant's clients may set."""
        most = tenant.settings.max_agent_weight
        if asked is None:
            return 1.0
        if asked > most:
            raise Forbidden(
                f"tenant {tenant.name} may not set an agent's weight above {most:g} (max_agent_weight)",
                param="x-agent-weight",
            )
        return asked

    def replace(self, keys: Keys, settings: Mapping[str, TenantSettings]) -> None:
        """Other keys and settings from now on. Raises `KeysError` where no keys would be left: every request would then be
        served."""
        if self.keys.configured and not keys.configured:
            raise KeysError("the file of keys is gone, or holds none any more; to serve without keys, start again")
        self.keys, self.settings = keys, settings
        self._named.clear()


def _secrets(headers: Mapping[str, str]) -> Iterator[str]:
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        yield authorization[len(_BEARER) :].strip()
    for header in ("x-api-key", "api-key"):
        if (secret := headers.get(header)) is not None:
            yield secret.strip()
