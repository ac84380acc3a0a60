"""Keys in the order of their places: a binary heap with lazy removal.

To put, move, remove, or find the first costs O(log N) amortised: a key that is moved leaves its old entry behind, which is
skipped when it comes to the front, and the heap is built anew when most of it is such entries.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Place = tuple[float, int]  # what decides, and what breaks a tie


class Order(Generic[Key]):
    __slots__ = ("_entries", "_heap")

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[float, int, Key]] = {}  # those that hold; all others in the heap are old
        self._heap: list[tuple[float, int, Key]] = []

    def put(self, key: Key, place: Place) -> None:
        """A new key, or another place for a known one."""
        known = self._entries.get(key)
        if known is not None and known[:2] == place:
            return
        entry = self._entries[key] = (*place, key)
        heapq.heappush(self._heap, entry)
        self._drop_old()

    def remove(self, key: Key) -> None:
        """Nothing happens if it is not there."""
        if self._entries.pop(key, None) is not None:
            self._drop_old()

    def _drop_old(self) -> None:
        """When most entries are old ones."""
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def first(self) -> Key | None:
        """The key with the smallest place."""
        while self._heap:
            entry = self._heap[0]
            if self._entries.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(self._heap)
        return None

    def place(self, key: Key) -> Place:
        """Raises `KeyError` for a key that is not there."""
        return self._entries[key][:2]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        """In order, at O(N log N) for all: for people, not for decisions."""
        return iter(sorted(self._entries, key=lambda key: self._entries[key][:2]))
