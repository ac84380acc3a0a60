"""The dispatcher before an engine that is made up: what it takes over of what the engine says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from engine.link import Holding
from gateway.config.settings import TenantSettings
from gateway.flowcontrol.engine_state import CAPACITY_ENOUGH, EngineView
from gateway.flowcontrol.fairqueue import (
    POLICIES,
    AgentId,
    FairQueue,
    Iterations,
    KvTokenIterations,
    QueueError,
    Spent,
    Task,
    TaskId,
)
from gateway.protocol.errors import AgentCancelled, NoEngine, QueueFull, ShuttingDown
from gateway.relay.dispatcher import CAPACITY_ITERATIONS, SLOTS_OF_STOCK, SLOTS_WITHOUT_CAPACITY, Dispatcher, Turn
from gateway.tenancy.keys import Keys
from gateway.tenancy.tenants import Tenants

CAPACITY = 1000


def tenants(max_waiting: int = 100) -> Tenants:
    return Tenants(Keys(), {}, max_waiting=max_waiting, max_waiting_bytes=10**9)


class OneTenant(Dispatcher):
    """All tasks are of one tenant."""

    def submit(self, task: Task, agent_cost: float, *_: object, **more: float) -> Turn:
        return super().submit(task, agent_cost, self._tenants.named("t"), **more)


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
    made = OneTenant(queue, engine, tenants())
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
    before = queue.virtual_time("t")
    assert before == (CAPACITY_ITERATIONS - 1) * CAPACITY
    report(to, 1, {1: Holding(400, 300)})
    assert queue.capacities[1:] == [(CAPACITY, pytest.approx(400))]
    assert queue.capacity_tokens == CAPACITY, "the memory is as large as ever"
    report(to, 10, {1: Holding(400, 300)})
    assert queue.virtual_time("t") - before == pytest.approx(CAPACITY + 10 * 400)
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
    Dispatcher(queue, engine, tenants()).engine_changed()
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
    full = OneTenant(queue, engine, tenants(max_waiting=0))
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


async def test_the_end_of_a_drain_hands_back_what_waits_and_breaks_off_what_is_in_flight() -> None:
    to, queue, _ = dispatcher(slots=1)

    async def serve(number: int) -> str:
        turn = to.submit(task(number), 1e5)
        where = "waiting"
        try:
            await turn.wait(10)
            where = "in flight"
            with turn.at_engine():
                await asyncio.Event().wait()
        except ShuttingDown:
            assert not turn.requeue(sent=True)
            return where
        finally:
            turn.cancel(Spent(KvTokenIterations(0.0)))
        return ""

    serving = [asyncio.create_task(serve(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    to.begin_drain(0)
    to.end_drain()
    assert await asyncio.gather(*serving) == ["in flight", "waiting"]
    await to.drained()
    assert (queue.waiting, queue.in_flight) == (0, 0)


# Who may have how much


def counts(to: Dispatcher) -> tuple[int, int, int]:
    load = to._tenants.named("t").load
    assert (load.waiting, load.in_flight) == (to.queue.waiting, to.queue.in_flight)
    assert vars(load).keys() == vars(to._tenants.load).keys()
    assert load.waiting_bytes == to._tenants.load.waiting_bytes
    return load.waiting, load.in_flight, load.waiting_bytes


async def test_a_tenants_load_is_what_it_has_in_the_queue() -> None:
    to, _, engine = dispatcher(slots=1)
    first = to.submit(task(1), 1e5, body_bytes=10)
    assert counts(to) == (0, 1, 0)
    second = to.submit(task(2), 1e5, body_bytes=20)
    third = to.submit(task(3), 1e5, body_bytes=40)
    assert counts(to) == (2, 1, 60)
    third.cancel(Spent(KvTokenIterations(0.0)))
    assert counts(to) == (1, 1, 20)
    await first.wait(1)
    engine.suspect = True
    assert first.requeue(sent=True)
    assert counts(to) == (2, 0, 30)
    engine.answered()
    to.engine_changed()
    assert counts(to) == (1, 1, 20)
    first.complete(Spent(KvTokenIterations(500.0), 100, 5), 500.0)
    assert counts(to) == (1, 0, 20)
    await second.wait(1)
    assert counts(to) == (0, 1, 0)
    second.cancel(Spent(KvTokenIterations(3.0)))
    assert counts(to) == (0, 0, 0)


async def test_a_task_that_the_engine_lost_leaves_as_one_that_waits() -> None:
    to, _, engine = dispatcher()
    turn = to.submit(task(1), 1e5, body_bytes=10)
    await turn.wait(1)
    engine.suspect = True
    turn.requeue(sent=True)
    turn.cancel(Spent(KvTokenIterations(0.0)))
    assert counts(to) == (0, 0, 0)


async def test_a_task_that_the_queue_refuses_leaves_nothing_behind() -> None:
    to, _, _ = dispatcher()
    with pytest.raises(QueueError):
        to.submit(task(1), float("nan"), body_bytes=10)
    assert counts(to) == (0, 0, 0)


async def test_a_turn_whose_cost_the_queue_refuses_can_still_be_given_back() -> None:
    to, _, _ = dispatcher()
    turn = to.submit(task(1), 1e5)
    with pytest.raises(QueueError):
        turn.cancel(Spent(KvTokenIterations(-1.0)))
    assert counts(to) == (0, 1, 0)
    turn.cancel(Spent(KvTokenIterations(0.0)))
    assert counts(to) == (0, 0, 0)


async def test_tenants_are_told_apart_in_the_queue() -> None:
    engine = EngineView(declared_capacity_tokens=CAPACITY, declared_max_num_seqs=1, up=True)
    queue = FairQueue(POLICIES["justitia"]())
    settings = {"red": TenantSettings(weight=2.0), "blue": TenantSettings(max_tasks=1)}
    both = Tenants(Keys(), settings, max_waiting=100, max_waiting_bytes=1000)
    to = Dispatcher(queue, engine, both)
    to.submit(task(1, "red/a"), 1e5, both.named("red"), weight=3.0)
    to.submit(task(2, "blue/a"), 1e5, both.named("blue"))
    with pytest.raises(QueueFull, match=r"max_tasks"):
        to.submit(task(3, "blue/b"), 1e5, both.named("blue"))
    red, blue = queue.agents["red/a"], queue.agents["blue/a"]
    assert (red.tenant.id, red.tenant.weight, red.weight) == ("red", 2.0, 3.0)
    assert (blue.tenant.id, blue.tenant.weight, blue.weight) == ("blue", 1.0, 1.0)
    assert "blue/b" not in queue.agents


# Turns that somebody else ends


async def test_an_agents_tasks_can_be_ended_waiting_and_in_flight() -> None:
    to, _, _ = dispatcher(slots=1)
    in_flight, waiting, other = (to.submit(task(number, agent), 1e5) for number, agent in enumerate("aab", start=1))
    await in_flight.wait(1)
    seen: list[str] = []

    async def serve() -> None:
        try:
            with in_flight.at_engine():
                await asyncio.Event().wait()
        except AgentCancelled as error:
            seen.append(error.message)
            in_flight.cancel(Spent(KvTokenIterations(3.0)))

    async def wait() -> None:
        try:
            await waiting.wait(5)
        except AgentCancelled as error:
            seen.append(error.message)
            waiting.cancel(Spent(KvTokenIterations(0.0)))

    owners = [asyncio.create_task(serve()), asyncio.create_task(wait())]
    await asyncio.sleep(0)
    ends = to.abort(AgentId("a"), AgentCancelled("over"))
    assert ends == to.abort(AgentId("a"), AgentCancelled("again")), "once"
    assert [end.done() for end in ends] == [False, False]
    await asyncio.gather(*owners, *ends)
    assert seen == ["over", "over"]
    assert {owner.cancelling() for owner in owners} == {0}
    assert (await other.wait(1)).task.agent_id == "b"
    assert to.abort(AgentId("a"), AgentCancelled("over")) == []
    assert to.abort(AgentId("nobody"), AgentCancelled("over")) == []


async def test_a_turn_that_was_ended_between_its_release_and_the_engine_does_not_get_there() -> None:
    to, _, _ = dispatcher()
    turn = to.submit(task(1), 1e5)
    to.abort(AgentId("a"), AgentCancelled("over"))
    await turn.wait(1)
    with pytest.raises(AgentCancelled), turn.at_engine():
        pytest.fail("it got there")
    turn.cancel(Spent(KvTokenIterations(0.0)))


async def test_a_turn_that_was_ended_is_not_served_when_the_engine_loses_it() -> None:
    to, _, _ = dispatcher()
    turn = to.submit(task(1), 1e5)
    await turn.wait(1)
    to.abort(AgentId("a"), AgentCancelled("over"))
    assert turn.requeue(sent=True)
    with pytest.raises(AgentCancelled):
        await turn.wait(1)
    turn.cancel(Spent(KvTokenIterations(0.0)))
    assert counts(to) == (0, 0, 0)


async def test_a_client_that_leaves_as_its_agent_is_ended_has_left() -> None:
    to, _, _ = dispatcher()
    turn = to.submit(task(1), 1e5)
    await turn.wait(1)

    async def serve() -> None:
        with turn.at_engine():
            await asyncio.Event().wait()

    owner = asyncio.create_task(serve())
    await asyncio.sleep(0)
    owner.cancel()
    to.abort(AgentId("a"), AgentCancelled("over"))
    with pytest.raises(asyncio.CancelledError):
        await owner
    turn.cancel(Spent(KvTokenIterations(0.0)))


# How fast the engine is


async def test_the_served_rate_is_what_was_held_over_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("gateway.relay.dispatcher.time.monotonic", lambda: now)
    to, _, _ = dispatcher()
    report(to, 10, {}, 500)
    turn = to.submit(task(1), 1e5)
    assert to.rate.per_s() is None
    for _ in range(4):
        now += 0.5
        report(to, 10, {}, 500)
    assert to.rate.per_s() == pytest.approx(10_000)
    turn.cancel(Spent(KvTokenIterations(0.0)))
    now += 1000
    report(to, 1, {}, 500)
    assert to.rate.per_s() == pytest.approx(10_000), "idle time says nothing"
    to.submit(task(2), 1e5)
    for _ in range(600):
        now += 0.5
        report(to, 10, {}, 50)
    assert to.rate.per_s() == pytest.approx(1000, rel=0.01), "and what is long ago is forgotten"


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


# Another policy, other limits


async def test_a_change_of_policy_is_told_before_anything_is_released_by_it() -> None:
    to, queue, engine = dispatcher(slots=2)
    listening = Listening(to)
    to.submit(task(1), 20_000.0)
    to.submit(task(2, "b"), 30_000.0)
    waiting = to.submit(task(3, "c"), 90_000.0)
    to.submit(task(4, "d", prompt=10, output=10), 95_000.0)
    engine.declared_max_num_seqs = 3
    to.change(POLICIES["sjf"](), beta=1.0, engine_waiting=4)
    assert listening.tags == [{1: 15_050, 2: 15_050}], "the costs of the tasks"
    assert queue.in_flight == 3 and not waiting._released.done(), "the smaller one goes first"
    to.change(None, beta=1.0, engine_waiting=4)
    assert len(listening.tags) == 1


async def test_a_change_of_policy_is_told_when_the_engine_is_known_to_live() -> None:
    to, _, engine = dispatcher(slots=2)
    listening = Listening(to)
    to.submit(task(1), 20_000.0)
    engine.suspect = True
    to.change(POLICIES["fcfs"](), beta=1.0, engine_waiting=4)
    assert listening.tags == []
    engine.answered()
    to.engine_changed()
    assert listening.tags == [{1: 1}]


async def test_other_limits_hold_at_once() -> None:
    to, queue, _ = dispatcher(slots=9)
    for number in range(1, 10):
        to.submit(task(number), 1e5)
    assert queue.in_flight == 5, "of 200 tokens each"
    to.change(None, beta=1.5, engine_waiting=4)
    assert queue.in_flight == 7
