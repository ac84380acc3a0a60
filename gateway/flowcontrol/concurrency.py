"""Divides one bound between tenants: tasks or bytes that wait, requests at once, bytes held at once.

Half of the bound is kept for the tenants, shared by their weights: a tenant that holds less than its share has room, whatever
the others hold. The other half is for the tenants that come first. So a tenant alone among n of equal weight may hold
1/2 + 1/(2n) of the bound, and no sequence of floods of others leaves it without room. With one tenant, that is the whole bound.

A tenant of so small a weight that its share is less than one still has room for one: with more such tenants than the bound
has units, the bound is exceeded by that.

Pure: no I/O, no clock. An illegal call raises `ValueError`, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

# Shares are rounded, and what is held is whole: so little more is never a unit more, and the last unit is not lost.
ROUNDING = 1e-12


class Sharer(Protocol):
    """A tenant, as far as its share goes."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


class Part(NamedTuple):
    """What one tenant holds of a bound, and its weight."""

    held: int
    weight: float


def fits(limit: int, size: int, mine: Part, others: Iterable[Part], total_weight: float) -> bool:
    """Whether a tenant may hold so much more of a bound. mine: what it holds now. others: what the other tenants hold.
    total_weight: of all tenants that may come."""
    wanted = mine.held + size
    share = limit / 2 / max(total_weight, mine.weight)  # of each unit of weight
    if wanted <= max(1.0, share * mine.weight) and wanted <= limit:
        return True
    beyond = wanted - share * mine.weight + sum(max(0.0, other.held - share * other.weight) for other in others)
    return beyond <= limit / 2 * (1 + ROUNDING)


class ConcurrencyLimit:
    """Counts what each tenant holds of one bound, in units of the caller's."""

    def __init__(self, limit: int, total_weight: Callable[[], float] = lambda: 1.0) -> None:
        self.limit = limit  # may be changed; what is held above a new one stays held
        self.held = 0
        self._total_weight = total_weight  # of all tenants that may come
        self._parts: dict[str, Part] = {}  # of the tenants that hold something

    def held_by(self, tenant: str) -> int:
        part = self._parts.get(tenant)
        return 0 if part is None else part.held

    def has_room(self, tenant: Sharer, size: int = 1) -> bool:
        """Whether the tenant may take so much more. Nothing always fits."""
        if size == 0 or 2 * (self.held + size) <= self.limit:
            return True
        mine = Part(self.held_by(tenant.name), tenant.weight)
        others = (part for name, part in self._parts.items() if name != tenant.name)
        return fits(self.limit, size, mine, others, self._total_weight())

    def take(self, tenant: Sharer, size: int = 1) -> bool:
        """Hold so much more for the tenant. False if there is no room; then nothing has changed."""
        if size < 0:
            raise ValueError(f"{size} cannot be taken")
        if not self.has_room(tenant, size):
            return False
        if size > 0:
            self.held += size
            self._parts[tenant.name] = Part(self.held_by(tenant.name) + size, tenant.weight)
        return True

    def give_back(self, tenant: str, size: int = 1) -> None:
        """The tenant holds so much less. Raises `ValueError` for more than it holds."""
        left = self.held_by(tenant) - size
        if size < 0 or left < 0:
            raise ValueError(f"tenant {tenant} holds {self.held_by(tenant)}, and cannot give back {size}")
        self.held -= size
        if left > 0:
            self._parts[tenant] = self._parts[tenant]._replace(held=left)
        else:
            self._parts.pop(tenant, None)
