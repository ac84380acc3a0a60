"""Keys in the order of their places: a binary heap with lazy removal.

Putting, moving, removing and finding the first cost O(log N), amortised: a key that moves leaves its old entry behind. Such
an entry is skipped when it comes to the front, and the heap is built anew when most of its entries are old.
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
        self._entries: dict[Key, tuple[float, int, Key]] = {}  # the valid ones; all others in the heap are old
        self._heap: list[tuple[float, int, Key]] = []

    def put(self, key: Key, place: Place) -> None:
        """Put a new key, or move a known one to another place."""
        known = self._entries.get(key)
        if known is not None and known[:2] == place:
            return
        entry = self._entries[key] = (*place, key)
        heapq.heappush(self._heap, entry)
        self._drop_old()

    def remove(self, key: Key) -> None:
        """Nothing happens for an unknown key."""
        if self._entries.pop(key, None) is not None:
            self._drop_old()

    def _drop_old(self) -> None:
        """Build the heap anew if most of its entries are old."""
        if len(self._heap) > 64 + 4 * len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def first(self) -> Key | None:
        """The key with the smallest place; None if there is none."""
        while self._heap:
            entry = self._heap[0]
            if self._entries.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(self._heap)
        return None

    def place(self, key: Key) -> Place:
        """Raises `KeyError` for an unknown key."""
        return self._entries[key][:2]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        """The keys in order. O(N log N): for reports, not for decisions."""
        return iter(sorted(self._entries, key=lambda key: self._entries[key][:2]))
