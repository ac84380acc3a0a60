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
    __slots__ = ("_heap", "_places")

    def __init__(self) -> None:
        self._places: dict[Key, Place] = {}
        self._heap: list[tuple[Place, Key]] = []

    def put(self, key: Key, place: Place) -> None:
        """A new key, or another place for a known one."""
        if self._places.get(key) == place:
            return
        self._places[key] = place
        heapq.heappush(self._heap, (place, key))
        if len(self._heap) > 64 + 4 * len(self._places):
            self._heap = [(place, key) for key, place in self._places.items()]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> None:
        """Nothing happens if it is not there."""
        self._places.pop(key, None)

    def first(self) -> Key | None:
        """The key with the smallest place."""
        while self._heap:
            place, key = self._heap[0]
            if self._places.get(key) == place:
                return key
            heapq.heappop(self._heap)
        return None

    def place(self, key: Key) -> Place:
        """Raises `KeyError` for a key that is not there."""
        return self._places[key]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[Key]:
        """In order, at O(N log N) for all: for people, not for decisions."""
        return iter(sorted(self._places, key=lambda key: self._places[key]))
