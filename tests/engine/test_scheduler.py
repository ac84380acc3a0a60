"""Our scheduler on vLLM's real one: order, victims, places and reports. No engine, no model, no clock.

Each claim about victims and places has its control: the same scenario on vLLM's own priority scheduler, where it fails.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from engine.hints import Hints
from engine.link import PROTOCOL, Ended, Hello, Holding, Report, parse
from engine.scheduler import JustitiaScheduler, settings_of, victims_last
from engine.waiting_queue import hints_of
from tests.engine.clockwork import BLOCK_SIZE, Clockwork


@pytest.fixture(scope="module", autouse=True)
def vllm_is_quiet() -> Iterator[None]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    yield
    logging.getLogger("vllm").setLevel(logging.INFO)


def ours(clock: Clockwork) -> Report:
    assert isinstance(clock.scheduler, JustitiaScheduler)
    return clock.scheduler.report()


# Order


def test_tasks_run_by_tag_then_agent_then_task(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    clock.add("late", Hints(9, "a", 1), 10, 3)
    clock.add("b2", Hints(5, "b", 4), 10, 3)
    clock.add("b1", Hints(5, "b", 3), 10, 3)
    clock.add("a2", Hints(5, "a", 6), 10, 3)
    clock.add("urgent", Hints(-7, "z", 9), 10, 3)
    clock.add("no gateway", None, 10, 3)
    assert clock.run() == ["urgent", "no gateway", "a2", "b1", "b2", "late"]


def test_who_does_not_fit_is_not_overtaken(tiny_model_dir: Path) -> None:
    """The most urgent waits for memory, and what is behind it would fit: vLLM admits nobody past it."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=4)
    clock.add("runs", Hints(1, "a", 1), 2 * BLOCK_SIZE - 20, 10)
    clock.step()
    clock.add("large", Hints(2, "b", 2), 3 * BLOCK_SIZE, 2)
    clock.add("small", Hints(3, "c", 3), 4, 2)
    clock.step()
    assert clock.running() == {"runs"}
    assert clock.waiting() == ["large", "small"]
    assert clock.run() == ["runs", "large", "small"]


# Victims


def full_memory(scheduler_class: type[Scheduler], model: Path) -> Clockwork:
    """8 blocks: one for the urgent task, one for the small task of the later agent, and six for that agent's large one.

    The urgent one is the first to need another. By arrival, the large one is the last.
    """
    clock = Clockwork(scheduler_class, model, blocks=8)
    clock.add("urgent", Hints(1, "a", 1), BLOCK_SIZE - 2, 40)
    clock.add("small", Hints(2, "b", 2), 10, 40)
    clock.add("large", Hints(2, "b", 3), 6 * BLOCK_SIZE - 15, 40)
    clock.step()
    assert clock.running() == {"urgent", "small", "large"}
    assert clock.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    clock.until(lambda: bool(clock.preempted))
    return clock


def test_the_victim_is_of_the_last_agent_and_loses_the_least(tiny_model_dir: Path) -> None:
    clock = full_memory(JustitiaScheduler, tiny_model_dir)
    assert clock.preempted == ["small"]
    assert ours(clock).preempted == 1
    assert clock.waiting() == ["small"]
    clock.run()
    assert "urgent" not in clock.preempted


def test_control_vllm_preempts_the_one_that_loses_the_most(tiny_model_dir: Path) -> None:
    assert full_memory(AsyncScheduler, tiny_model_dir).preempted == ["large"]


def test_no_task_is_the_victim_of_a_later_one(tiny_model_dir: Path) -> None:
    """The later agent needs the block, and is its own victim, although it came first and has computed the most."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=5)
    clock.add("later", Hints(2, "b", 1), 4 * BLOCK_SIZE - 2, 30)
    clock.step()
    clock.add("urgent", Hints(1, "a", 2), 10, 20)
    clock.until(lambda: bool(clock.preempted))
    assert clock.preempted == ["later"]
    assert clock.run() == ["urgent", "later"]


# Places


def preempted_all(scheduler_class: type[Scheduler], model: Path) -> Clockwork:
    """Two agents of one tag. The tasks came in another order than the gateway numbered them; all lose their memory."""
    clock = Clockwork(scheduler_class, model, blocks=64)
    clock.add("b3", Hints(5, "b", 3), 40, 30)
    clock.add("a2", Hints(5, "a", 2), 40, 30)
    clock.add("b4", Hints(5, "b", 4), 40, 30)
    clock.add("a1", Hints(5, "a", 1), 40, 30)
    clock.step()
    clock.add("b9", Hints(5, "b", 9), 40, 30)  # waits: it is not yet scheduled
    clock.add("a7", Hints(5, "a", 7), 40, 30)
    clock.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(clock.preempted) == 4
    return clock


def test_a_preempted_task_keeps_its_place(tiny_model_dir: Path) -> None:
    clock = preempted_all(JustitiaScheduler, tiny_model_dir)
    assert clock.waiting() == ["a1", "a2", "a7", "b3", "b4", "b9"]


def test_control_vllm_goes_by_arrival(tiny_model_dir: Path) -> None:
    assert preempted_all(AsyncScheduler, tiny_model_dir).waiting() == ["b3", "a2", "b4", "a1", "b9", "a7"]


# Under load


@pytest.mark.parametrize("in_flight", [1, 2])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(16, 40), seqs=st.integers(2, 12))
def test_under_load(tiny_model_dir: Path, in_flight: int, seed: int, blocks: int, seqs: int) -> None:
    """Random arrivals, lengths, tags and aborts in a small memory: nothing is lost, and every victim is the last."""
    dice = random.Random(seed)
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=blocks, max_num_seqs=seqs, in_flight=in_flight)
    scheduler = clock.scheduler
    preempt: Any = scheduler._preempt_request

    def checked(request: Any, *args: Any, **kwargs: Any) -> None:
        assert all(hints_of(other)[:2] <= hints_of(request)[:2] for other in scheduler.running)
        assert all(
            other.num_computed_tokens >= request.num_computed_tokens
            for other in scheduler.running
            if hints_of(other)[:2] == hints_of(request)[:2]
        )
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = checked  # type: ignore[method-assign, unused-ignore]  # to listen in
    aborted = set()
    for number in range(40):
        agent = dice.randrange(6)
        hints = Hints(10 * agent, f"a{agent}", number) if dice.random() < 0.9 else None
        clock.add(f"r{number}", hints, dice.randint(1, 300), dice.randint(1, 60))
        for _ in range(dice.randrange(8)):
            clock.step()
        if dice.random() < 0.15:
            name = dice.choice([name for name in clock.requests if not clock.requests[name].is_finished()] or ["none"])
            clock.abort(name)
            aborted.add(name)
    clock.run()
    for name, request in clock.requests.items():
        assert request.is_finished()
        assert name in aborted or request.num_output_tokens == request.max_tokens
    report = ours(clock)
    assert (report.free_blocks, report.running, report.waiting, report.held) == (blocks, 0, 0, {})
    assert report.preempted == len(clock.preempted)


def test_the_order_of_victims_is_total(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    same = [clock.add(name, Hints(1, "a", 1), 10, 5) for name in "xy"]
    assert victims_last(same[0]) < victims_last(same[1])  # the one that came last


# Reports


def test_a_report_is_the_whole_state(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, max_num_seqs=2)
    before = ours(clock)
    assert (before.iteration, before.free_blocks, before.running, before.waiting) == (0, 8, 0, 0)
    clock.add("one", Hints(1, "a", 11), 40, 5)
    clock.add("unnamed", None, 5, 5)
    clock.add("waits", Hints(3, "b", 13), 5, 5)
    clock.step()
    clock.step()
    report = ours(clock)
    assert (report.iteration, report.running, report.waiting, report.preempted) == (2, 2, 1, 0)
    assert report.free_blocks == 8 - 2 - 1
    # The second step computed the first token that was put out, and put out another.
    assert report.held == {11: Holding(kv_tokens=41, output_tokens=2)}
    assert report.engine_id == before.engine_id
    clock.run()
    after = ours(clock)
    assert (after.free_blocks, after.running, after.waiting, after.held) == (8, 0, 0, {})


def test_a_task_of_several_requests_is_summed(tiny_model_dir: Path) -> None:
    """A body with `n` = 2 reaches the scheduler as two requests with the same hints."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    clock.add("first", Hints(1, "a", 5), 10, 9)
    clock.add("second", Hints(1, "a", 5), 20, 9)
    clock.step()
    assert ours(clock).held == {5: Holding(30, 2)}


def test_empty_steps_are_no_iterations(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    clock.add("one", None, 4, 3)
    clock.run()
    done = ours(clock).iteration
    assert done == 3
    clock.step()
    assert ours(clock).iteration == done


def test_cached_prefixes_are_free(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    tokens = list(range(3 * BLOCK_SIZE))
    clock.add("first", Hints(1, "a", 1), 0, 2, tokens)
    clock.run()
    assert ours(clock).free_blocks == 8
    clock.add("again", Hints(1, "a", 2), 0, 2, tokens)
    clock.step()
    # Two full blocks came from the cache: the step had one block's tokens to compute.
    assert clock.requests["again"].num_computed_tokens == 3 * BLOCK_SIZE
    assert ours(clock).free_blocks == 5


# The link


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc:///tmp/justitia-test-{uuid.uuid4().hex[:8]}.sock"


@pytest.fixture
def subscriber(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        yield socket
    Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def test_a_gateway_is_told_of_steps_and_of_aborts(
    tiny_model_dir: Path, address: str, subscriber: zmq.Socket[bytes]
) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, max_num_seqs=2, justitia={"link": address})
    try:
        hello = parse(subscriber.recv())
        assert hello == Hello(PROTOCOL, ours(clock).engine_id, vllm.__version__, 8, BLOCK_SIZE, 2, 2048)
        assert isinstance(hello, Hello)
        assert hello.capacity_tokens == 8 * BLOCK_SIZE
        assert parse(subscriber.recv()) == ours(clock)
        clock.add("one", Hints(1, "a", 7), 40, 50)
        clock.step()
        assert parse(subscriber.recv()) == ours(clock)
        assert ours(clock).held
        clock.abort("one")
        # One iteration: the prompt was computed, and the first token sampled.
        assert parse(subscriber.recv()) == Ended(ours(clock).engine_id, {7: 40.0})
        assert parse(subscriber.recv()) == ours(clock)
        assert (ours(clock).running, ours(clock).free_blocks) == (0, 8)
    finally:
        clock.scheduler.shutdown()


def test_an_address_that_cannot_be_bound_costs_the_link_only(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": "ipc:///nowhere/at/all.sock"})
    clock.add("one", None, 4, 3)
    assert clock.run() == ["one"]
    clock.scheduler.shutdown()


def test_only_the_first_data_parallel_rank_binds(tiny_model_dir: Path, address: str) -> None:
    first = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": address})
    second = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8, justitia={"link": address}, data_parallel_index=1)
    try:
        assert isinstance(first.scheduler, JustitiaScheduler)
        assert isinstance(second.scheduler, JustitiaScheduler)
        assert first.scheduler._link is not None
        assert second.scheduler._link is None
    finally:
        first.scheduler.shutdown()


@pytest.mark.parametrize("config", [None, {}, {"justitia": None}, {"justitia": {}}, {"other": {"link": "x"}}, "text"])
def test_no_address_no_link(config: Any) -> None:
    assert not settings_of(config).get("link")
