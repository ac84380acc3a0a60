"""The dispatcher before an engine that is made up: what it takes over of what the engine says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from engine.link import Holding
from gateway.capacity import CAPACITY_ENOUGH, EngineView
from gateway.errors import NoEngine, QueueFull, ShuttingDown
from gateway.fairness import POLICIES, AgentId, FairQueue, Iterations, KvTokenIterations, Spent, Task, TaskId
from gateway.release import CAPACITY_ITERATIONS, SLOTS_OF_STOCK, SLOTS_WITHOUT_CAPACITY, Dispatcher

CAPACITY = 1000


class Told(FairQueue):
    """A fair queue that notes what it is told of the engine."""

    def __init__(self, policy: str = "justitia") -> None:
        super().__init__(POLICIES[policy]())
        self.observed: list[tuple[int, float, float]] = []
        self.calibrated: list[float] = []
        self.capacities: list[tuple[float, float | None]] = []

    def observe(self, now: Iterations, task_id: TaskId, kv_tokens: float, output_tokens: float) -> None:
        self.observed.append((task_id, kv_tokens, output_tokens))
        super().observe(now, task_id, kv_tokens, output_tokens)

    def calibrate(self, now: Iterations, held_tokens: float) -> None:
        self.calibrated.append(held_tokens)
        super().calibrate(now, held_tokens)

    def set_capacity(self, now: Iterations, tokens: float, served_tokens: float | None = None) -> None:
        self.capacities.append((tokens, served_tokens))
        super().set_capacity(now, tokens, served_tokens)


def task(number: int, agent: str = "a", prompt: int = 100, output: int = 100) -> Task:
    cost = KvTokenIterations(prompt * output + output * (output + 1) / 2)
    return Task(TaskId(number), AgentId(agent), cost, prompt + output, prompt)


def dispatcher(policy: str = "justitia", *, slots: int = 2) -> tuple[Dispatcher, Told, EngineView]:
    engine = EngineView(declared_capacity_tokens=CAPACITY, declared_max_num_seqs=slots, up=True)
    queue = Told(policy)
    made = Dispatcher(queue, engine, max_waiting=100)
    made.engine_changed()
    return made, queue, engine


def report(to: Dispatcher, iterations: float, held: dict[int, Holding], held_tokens: float | None = None) -> None:
    """So many iterations later, the engine holds that."""
    engine = to.engine
    engine.iterations += iterations
    engine.held = held
    total = sum(holding.kv_tokens for holding in held.values())
    engine.held_tokens = total if held_tokens is None else held_tokens
    to.engine_spoke()


async def test_what_is_held_is_observed_and_calibrates_only_when_all_in_flight_decode() -> None:
    to, queue, _ = dispatcher()
    for number in (1, 2):
        to.submit(task(number), 1e5)
    assert queue.in_flight == 2
    report(to, 1, {1: Holding(64, 0)}, 64)
    report(to, 1, {1: Holding(101, 1), 2: Holding(50, 0)}, 160)
    report(to, 1, {1: Holding(102, 2)}, 112)
    assert queue.calibrated == []
    report(to, 1, {1: Holding(103, 3), 2: Holding(101, 1)}, 224)
    assert queue.calibrated == [224]
    assert queue.observed[-2:] == [(1, 103, 3), (2, 101, 1)]
    report(to, 1, {}, 0)
    assert queue.calibrated == [224]


async def test_calibration_moves_what_is_predicted_towards_what_is_held() -> None:
    to, queue, engine = dispatcher()
    to.submit(task(1), 1e5)
    before = queue.peak_tokens
    report(to, 1, {1: Holding(101, 1)}, 202)
    assert before == pytest.approx(200)
    assert queue.peak_tokens == pytest.approx(200 * 1.01)
    assert engine.now == 1


async def test_the_effective_capacity_is_taken_over_now_and_then() -> None:
    to, queue, _ = dispatcher(slots=1)
    for number in (1, 2):
        to.submit(task(number, output=2000), 1e9)
    assert (queue.in_flight, queue.waiting) == (1, 1)
    assert queue.capacities == [(CAPACITY, CAPACITY)]
    report(to, CAPACITY_ITERATIONS - 1, {1: Holding(400, 300)})
    assert queue.capacities == [(CAPACITY, CAPACITY)], "not yet"
    before = queue.virtual_time()
    assert before == (CAPACITY_ITERATIONS - 1) * CAPACITY
    report(to, 1, {1: Holding(400, 300)})
    assert queue.capacities[1:] == [(CAPACITY, pytest.approx(400))]
    assert queue.capacity_tokens == CAPACITY, "the memory is as large as ever"
    report(to, 10, {1: Holding(400, 300)})
    assert queue.virtual_time() - before == pytest.approx(CAPACITY + 10 * 400)
    assert len(queue.capacities) == 2


async def test_iterations_while_nothing_waits_say_nothing_of_capacity() -> None:
    to, queue, _ = dispatcher()
    to.submit(task(1, output=2000), 1e9)
    report(to, 10 * CAPACITY_ENOUGH, {1: Holding(400, 300)})
    assert queue.capacities[-1] == (CAPACITY, CAPACITY)


async def test_shared_blocks_are_held_once() -> None:
    to, queue, _ = dispatcher(slots=2)
    for number in (1, 2, 3):
        to.submit(task(number, output=2000), 1e9)
    report(to, CAPACITY_ITERATIONS, {1: Holding(400, 300), 2: Holding(400, 300)}, 500)
    assert queue.capacities[-1] == (CAPACITY, 500)


async def test_a_stock_engine_says_nothing_of_tasks_and_is_taken_at_its_word() -> None:
    to, queue, _ = dispatcher(slots=1)
    for number in (1, 2):
        to.submit(task(number), 1e9)
    for _ in range(3):
        report(to, CAPACITY_ITERATIONS, {}, 700)
    assert (queue.observed, queue.calibrated) == ([], [])
    assert set(queue.capacities) == {(CAPACITY, CAPACITY)} and len(queue.capacities) == 4


async def test_another_capacity_is_taken_over_at_once() -> None:
    to, queue, engine = dispatcher()
    engine.declared_capacity_tokens = 500
    to.engine_changed()
    assert queue.capacities[-1] == (500, 500)


@pytest.mark.parametrize(
    ("declared", "capacity", "told", "slots"),
    [
        (3, 0, None, 3),
        (3, 1000, 64, 3),
        (None, 0, None, SLOTS_WITHOUT_CAPACITY),
        (None, 1000, None, SLOTS_OF_STOCK + 4),
        (None, 1000, 64, 64 + 4),
    ],
)
async def test_tasks_at_the_engine_at_once(declared: int | None, capacity: int, told: int | None, slots: int) -> None:
    engine = EngineView(declared_max_num_seqs=declared, up=True)
    engine.engine_capacity_tokens, engine.engine_max_num_seqs = capacity, told
    queue = Told()
    Dispatcher(queue, engine, max_waiting=10).engine_changed()
    assert queue.limits.in_flight == slots
    assert queue.limits.engine_waiting == 4


@pytest.mark.parametrize(("policy", "third"), [("vtc", "b"), ("las", "b"), ("fcfs", "a")])
async def test_progress_moves_who_goes_next(policy: str, third: str) -> None:
    """Both have one task at the engine and one waiting. That of a has produced more."""
    to, queue, _ = dispatcher(policy)
    for number, agent in enumerate("abab", start=1):
        to.submit(task(number, agent), 1e5)
    assert queue.in_flight == 2
    report(to, 50, {1: Holding(150, 50), 2: Holding(105, 5)})
    assert next(queue.in_order()).id == third
    if policy != "fcfs":
        report(to, 50, {1: Holding(150, 50), 2: Holding(160, 60)})
        assert next(queue.in_order()).id == "a", "and back"


async def test_turns_are_granted_as_others_end_and_nothing_goes_to_an_engine_that_is_not_there() -> None:
    to, queue, engine = dispatcher(slots=1)
    first, second = to.submit(task(1), 1e5), to.submit(task(2, "b"), 1e5)
    assert (await first.wait(1)).task.id == 1
    waiting = asyncio.create_task(second.wait(5))
    await asyncio.sleep(0)
    engine.suspect = True
    first.complete(Spent(KvTokenIterations(500.0), 100, 5), 500.0)
    await asyncio.sleep(0)
    assert not waiting.done() and queue.in_flight == 0
    engine.answered()
    to.engine_changed()
    assert (await waiting).task.id == 2
    second.cancel(Spent(KvTokenIterations(0.0)))
    second.cancel(Spent(KvTokenIterations(0.0)))  # settled already
    assert (queue.in_flight, queue.waiting) == (0, 0)


async def test_what_cannot_be_taken_is_refused_and_not_enqueued() -> None:
    to, queue, engine = dispatcher()
    engine.lost()
    with pytest.raises(NoEngine):
        to.submit(task(1), 1.0)
    engine.answered()
    full = Dispatcher(queue, engine, max_waiting=0)
    with pytest.raises(QueueFull):
        full.submit(task(1), 1.0)
    to.begin_drain(10)
    await to.drained()
    with pytest.raises(ShuttingDown):
        to.submit(task(1), 1.0)
    assert (queue.waiting, queue.in_flight) == (0, 0)


async def test_a_drain_goes_on_releasing_what_waits_and_may_requeue_what_was_lost() -> None:
    to, queue, engine = dispatcher(slots=1)
    first, second = to.submit(task(1), 1e5), to.submit(task(2, "b"), 1e5)
    to.begin_drain(10)
    with pytest.raises(ShuttingDown) as refused:
        to.submit(task(3), 1e5)
    assert 5 <= (refused.value.retry_after_s or 0) <= 10
    assert (await first.wait(1)).task.id == 1
    engine.lost()
    assert first.requeue(sent=True)
    assert (queue.waiting, queue.in_flight) == (2, 0)
    engine.answered()
    to.engine_changed()
    first.complete(Spent(KvTokenIterations(500.0), 100, 5), 500.0)
    await asyncio.sleep(0)
    assert (await second.wait(1)).task.id == 2
    drained = asyncio.create_task(to.drained())
    await asyncio.sleep(0)
    assert not drained.done()
    second.cancel(Spent(KvTokenIterations(0.0)))
    await drained


async def test_the_end_of_a_drain_hands_back_what_waits_and_cancels_whoever_has_a_task_in_flight() -> None:
    to, queue, _ = dispatcher(slots=1)

    async def serve(number: int) -> str:
        turn = to.submit(task(number), 1e5)
        try:
            await turn.wait(10)
            await asyncio.Event().wait()
        except ShuttingDown:
            return "handed back"
        except asyncio.CancelledError:
            assert not turn.requeue(sent=True)
            return "cut off"
        finally:
            turn.cancel(Spent(KvTokenIterations(0.0)))
        return ""

    serving = [asyncio.create_task(serve(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    to.begin_drain(0)
    to.end_drain()
    to.end_drain()
    assert await asyncio.gather(*serving) == ["cut off", "handed back"]
    await to.drained()
    assert (queue.waiting, queue.in_flight) == (0, 0)


# What the engine is told


class Listening:
    """An engine that can be told."""

    def __init__(self, to: Dispatcher) -> None:
        self.tags: list[dict[int, int]] = []
        to.tell = self.tell
        to.engine.reporting = True

    def tell(self, tags: Mapping[int, int] | None = None, keep: Mapping[str, int] | None = None) -> None:
        assert not keep
        self.tags.append(dict(tags or {}))


async def test_new_tags_of_tasks_in_flight_are_told() -> None:
    to, _, _ = dispatcher(slots=2)
    listening = Listening(to)
    to.submit(task(1), 20_000.0)
    to.submit(task(2, "b"), 30_000.0)
    assert listening.tags == [], "a release carries its rank"
    to.submit(task(3), 70_000.7)
    assert listening.tags == [{1: 70_000}]
    report(to, 1, {1: Holding(101, 1)})
    to.pump()
    assert len(listening.tags) == 1, "once"


async def test_with_what_a_task_really_took_the_others_of_its_agent_move() -> None:
    to, _, _ = dispatcher(slots=2)
    listening = Listening(to)
    first, second = to.submit(task(1), 30_100.0), to.submit(task(2), 30_100.0)
    third = to.submit(task(3, "b"), 1e6)
    for turn in (first, second):
        await turn.wait(1)
    first.complete(Spent(KvTokenIterations(100_000.0), 100, 400), 123_456.0)
    await asyncio.sleep(0)
    assert listening.tags == [{2: 123_456}]
    second.cancel(Spent(KvTokenIterations(0.0)))
    third.cancel(Spent(KvTokenIterations(0.0)))
    assert len(listening.tags) == 1


async def test_a_tag_beyond_what_the_engine_can_hold_is_the_nearest() -> None:
    to, _, _ = dispatcher()
    listening = Listening(to)
    to.submit(task(1), 20_000.0)
    to.submit(task(2), 1e30)
    assert listening.tags == [{1: 2**63 - 1}]


@pytest.mark.parametrize("policy", ["fcfs", "vtc", "srjf"])
async def test_other_policies_tell_nothing(policy: str) -> None:
    to, _, _ = dispatcher(policy)
    listening = Listening(to)
    for number in range(1, 6):
        to.submit(task(number, output=100 * number), 1e5 * number)
        report(to, 1, {1: Holding(100 + number, number)})
    assert listening.tags == []


async def test_what_was_revised_while_nobody_could_be_told_is_told_later() -> None:
    """The link may begin after the first task, or anew: what it missed is not lost."""
    to, _, engine = dispatcher()
    to.submit(task(1), 20_000.0)
    to.submit(task(2, "b"), 20_001.0)
    to.submit(task(3), 40_000.0)
    to.submit(task(4), 60_000.0)
    listening = Listening(to)
    to.pump()
    assert listening.tags == [{1: 60_000}], "the last one alone"
    engine.suspect = True
    to.submit(task(5), 90_000.0)
    assert len(listening.tags) == 1, "not while it is not known whether the engine lives"
    engine.answered()
    to.engine_changed()
    assert listening.tags[1:] == [{1: 90_000}]
