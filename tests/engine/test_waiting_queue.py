"""The waiting queue against a sorted list."""

from __future__ import annotations

import heapq

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.pooling_params import PoolingParams
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from engine.hints import AGENT_XARG, TASK_XARG, Hints
from engine.scheduler import waiting_queue
from engine.scheduler.order import hints_of, place_of
from engine.scheduler.waiting_queue import WaitingQueue

pytestmark = pytest.mark.vllm


def request(name: str, hints: Hints, arrival: float = 0.0) -> Request:
    xargs = {AGENT_XARG: hints.agent, TASK_XARG: hints.task}
    return Request(name, [1], SamplingParams(max_tokens=1, extra_args=xargs), None, 0, arrival, priority=hints.tag)


class AgainstASortedList(RuleBasedStateMachine):
    """Few tags, agents, tasks and times, so that there are many equals."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: RequestQueue = WaitingQueue()
        self.model: list[Request] = []
        self.popped: list[Request] = []
        self.made = 0

    @rule(tag=st.integers(-2, 2), agent=st.sampled_from("ab"), task=st.integers(0, 2), arrival=st.integers(0, 2))
    def add(self, tag: int, agent: str, task: int, arrival: int) -> None:
        self.made += 1
        new = request(f"r{self.made}", Hints(tag, agent, task), float(arrival))
        self.queue.add_request(new)
        self._insert(new)

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        assert self.queue.peek_request() is self.model[0]
        popped = self.queue.pop_request()
        assert popped is self.model.pop(0)
        self.popped.append(popped)

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def prepend(self, data: st.DataObject) -> None:
        back = data.draw(st.lists(st.sampled_from(self.popped), unique=True, min_size=1))
        self.queue.prepend_requests(back)
        for one in back:
            self.popped.remove(one)
            self._insert(one)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_some(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(self.model), unique=True))
        self.queue.remove_requests([*gone, *self.popped])  # those that are not there are passed over
        for one in gone:
            self.model.remove(one)
            self.popped.append(one)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.model))
        self.queue.remove_request(gone)
        self.model.remove(gone)
        with pytest.raises(ValueError, match="does not wait"):
            self.queue.remove_request(gone)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), arrival=st.integers(-5, 5))
    def a_waiting_request_changes_its_arrival(self, data: st.DataObject, arrival: int) -> None:
        """vLLM does so to streaming sessions. Its place is the one it was given."""
        one = data.draw(st.sampled_from(self.model))
        before = one.arrival_time
        one.arrival_time = float(arrival)
        assert list(self.queue) == self.model
        one.arrival_time = before

    @invariant()
    def same(self) -> None:
        assert list(self.queue) == self.model
        assert len(self.queue) == len(self.model)
        assert bool(self.queue) == bool(self.model)

    def _insert(self, one: Request) -> None:
        self.model.append(one)
        self.model.sort(key=place_of)


AgainstASortedList.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstASortedList = AgainstASortedList.TestCase


def test_an_empty_queue_gives_nothing() -> None:
    queue = WaitingQueue()
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(IndexError):
        queue.peek_request()


def test_adding_again_places_anew() -> None:
    queue = WaitingQueue()
    one = request("one", Hints(1, "a", 1), arrival=5.0)
    queue.add_request(one)
    queue.add_request(request("two", Hints(1, "a", 1), arrival=4.0))
    one.arrival_time = 3.0
    queue.add_request(one)
    assert [r.request_id for r in queue] == ["one", "two"]
    assert len(queue) == 2


def test_hints_are_read_once() -> None:
    one = request("one", Hints(3, "a", 9))
    assert hints_of(one) == Hints(3, "a", 9)
    one.priority = 4
    assert hints_of(one) is hints_of(one)
    assert hints_of(one).tag == 3


def test_a_pooling_request_has_a_tag_only() -> None:
    assert hints_of(Request("p", [1], None, PoolingParams(), priority=5)) == Hints(5, "", -1)


def test_aborts_one_by_one_do_not_cost_a_pass_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 aborts among 30,000 waiting. A pass over the queue for each would visit 450 million entries."""
    visited = 0

    def counting(heap: list[object]) -> None:
        nonlocal visited
        visited += len(heap)
        heapq.heapify(heap)

    monkeypatch.setattr(waiting_queue, "heapify", counting)
    queue = WaitingQueue()
    requests = [request(f"r{i}", Hints(i % 7, "a", i)) for i in range(30_000)]
    for one in requests:
        queue.add_request(one)
    for one in requests[::-1]:
        queue.remove_requests([one])
    assert not queue
    assert 0 < visited <= len(requests)
