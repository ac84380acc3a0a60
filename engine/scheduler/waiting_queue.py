"""The scheduler's waiting requests, in the gateway's order.

A request's place follows from its hints, its arrival time and its id alone. So one that was preempted or passed over
goes back to where it was, behind nobody whom it was ahead of: to prepend is to add. In vLLM's own queues it goes to the
front, ahead of more urgent ones, or by arrival among equals (vllm#41951).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from engine.hints import Hints, from_fields

# (hints, arrival time in seconds, request id): the smallest is scheduled first.
Place = tuple[Hints, float, str]


def hints_of(request: Any) -> Hints:
    """The request's hints, read once and then kept on the request: they live and die together.

    As an attribute like its own: to ask for `vars(request)` would make a dictionary of it, and every attribute that vLLM then
    reads of it, some dozens in each step, would take longer (CPython 3.11 to 3.13).
    """
    hints: Hints | None = getattr(request, "justitia_hints", None)
    if hints is None:
        params = request.sampling_params  # a pooling request has none
        hints = request.justitia_hints = from_fields(request.priority, params.extra_args if params else None)
    return hints


def retag(request: Any, tag: int) -> None:
    """The request has another tag from now on. Who queues it has to place it anew."""
    request.justitia_hints = hints_of(request)._replace(tag=tag)
    request.priority = tag


def place_of(request: Request) -> Place:
    return hints_of(request), request.arrival_time, request.request_id


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
        """One that waits already is placed anew: vLLM re-queues a streaming session that ended while preempted."""
        self.remove_requests((request,))
        slot: list[Request | None] = [request]
        self._slots[request.request_id] = slot
        self._added += 1
        heapq.heappush(self._heap, (place_of(request), self._added, slot))

    def prepend_request(self, request: Request) -> None:
        """Back to its own place, which need not be the front."""
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
            heapq.heappop(self._heap)
        raise IndexError("peek from an empty queue")

    def pop_request(self) -> Request:
        """Raises `IndexError` when nothing waits."""
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._slots[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        """Raises `ValueError` when it does not wait here, like vLLM's own queues."""
        if request.request_id not in self._slots:
            raise ValueError(f"request {request.request_id} does not wait here")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Those that do not wait here are passed over: vLLM asks each of its queues to remove the same list."""
        for request in requests:
            slot = self._slots.pop(request.request_id, None)
            if slot is not None:
                slot[0] = None
        # Not for a handful of entries: then nearly every removal would build it anew.
        if len(self._heap) > 2 * len(self._slots) + 16:
            self._heap = [entry for entry in self._heap if entry[2][0] is not None]
            heapq.heapify(self._heap)

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
        """In order, at O(n log n) for all: a view for tests; vLLM itself iterates on rare paths only."""
        for _, _, (request,) in sorted(self._heap):
            if request is not None:
                yield request
