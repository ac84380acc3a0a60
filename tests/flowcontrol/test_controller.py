"""The verbs of flow control: what is taken, what goes to the engine, what comes back, and what engines report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import msgspec
import pytest

from gateway.flowcontrol import ENGINE, Options
from gateway.flowcontrol.engine_state import (
    CAPACITY_ENOUGH,
    CAPACITY_ITERATIONS,
    SLOTS_OF_STOCK,
    SLOTS_WITHOUT_CAPACITY,
    ServedCapacity,
    ServedRate,
)
from gateway.flowcontrol.fairqueue import POLICIES, AgentId, ReleaseLimits, TaskId, TenantId
from gateway.flowcontrol.quotas import NoLimits
from gateway.protocol.errors import (
    BodyTooLarge,
    GatewayError,
    NoEngine,
    Outcome,
    QueueFull,
    QuotaSpent,
    Reason,
    ShuttingDown,
)
from predictor.types import TaskContent
from tests.flowcontrol.scene import CONTENT, COST, Scene

LONG = TaskContent(prompt_bytes=400)  # 100 tokens
M = 1000


def counts(scene: Scene) -> tuple[int, int, int]:
    scene.check()
    load = scene.quotas.load
    return load.waiting, load.in_flight, load.waiting_bytes


# Arrival


def down(scene: Scene) -> None:
    scene.flow.engine_checked(scene.now, False)


def full(scene: Scene) -> None:
    scene.quotas.max_waiting = 0


def draining(scene: Scene) -> None:
    scene.flow.begin_drain(scene.now, 10)


def spent(scene: Scene) -> None:
    scene.quotas.set_limits(scene.now, {"t": NoLimits(kv_per_day=1.0)})
    scene.quotas.account("t", 0).kv_today.add(scene.now.wall_s, 1.0)


def no_number(*_: float) -> float:
    return math.nan


def costs_no_number(scene: Scene) -> None:
    scene.flow.change(Options(cost=no_number))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("when", "error", "facts"),
    [
        (down, NoEngine, {}),
        (full, QueueFull, {}),
        (draining, ShuttingDown, {}),
        (spent, QuotaSpent, {}),
        (full, BodyTooLarge, {"body_bytes": 10**6 + 1}),
        (costs_no_number, ValueError, {}),
    ],
)
def test_what_cannot_be_taken_is_refused_and_nothing_has_changed(
    when: Callable[[Scene], None], error: type[Exception], facts: dict[str, object], known: bool
) -> None:
    """Whether or not the agent is there, and whatever the request declares of it."""
    scene = Scene()
    scene.quotas.account("t", 0)
    if known:
        scene.serve(held=5.0)
        scene.arrive()
    when(scene)
    if error is BodyTooLarge:
        scene.quotas.max_waiting = 100
    scene.pass_s(1)
    before = scene.contents()
    with pytest.raises(error) as refused:
        scene.arrive(alias="sub", final=True, expected_tasks=9, agent_class="other", **facts)
    assert scene.contents() == before
    if error in (NoEngine, ShuttingDown, QueueFull, QuotaSpent):
        assert isinstance(refused.value, GatewayError) and (refused.value.retry_after_s or 0) >= 1
    scene.check()


def test_a_weight_that_cannot_be_is_refused_with_the_agent() -> None:
    scene = Scene()
    scene.quotas.account("t", 0)
    before = scene.contents()
    with pytest.raises(ValueError, match="weights must be positive"):
        scene.arrive(weight=-1.0)
    assert scene.contents() == before
    assert scene.there() == set()


def test_a_number_comes_once() -> None:
    scene = Scene()
    task = scene.arrive()
    scene._numbers = iter([task])  # type: ignore[assignment]
    before = scene.contents()
    with pytest.raises(ValueError, match="in the queue already"):
        scene.arrive()
    assert scene.contents() == before


def test_a_gateway_that_shuts_down_says_when_the_next_one_should_be_there() -> None:
    scene = Scene()
    scene.flow.begin_drain(scene.now, 12.5)
    scene.flow.begin_drain(scene.now, 99)
    for passed_s, retry_after_s in [(0, 13), (2, 11), (6, 5), (100, 5)]:
        scene.pass_s(passed_s)
        with pytest.raises(ShuttingDown) as refused:
            scene.arrive()
        assert (refused.value.retry_after_s, refused.value.reason) == (retry_after_s, Reason.DRAINING)
    anew = Scene()
    anew.flow.begin_drain(anew.now, 1e9)
    with pytest.raises(ShuttingDown) as refused:
        anew.arrive()
    assert refused.value.retry_after_s == 30


def test_tenants_are_kept_apart_in_the_queue() -> None:
    limits = {"red": NoLimits(weight=2.0), "blue": NoLimits(max_tasks=1)}
    scene = Scene(limits=limits, slots=1)
    scene.arrive("a", "red", weight=3.0)
    scene.arrive("a", "blue")
    with pytest.raises(QueueFull, match="max_tasks"):
        scene.arrive("b", "blue")
    red, blue = scene.queue.agents[AgentId("red/a")], scene.queue.agents[AgentId("blue/a")]
    assert (red.tenant.id, red.tenant.weight, red.weight) == ("red", 2.0, 3.0)
    assert (blue.tenant.id, blue.tenant.weight, blue.weight) == ("blue", 1.0, 1.0)
    assert scene.there() == {"red/a", "blue/a"}


def test_a_task_is_predicted_at_its_arrival_and_no_longer_than_the_engine_can_make_it() -> None:
    scene = Scene()
    scene.hello(max_model_len=12)
    task = scene.flow.tasks[scene.arrive(content=msgspec.structs.replace(CONTENT, sequences=2))]
    assert (task.estimate.prompt_tokens, task.estimate.memory_tokens) == (20, 24)
    assert scene.queue.agents[AgentId("t/a")].waiting[task.id].sequences == 2
    assert (task.estimate.cost, task.estimate.row) == (2 * (10 * 2 + 3), b"row")


# Release


def test_a_load_is_what_is_in_the_queue_and_at_the_engine() -> None:
    scene = Scene(slots=1)
    first = scene.released(body_bytes=10)
    assert counts(scene) == (0, 1, 0)
    second, third = scene.arrive(body_bytes=20), scene.arrive(body_bytes=40)
    assert scene.release() == [] and counts(scene) == (2, 1, 60)
    scene.settle(third, Outcome.CANCELLED, None)
    assert counts(scene) == (1, 1, 20)
    assert scene.lose(first) and counts(scene) == (2, 0, 30)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [first] and counts(scene) == (1, 1, 20)
    scene.settle(first)
    assert counts(scene) == (1, 0, 20)
    assert scene.release() == [second] and counts(scene) == (0, 1, 0)
    scene.settle(second, Outcome.CANCELLED, None)
    scene.check_over()


def test_the_time_that_a_task_waits_is_added_up_over_its_stays() -> None:
    scene = Scene()
    task = scene.arrive()
    live = scene.flow.tasks[task]
    scene.pass_s(2)
    scene.release()
    scene.report(iterations=5)
    assert (live.queued_s, live.since_s, live.released_at, live.waiting) == (2, 2, 0, False)
    scene.pass_s(3)
    assert scene.lose(task)
    assert (live.queued_s, live.since_s, live.released_at, live.waiting) == (2, 5, None, True)
    scene.pass_s(4)
    scene.flow.engine_checked(scene.now, True)
    scene.release()
    assert (live.queued_s, live.since_s, live.released_at) == (6, 9, 5)
    scene.pass_s(1)
    scene.settle(task)
    assert (live.queued_s, live.arrived_s) == (6, 0)


def test_a_task_that_ends_waiting_has_waited_until_then() -> None:
    scene = Scene()
    task = scene.arrive()
    live = scene.flow.tasks[task]
    scene.pass_s(2)
    scene.settle(task, Outcome.CANCELLED, None)
    assert live.queued_s == 2


@pytest.mark.parametrize("why", ["down", "suspect", "cut off", "backing off"])
def test_nothing_goes_to_an_engine_that_may_not_be_there(why: str) -> None:
    scene = Scene(slots=2)
    first, task = scene.released(), scene.arrive()
    if why == "down":
        scene.flow.engine_checked(scene.now, False)
    if why in ("suspect", "backing off"):
        scene.lose(first, reached=why == "suspect", retry=False)
    if why == "backing off":
        scene.flow.engine_checked(scene.now, True)
    if why == "cut off":
        scene.flow.end_drain()
    assert scene.release() == []
    scene.flow.engine_checked(scene.now, None)
    assert scene.release() == [], "it is not known to live"
    scene.pass_s(0.25)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [task] * (why != "cut off")


def test_a_drain_goes_on_releasing_what_waits_and_puts_back_what_was_lost() -> None:
    scene = Scene(slots=1)
    first, second = scene.released(), scene.arrive("b")
    scene.flow.begin_drain(scene.now, 10)
    assert scene.lose(first) and counts(scene) == (2, 0, 0)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [first]
    scene.settle(first)
    assert scene.release() == [second]
    rejected = scene.flow.end_drain()
    assert [(each.task_id, type(each.error), each.error.retry_after_s) for each in rejected] == [
        (second, ShuttingDown, 5)
    ]
    assert not scene.lose(second), "nothing waits any more"
    scene.settle(second, Outcome.REJECTED, None)
    scene.check_over()


# Waiting for too long


def expired(scene: Scene) -> list[TaskId]:
    return [rejected.task_id for rejected in scene.flow.expire(scene.now)]


def test_tasks_expire_in_the_order_in_which_their_time_runs_out() -> None:
    limits = {"short": NoLimits(max_queue_s=5)}
    scene = Scene(limits=limits, options=Options(max_queue_s=20), slots=1)
    assert scene.flow.next_expiry_s is None and expired(scene) == []
    lost = scene.released()
    scene.pass_s(1)
    first = scene.arrive()
    scene.pass_s(1)
    second, short = scene.arrive("b"), scene.arrive("a", "short")
    assert scene.flow.next_expiry_s == 7
    scene.pass_s(5)
    (rejected,) = scene.flow.expire(scene.now)
    assert rejected.task_id == short and "waited for 5 s" in rejected.error.message
    assert expired(scene) == [], "each is named once"
    assert scene.flow.next_expiry_s == 21
    assert scene.lose(lost), "it has not waited yet"
    assert scene.flow.next_expiry_s == 21
    scene.pass_s(13.9)
    assert expired(scene) == []
    scene.pass_s(0.1)
    assert expired(scene) == [first] and scene.flow.next_expiry_s == 22
    scene.pass_s(6)
    assert expired(scene) == [second, lost] and scene.flow.next_expiry_s is None
    for task in (first, second, lost, short):
        scene.settle(task, Outcome.EXPIRED, None)
    scene.check_over()


def test_of_the_time_that_a_task_may_wait_its_earlier_stays_are_taken_off() -> None:
    scene = Scene(options=Options(max_queue_s=20))
    task = scene.arrive()
    scene.pass_s(15)
    scene.release()
    scene.pass_s(100)
    scene.lose(task)
    later = scene.arrive()
    assert scene.flow.next_expiry_s == 120
    scene.pass_s(5)
    (rejected,) = scene.flow.expire(scene.now)
    assert rejected.task_id == task and "waited for 20 s" in rejected.error.message
    scene.pass_s(15)
    assert expired(scene) == [later]


def test_a_task_that_has_expired_and_is_released_before_it_is_settled_ends_all_the_same() -> None:
    scene = Scene(options=Options(max_queue_s=20))
    task = scene.arrive()
    scene.pass_s(20)
    assert expired(scene) == [task] and scene.release() == [task]
    scene.settle(task, Outcome.EXPIRED, None)
    scene.check_over()


def test_other_options_hold_for_what_comes_then() -> None:
    scene = Scene(options=Options(max_queue_s=20))
    scene.arrive()
    scene.flow.change(Options(max_queue_s=5))
    assert scene.flow.next_expiry_s == 20
    scene.arrive()
    assert scene.flow.next_expiry_s == 5


# Losses


def test_a_task_that_the_engine_had_is_tried_again_once_in_its_old_place() -> None:
    scene = Scene(slots=1)
    first, second = scene.released("a"), scene.arrive("b")
    assert scene.lose(first)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [first], "before the other"
    assert not scene.lose(first) and scene.flow.engine.suspect
    scene.settle(first, Outcome.FAILED, None)
    scene.flow.engine_checked(scene.now, True)
    assert scene.release() == [second]
    assert not scene.lose(second, retry=False)
    scene.settle(second, Outcome.FAILED, None)
    scene.check_over()


def test_a_task_that_never_reached_the_engine_does_not_use_up_its_retry() -> None:
    scene = Scene()
    task = scene.released()
    for reached, waits in [(False, True), (False, True), (True, True), (False, True), (True, False)]:
        assert scene.lose(task, reached=reached) == waits
        scene.check()
        scene.pass_s(60)
        scene.flow.engine_checked(scene.now, True)
        assert scene.release() == [task] * waits
    scene.settle(task, Outcome.FAILED, None)
    scene.check_over()


@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize("retried", [True, False])
def test_a_waiting_task_cannot_be_lost(retry: bool, retried: bool) -> None:
    scene = Scene()
    task = scene.released() if retried else scene.arrive()
    if retried:
        scene.lose(task)
        scene.flow.engine_checked(scene.now, True)
    before = scene.contents()
    with pytest.raises(KeyError):
        scene.lose(TaskId(999), retry=retry)
    assert scene.contents() == before
    with pytest.raises(ValueError, match="not in flight"):
        scene.lose(task, retry=retry)
    assert scene.contents() == before


def test_an_engine_that_cannot_be_reached_while_its_health_is_good_is_tried_ever_less_often() -> None:
    """A gateway checks it after each loss; file descriptors that have run out look like that."""
    scene = Scene(slots=20)
    tasks = [scene.arrive(f"a{number}") for number in range(20)]
    attempts: list[float] = []
    for _ in range(60 * 64):
        released = scene.release()
        attempts += [scene.at_s] * len(released)
        for task in released:
            assert scene.lose(task, reached=False)
        scene.flow.engine_checked(scene.now, True)
        scene.pass_s(1 / 64)
    assert len(attempts) == 20 * len(set(attempts)), "they go together, and fail together"
    times = sorted(set(attempts))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8][: len(pauses)] and len(pauses) >= 9
    for task in tasks:
        scene.settle(task, Outcome.EXPIRED, None)
    scene.check_over()


# What the engine reports


def test_what_is_held_moves_the_prediction_only_when_all_in_flight_decode() -> None:
    scene = Scene(slots=2)
    tasks = [scene.arrive(content=LONG), scene.arrive(content=LONG)]
    scene.release()
    before = scene.queue.peak_tokens
    assert before == 208
    for held in ({1: (64, 0)}, {1: (101, 1), 2: (50, 0)}, {1: (102, 2)}, {}):
        scene.report({TaskId(number): holding for number, holding in held.items()}, held_blocks=50)
        assert scene.queue.peak_tokens == pytest.approx(before), held
    scene.report({tasks[0]: (102, 2), tasks[1]: (101, 1)}, held_blocks=100)
    assert scene.queue.peak_tokens > before * 1.03


def test_a_task_that_only_reads_its_prompt_is_not_taken_for_one_that_decodes() -> None:
    scene = Scene()
    scene.scripted.decode = 50
    task = scene.released()
    agent = scene.queue.agents[AgentId("t/a")]
    scene.report({task: (7, 0)})
    assert (agent.attained, agent.output_tokens) == (0, 0)
    scene.report({task: (13, 3)})
    assert (agent.attained, agent.output_tokens) == (36, 3)


def capacity(scene: Scene) -> tuple[float, float]:
    return scene.queue.capacity_tokens, scene.flow.shared_tokens


def test_the_effective_capacity_is_taken_over_now_and_then() -> None:
    scene = Scene(slots=1)
    scene.scripted.decode, scene.scripted.total = 2000, 1e9
    first = scene.released(content=LONG)
    scene.arrive(content=LONG)
    assert capacity(scene) == (M, M)
    scene.report({first: (400, 300)}, iterations=CAPACITY_ITERATIONS - 1)
    before = scene.queue.virtual_time(TenantId("t"))
    assert capacity(scene) == (M, M) and before == (CAPACITY_ITERATIONS - 1) * M, "not yet"
    scene.report({first: (400, 300)})
    assert capacity(scene) == (M, pytest.approx(400)), "the memory is as large as ever"
    scene.report({first: (400, 300)}, iterations=10)
    assert scene.queue.virtual_time(TenantId("t")) - before == pytest.approx(M + 10 * 400)


@pytest.mark.parametrize(
    ("held", "blocks", "others_wait", "expected"),
    [
        ({1: (400, 300)}, 40, True, 400),
        ({1: (400, 300)}, 40, False, M),  # while nothing waits, the engine may hold less than it could
        ({1: (400, 300), 2: (500, 0)}, 90, True, 400),  # a prompt that is being read is not served yet
        ({1: (400, 300), 2: (400, 300)}, 50, True, 500),  # shared blocks are held once
        ({1: (400, 300), 2: (900, 300)}, 100, True, M),  # never more than there is
        ({}, 70, True, M),  # a stock engine does not report tasks
        ({1: (400, 0)}, 70, True, M),
    ],
)
def test_capacity_is_what_decoding_tasks_hold_while_others_wait(
    held: dict[TaskId, tuple[int, int]], blocks: int, others_wait: bool, expected: float
) -> None:
    scene = Scene(slots=2)
    scene.scripted.decode, scene.scripted.total = 200, 1e9
    for _ in range(2 + others_wait):
        scene.arrive(content=LONG)
    assert len(scene.release()) == 2
    assert CAPACITY_ITERATIONS >= CAPACITY_ENOUGH
    scene.report(held, iterations=CAPACITY_ITERATIONS, held_blocks=blocks)
    assert capacity(scene) == (M, pytest.approx(expected))
    scene.flow.change(Options(share_served=False, cost_per_held=0.5))
    scene.report(held, iterations=CAPACITY_ITERATIONS, held_blocks=blocks)
    assert capacity(scene) == (M, M / 2)


def test_another_capacity_is_taken_over_at_once() -> None:
    scene = Scene()
    scene.flow.engine.declared_capacity_tokens = 500
    scene.flow.engine_checked(scene.now, True)
    assert capacity(scene) == (500, 500)
    scene.flow.engine.declared_capacity_tokens = None
    scene.life = "life-2"
    scene.hello()
    assert capacity(scene) == (M, M)


@pytest.mark.parametrize(
    ("declared", "linked", "running", "slots"),
    [
        (3, None, 0, 3),
        (3, True, 64, 3),
        (None, None, 0, SLOTS_WITHOUT_CAPACITY),
        (None, True, 0, SLOTS_OF_STOCK + 4),
        (None, True, 64, 64 + 4),
    ],
)
def test_tasks_at_the_engine_at_once(declared: int | None, linked: bool | None, running: int, slots: int) -> None:
    scene = Scene(linked=linked, slots=declared)
    if linked:
        scene.hello(max_num_seqs=running, displace_margin=7.0)
    assert scene.queue.limits.in_flight == slots and scene.queue.limits.engine_waiting == 4
    assert scene.queue.limits.displace_margin == (7.0 if linked else None)


def test_a_driver_may_set_the_slots_itself() -> None:
    limits = ReleaseLimits(in_flight=3, displace_margin=5.0)
    scene = Scene(options=Options(limits=limits, follow_engine=False))
    scene.flow.change(scene.flow.options)
    scene.hello(max_num_seqs=64)
    assert scene.queue.limits == limits


@pytest.mark.parametrize(("policy", "third"), [("vtc", "t/b"), ("las", "t/b"), ("fcfs", "t/a")])
def test_progress_moves_who_goes_next(policy: str, third: str) -> None:
    """Both have one task at the engine and one waiting. That of a has produced more."""
    scene = Scene(policy=policy, slots=2)
    scene.scripted.decode = 100
    tasks = [scene.released(agent, content=LONG) for agent in "ab"]
    for agent in "ab":
        scene.arrive(agent, content=LONG)
    assert scene.release() == []
    scene.report({tasks[0]: (150, 50), tasks[1]: (105, 5)}, iterations=50)
    assert next(scene.queue.in_order()).id == third
    if policy != "fcfs":
        scene.report({tasks[0]: (150, 50), tasks[1]: (160, 60)}, iterations=50)
        assert next(scene.queue.in_order()).id == "t/a", "and back"


def test_the_engines_own_queue_holds_releases_back() -> None:
    scene = Scene()
    first = scene.released()
    scene.report({first: (12, 2)}, waiting=5)
    task = scene.arrive()
    assert scene.release() == []
    scene.report({first: (13, 3)}, waiting=4)
    assert scene.release() == [task]


def test_the_served_rate_is_what_was_held_over_the_time_it_took() -> None:
    scene = Scene()
    rate = scene.flow.engine.rate
    scene.report(iterations=10, held_blocks=50)
    task = scene.released()
    assert rate.per_s() is None
    for _ in range(4):
        scene.pass_s(0.5)
        scene.report(iterations=10, held_blocks=50)
    assert rate.per_s() == pytest.approx(10_000)
    scene.settle(task, Outcome.CANCELLED, None)
    scene.pass_s(1000)
    scene.report(held_blocks=50)
    assert rate.per_s() == pytest.approx(10_000), "idle time does not count"
    scene.released()
    for _ in range(600):
        scene.pass_s(0.5)
        scene.report(iterations=10, held_blocks=5)
    assert rate.per_s() == pytest.approx(1000, rel=0.01), "and what is long ago is forgotten"


def test_an_engine_that_has_done_nothing_has_no_rate_and_no_other_capacity() -> None:
    served, rate = ServedCapacity(), ServedRate()
    served.observe(0.0, 5.0)
    rate.observe(10.0, 0.0)
    assert (served.tokens(M), rate.per_s()) == (M, None)


def test_reservations_end_when_reports_cease() -> None:
    """The clock stands still then, and what is kept at the engine is not known."""
    scene = Scene(prefix_caching=True)
    scene.serve(held=1.0)
    scene.report(iterations=30, prefill_iterations=5.0)
    scene.serve(held=1.0)
    assert scene.queue._reservations
    scene.pass_s(5)
    scene.flow.engine_checked(scene.now, True)
    assert scene.queue._reservations and scene.flow.engine.reporting
    scene.pass_s(0.1)
    scene.flow.engine_checked(scene.now, None)
    assert not scene.queue._reservations and not scene.flow.engine.reporting


# What the engine is sent


def revised(scene: Scene) -> dict[TaskId, float]:
    effects = scene.flow.release(scene.now)
    return {each.task.id: each.rank for each in effects.revised}


def arrive(scene: Scene, total: float, agent: str = "a") -> TaskId:
    scene.scripted.total = total
    return scene.arrive(agent)


def test_ranks_that_have_changed_are_sent_once() -> None:
    scene = Scene(slots=2)
    first = arrive(scene, 20_000)
    arrive(scene, 30_000, "b")
    assert revised(scene) == {}, "a release carries its rank"
    arrive(scene, 70_000)
    assert revised(scene) == {}, "the prediction stands, once a task was released"
    scene.scripted.grown = 123_456.0
    scene.counts({first: 100_000.0})
    second = arrive(scene, 70_000)
    assert scene.queue.in_flight == 2
    scene.settle(first)
    effects = scene.flow.release(scene.now)
    assert effects.revised == [] and scene.flow.release(scene.now).revised == []
    assert effects.releases[0].rank == 123_456.0 and second in scene.flow.tasks


def test_with_what_a_task_really_cost_the_others_of_its_agent_move() -> None:
    scene = Scene(slots=2)
    first, second = arrive(scene, 30_100), arrive(scene, 30_100)
    scene.release()
    scene.scripted.grown = 123_456.0
    scene.counts({first: 100_000.0})
    scene.settle(first)
    assert revised(scene) == {second: 123_456.0}
    assert revised(scene) == {}


@pytest.mark.parametrize("policy", ["fcfs", "vtc", "srjf"])
def test_other_policies_do_not_revise(policy: str) -> None:
    scene = Scene(policy=policy)
    for number in range(1, 6):
        task = arrive(scene, 1e5 * number)
        assert revised(scene) == {}
        scene.report({task: (100 + number, number)})
    scene.settle(task)
    assert revised(scene) == {}


@pytest.mark.parametrize("why", ["deaf", "silent", "suspect"])
def test_what_is_revised_while_the_engine_does_not_listen_is_sent_later(why: str) -> None:
    """The link may begin after the first task, or anew: what it missed is not lost."""
    scene = Scene(slots=2)
    first, second = arrive(scene, 30_100), arrive(scene, 30_100)
    scene.release()
    if why == "deaf":
        scene.flow.link_closed(ENGINE)
    if why == "silent":
        scene.pass_s(6)
        scene.flow.engine_checked(scene.now, True)
    if why == "suspect":
        scene.flow.engine.suspect = True
    scene.scripted.grown = 123_456.0
    scene.counts({first: 100_000.0})
    scene.flow.engine.reporting = why != "silent"
    scene.settle(first)
    assert revised(scene) == {}
    scene.hello()
    scene.flow.engine_checked(scene.now, True)
    assert revised(scene) == {second: 123_456.0}


def test_a_stock_engine_is_sent_nothing() -> None:
    scene = Scene(slots=2, linked=False)
    first = arrive(scene, 20)
    arrive(scene, 20)
    scene.release()
    scene.scripted.grown = 123_456.0
    scene.settle(first)
    assert revised(scene) == {} and not scene.flow.engine.listens


# Another order, other limits


def test_a_change_of_policy_counts_at_once() -> None:
    scene = Scene(slots=2)
    first, second = arrive(scene, 20_000), arrive(scene, 30_000, "b")
    scene.release()
    large, small = arrive(scene, 90_000, "c"), scene.arrive("d", content=TaskContent(prompt_bytes=4))
    scene.flow.engine.declared_max_num_seqs = 3
    scene.flow.change(Options(), POLICIES["sjf"]())
    effects = scene.flow.release(scene.now)
    assert {each.task.id: each.rank for each in effects.revised} == {first: COST, second: COST}, "the tasks' own costs"
    assert [each.task.id for each in effects.releases] == [small] and large in scene.flow.tasks
    scene.flow.change(Options())
    assert revised(scene) == {}


def test_other_limits_hold_at_once() -> None:
    scene = Scene(slots=9)
    scene.scripted.decode = 100
    for _ in range(9):
        scene.arrive(content=LONG)
    assert len(scene.release()) == 5, "of 200 tokens each"
    scene.flow.change(Options(limits=ReleaseLimits(beta=1.5)))
    assert len(scene.release()) == 2
