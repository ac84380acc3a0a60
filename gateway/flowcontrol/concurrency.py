"""Divides one bound between tenants: requests at once, or bytes held at once.

A tenant may hold at most as much as it leaves free, times its weight over that of the lightest tenant present:

    held_i + size <= (limit - held - size) * w_i / w_lightest

So there is always room for a tenant that holds nothing, without a reserve for each that might come; and tenants that all ask
for more end in the ratio of their weights: n of equal weight each hold limit / (n + 1). What is left over, the share of one
tenant more, is the price. One that is alone for good may use the whole limit.

The rule is that of shared packet buffers: A. Choudhury, E. Hahne, "Dynamic queue length thresholds for shared-memory packet
switches", IEEE/ACM Transactions on Networking 6 (1998). Nothing is taken back: tenants that arrive one after the other and
let go of nothing hold 1/2, 1/4, 1/8 … of the limit, until the first of them ends what it began.

Pure: no I/O, no clock. An illegal call raises `ValueError`, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Sharer(Protocol):
    """A tenant, as far as its share goes."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


class _Part(NamedTuple):
    """What one tenant holds, and its weight when it last took something."""

    held: int
    weight: float


class ConcurrencyLimit:
    """Counts what each tenant holds of one limit, in units of the caller's."""

    def __init__(self, limit: int, shared: Callable[[], bool] = lambda: True) -> None:
        self.limit = limit  # may be changed; what is held above a new one stays held
        self.held = 0
        self._shared = shared  # whether more than one tenant may come
        self._parts: dict[str, _Part] = {}  # of the tenants that hold something

    def held_by(self, tenant: str) -> int:
        part = self._parts.get(tenant)
        return 0 if part is None else part.held

    def has_room(self, tenant: Sharer, size: int = 1) -> bool:
        """Whether the tenant may take so much more. Nothing always fits."""
        if size == 0:
            return True
        free = self.limit - self.held - size
        if free < 0 or not self._shared():
            return free >= 0
        wanted = self.held_by(tenant.name) + size
        if wanted <= free:
            return True
        lightest = min(tenant.weight, *(part.weight for part in self._parts.values())) if self._parts else tenant.weight
        return wanted * lightest <= free * tenant.weight

    def take(self, tenant: Sharer, size: int = 1) -> bool:
        """Hold so much more for the tenant. False if there is no room; then nothing has changed."""
        if size < 0:
            raise ValueError(f"{size} cannot be taken")
        if not self.has_room(tenant, size):
            return False
        if size > 0:
            self.held += size
            self._parts[tenant.name] = _Part(self.held_by(tenant.name) + size, tenant.weight)
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
