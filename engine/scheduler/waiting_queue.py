"""The scheduler's waiting requests, in the gateway's order.

A request's place follows from its hints, its arrival time and its id alone. So one that was preempted or passed over
goes back to where it was, and to prepend is to add. In vLLM's own queues it goes to the front, ahead of more urgent ones, or
by arrival among equals (vllm#41951).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from engine.scheduler.order import Place, hints_of, place_of


class WaitingQueue(RequestQueue):  # type: ignore[misc, unused-ignore]  # Any, where mypy skips vLLM
    """A binary heap with lazy removal.

    Adding and popping cost O(log n); so does a removal, amortised: it marks the entry, and the heap is built anew once
    more than half of it is marked. The place is taken down when a request is added, so that a change of its arrival
    time, which vLLM makes to streaming sessions while they wait, cannot break the heap.
    """

    def __init__(self) -> None:
        # A marked entry's request is None. The number keeps the comparison of entries from reaching the request.
        self._heap: list[tuple[Place, int, list[Request | None]]] = []
        self._slots: dict[str, list[Request | None]] = {}
        self._added = 0

    def add_request(self, request: Request) -> None:
        """Adds it, or places it anew if it waits already: vLLM re-queues a streaming session that ended while preempted."""
        self.remove_requests((request,))
        slot: list[Request | None] = [request]
        self._slots[request.request_id] = slot
        self._added += 1
        heappush(self._heap, (place_of(request), self._added, slot))

    def prepend_request(self, request: Request) -> None:
        """Puts it back in its own place, which need not be the front."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def peek_request(self) -> Request:
        """Raises `IndexError` when nothing waits."""
        while self._heap:
            request = self._heap[0][2][0]
            if request is not None:
                return request
            heappop(self._heap)
        raise IndexError("peek from an empty queue")

    def pop_request(self) -> Request:
        """Raises `IndexError` when nothing waits."""
        request = self.peek_request()
        heappop(self._heap)
        del self._slots[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        """Raises `ValueError` when it does not wait here, like vLLM's own queues."""
        if request.request_id not in self._slots:
            raise ValueError(f"request {request.request_id} does not wait here")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Skips those that do not wait here: vLLM asks each of its queues to remove the same list."""
        for request in requests:
            slot = self._slots.pop(request.request_id, None)
            if slot is not None:
                slot[0] = None
        # Not for a handful of entries: then nearly every removal would build it anew.
        if len(self._heap) > 2 * len(self._slots) + 16:
            self._heap = [entry for entry in self._heap if entry[2][0] is not None]
            heapify(self._heap)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._slots

    def __bool__(self) -> bool:
        return bool(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def tasks(self) -> list[int]:
        """The gateway's numbers of all that wait, in no order."""
        return [hints_of(request).task for (request,) in self._slots.values() if request is not None]

    def __iter__(self) -> Iterator[Request]:
        """In order, at O(n log n) for all: for tests; vLLM itself iterates on rare paths only."""
        for _, _, (request,) in sorted(self._heap):
            if request is not None:
                yield request
