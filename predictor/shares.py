"""A memory of bounded size that tenants share: what is too much goes from the tenant that holds most.

Clients choose the names of classes and agents. Were the least recently used of all forgotten, a tenant that makes up names
would push out what is known of the others. So each tenant has an order of its own: whatever the others do, it keeps its share
(max-min fairness), and alone it may use all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Name = TypeVar("Name")
Value = TypeVar("Value")


class Shares(Generic[Name, Value]):
    """At most `most` values, each of a tenant and a name."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        # By tenant and by name; in both orders the least recently used stands first.
        self._held: OrderedDict[str, OrderedDict[Name, Value]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def values(self) -> Iterator[Value]:
        for names in self._held.values():
            yield from names.values()

    def get(self, tenant: str, name: Name) -> Value | None:
        """None if it is not known. What is asked for counts as used."""
        names = self._held.get(tenant)
        if names is None:
            return None
        self._held.move_to_end(tenant)
        if name not in names:
            return None
        names.move_to_end(name)
        return names[name]

    def put(self, tenant: str, name: Name, value: Value) -> tuple[str, Name] | None:
        """Returns what had to be forgotten for it. Takes a time proportional to the number of tenants when it is full."""
        names = self._held.setdefault(tenant, OrderedDict())
        self._held.move_to_end(tenant)
        self._size += name not in names
        names[name] = value
        names.move_to_end(name)
        return self._forget() if self._size > self._most else None

    def _forget(self) -> tuple[str, Name]:
        """Of tenants that hold equally much, the least recently used one loses."""
        tenant, names = max(self._held.items(), key=lambda held: len(held[1]))
        name, _ = names.popitem(last=False)
        if not names:
            del self._held[tenant]
        self._size -= 1
        return tenant, name
