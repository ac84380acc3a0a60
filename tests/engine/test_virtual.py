"""The virtual engine: its clock by hand, vLLM's decisions as they are, and the same results every time."""

from __future__ import annotations

import os
import random
from typing import Literal

import pytest

pytest.importorskip("vllm")

from engine.hints import Hints
from engine.lab.profile import StepProfile
from engine.lab.virtual import Ended, Running, Step, VirtualEngine, VirtualTask

pytestmark = pytest.mark.vllm

PROFILE = StepProfile(
    name="by hand",
    description="",
    constant_s=1.0,
    per_prefill_token_s=0.01,
    per_decode_s=0.1,
    per_kv_token_s=0.001,
    kv_blocks=64,
    block_size=16,
    max_num_seqs=16,
    max_num_batched_tokens=64,
)

Scheduler = Literal["justitia", "stock"]
SCHEDULERS: tuple[Scheduler, ...] = ("justitia", "stock")


def task(key: int, prompt: int, output: int, tag: int = 0, prefix: tuple[tuple[str, int], ...] = ()) -> VirtualTask:
    return VirtualTask(key, prompt, output, Hints(tag, f"agent-{tag}", key), prefix)


def run(engine: VirtualEngine, limit: int = 10_000) -> list[Step]:
    steps: list[Step] = []
    while not engine.idle:
        steps.append(engine.step())
        assert len(steps) < limit
    return steps


def ended(steps: list[Step]) -> list[Ended]:
    """What was held is tested by hand, and against the ledger's oracle."""
    return [end._replace(held=None) for step in steps for end in step.ended]


# The clock


@pytest.mark.parametrize("shortcuts", [True, False])
def test_a_lone_task_by_hand(shortcuts: bool) -> None:
    """100 tokens of prompt in chunks of 64 and 36; the second brings the first token of the output, four more follow."""
    engine = VirtualEngine(PROFILE, shortcuts=shortcuts)
    engine.add(task(7, 100, 5))
    steps = run(engine)
    assert engine.iterations == len(steps) == 6
    assert engine.now_s == pytest.approx(
        6 * 1.0 + 100 * 0.01 + 4 * 0.1 + (64 + 100 + 101 + 102 + 103 + 104) * 0.001, abs=1e-12
    )
    assert [step.running for step in steps] == [
        [Running(7, 64, 0)],
        [Running(7, 100, 1)],
        [Running(7, 101, 2)],
        [Running(7, 102, 3)],
        [Running(7, 103, 4)],
        [],
    ]
    assert steps[-1].ended == [Ended(7, 5, 0, 64 + 100 + 101 + 102 + 103 + 104 + 5)]


def test_prefill_and_decode_share_an_iteration() -> None:
    engine = VirtualEngine(PROFILE)
    engine.add(task(1, 20, 3))
    engine.step()
    engine.add(task(2, 30, 2))
    before = engine.now_s
    engine.step()
    assert engine.now_s - before == pytest.approx(1.0 + 30 * 0.01 + 1 * 0.1 + (21 + 30) * 0.001, abs=1e-12)


def test_the_clock_waits_and_never_goes_back() -> None:
    engine = VirtualEngine(PROFILE)
    engine.wait_until(5.0)
    engine.wait_until(3.0)
    assert engine.now_s == 5.0
    assert engine.step() == Step([], [])
    assert (engine.now_s, engine.iterations, engine.idle) == (5.0, 0, True)


@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (1, 2), (50, 1), (50, 40), (64, 17)])
def test_what_is_held_over_time_is_the_cost_of_a_task(prompt: int, output: int) -> None:
    """The cost model counts p + k tokens in the iteration of the k-th token: p·d + d(d+1)/2.

    After it, the engine holds one fewer, as the k-th is sampled but not computed: d in all. And after the last one, it
    holds nothing: p + d - 1 less. So p + 2d - 1 are missing, whatever the task.
    """
    engine = VirtualEngine(PROFILE)
    engine.add(task(0, prompt, output))
    held = sum(running.kv_tokens for step in run(engine) for running in step.running)
    assert held == prompt * output + output * (output + 1) // 2 - (prompt + 2 * output - 1)


# Memory


def test_blocks_are_counted_as_they_are_used() -> None:
    engine = VirtualEngine(PROFILE, kv_blocks=4)
    assert (engine.capacity_tokens, engine.held_tokens) == (64, 0)
    engine.add(task(0, 30, 4))
    engine.add(task(1, 33, 1))
    engine.step()
    assert (engine.held_tokens, engine.waiting) == (32, 1)  # three blocks for the second: they are not there
    for _ in range(3):
        engine.step()
    assert engine.held_tokens == 0  # 32 computed in two blocks, a third, and the end
    assert ended(run(engine)) == [Ended(1, 1, 0)]


@pytest.mark.parametrize(
    ("prompt", "output", "fits"), [(50, 14, True), (50, 15, False), (0, 5, False), (5, 0, False), (64, 1, False)]
)
def test_what_can_never_fit_is_refused(prompt: int, output: int, fits: bool) -> None:
    engine = VirtualEngine(PROFILE, kv_blocks=4)
    if fits:
        engine.add(task(0, prompt, output))
        assert ended(run(engine)) == [Ended(0, output, 0)]
        return
    with pytest.raises(ValueError, match="task 0"):
        engine.add(task(0, prompt, output))
    assert engine.idle


def test_the_longest_sequence_is_a_limit_too() -> None:
    engine = VirtualEngine(PROFILE, max_model_len=32)
    with pytest.raises(ValueError, match="longest"):
        engine.add(task(0, 30, 3))
    engine.add(task(0, 30, 2))
    assert ended(run(engine)) == [Ended(0, 2, 0)]


def test_illegal_calls_change_nothing() -> None:
    engine = VirtualEngine(PROFILE)
    engine.add(task(0, 30, 3))
    with pytest.raises(ValueError, match="here already"):
        engine.add(task(0, 30, 3))
    with pytest.raises(ValueError, match="follow"):
        engine.add(task(1, 30, 3, prefix=(("a", 20), ("b", 20))))
    with pytest.raises(ValueError, match="hold nothing"):
        VirtualEngine(PROFILE, kv_blocks=0)
    assert ended(run(engine)) == [Ended(0, 3, 0)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_victim_is_of_the_largest_tag(scheduler: Scheduler) -> None:
    engine = VirtualEngine(PROFILE, scheduler=scheduler, kv_blocks=8)
    engine.add(task(1, 40, 60, tag=9))
    engine.add(task(2, 40, 50, tag=5))
    steps: list[Step] = []
    before: set[int] = set()
    while engine.preemptions == 0:
        before = {running.key for running in steps[-1].running} if steps else set()
        steps.append(engine.step())
    assert before == {1, 2}
    assert [running.key for running in steps[-1].running] == [2]
    # Both had four blocks. The other came to its 65th token, and is one ahead: its prompt was first in the budget.
    assert engine.recomputed_tokens == 63
    assert engine.waiting == 1
    steps += run(engine)
    assert ended(steps) == [Ended(2, 50, 0), Ended(1, 60, 0)]
    assert (engine.preemptions, engine.held_tokens) == (1, 0)


def test_abort_frees() -> None:
    engine = VirtualEngine(PROFILE, max_num_seqs=2)
    for key in range(3):
        engine.add(task(key, 40, 60))
    for _ in range(9):
        engine.step()
    assert (engine.waiting, engine.held_tokens) == (1, 2 * 48)
    engine.abort(2)
    assert engine.waiting == 0
    engine.abort(0)
    assert engine.held_tokens == 48
    assert [running.key for running in engine.step().running] == [1]
    engine.abort(1)
    engine.abort(1)  # passed over
    assert (engine.idle, engine.held_tokens) == (True, 0)
    engine.add(task(1, 10, 2))
    assert ended(run(engine)) == [Ended(1, 2, 0)]


# Order


@pytest.mark.parametrize(
    ("scheduler", "policy", "order"),
    [
        ("justitia", "priority", [3, 1, 0, 2]),
        ("stock", "priority", [3, 1, 0, 2]),
        ("stock", "fcfs", [0, 1, 2, 3]),
        ("justitia", "fcfs", [3, 1, 0, 2]),
    ],
)
def test_tags_are_honoured(scheduler: Scheduler, policy: Literal["priority", "fcfs"], order: list[int]) -> None:
    engine = VirtualEngine(PROFILE, scheduler=scheduler, stock_policy=policy, max_num_seqs=1)
    for key, tag in enumerate((5, 3, 5, -(2**60))):
        engine.add(task(key, 20, 3, tag))
    assert [end.key for end in ended(run(engine))] == order


# The prefix cache

CLASS, AGENT = (("class", 32),), (("class", 32), ("agent", 84))


@pytest.mark.parametrize(
    ("prefix", "prompt", "cached"),
    [
        ((), 100, 0),
        (CLASS, 100, 32),
        (AGENT, 100, 80),  # whole blocks
        ((("class", 32), ("other", 84)), 100, 32),
        ((("class", 40), ("agent", 84)), 100, 32),  # they part at token 32
        ((("other", 32), ("agent", 84)), 100, 0),  # nothing after a difference
        (AGENT, 40, 32),  # within the beginning
        (AGENT, 32, 16),  # the last token of a prompt is computed in any case
    ],
)
def test_shared_beginnings_are_found(prefix: tuple[tuple[str, int], ...], prompt: int, cached: int) -> None:
    for prefix_caching in (True, False):
        engine = VirtualEngine(PROFILE, prefix_caching=prefix_caching)
        engine.add(task(0, 100, 30, prefix=AGENT))
        first = run(engine)
        assert engine.held_tokens == 0  # blocks that only the cache knows are free
        engine.add(task(1, prompt, 3, prefix=prefix))
        assert ended(first + run(engine)) == [Ended(0, 30, 0), Ended(1, 3, cached if prefix_caching else 0)]


def test_what_is_cached_is_not_computed() -> None:
    engine = VirtualEngine(PROFILE, prefix_caching=True)
    engine.add(task(0, 40, 10, prefix=CLASS))
    engine.step()
    engine.add(task(1, 40, 10, prefix=CLASS))
    before = engine.now_s
    engine.step()
    assert engine.now_s - before == pytest.approx(1.0 + 8 * 0.01 + 0.1 + (41 + 40) * 0.001, abs=1e-12)
    assert engine.held_tokens == 4 * 16  # of three blocks each, two are shared


# The same results every time

Trace = list[tuple[float, int, int, int, int, list[Ended], list[Running]]]


def trace(seed: int, scheduler: Scheduler, prefix_caching: bool, shortcuts: bool = True) -> Trace:
    """200 tasks that come in bursts, more than there is memory for; some are aborted."""
    rng = random.Random(seed)
    engine = VirtualEngine(
        PROFILE, scheduler=scheduler, kv_blocks=24, prefix_caching=prefix_caching, shortcuts=shortcuts
    )
    tasks = [
        task(
            key,
            rng.choice((1, 16, 17, rng.randint(2, 200))),
            rng.choice((1, 2, rng.randint(3, 120))),
            rng.randint(0, 9),
            prefix=(("class", 24), (f"agent-{key % 5}", rng.choice((48, 100)))),
        )
        for key in range(200)
    ]
    seen: Trace = []
    while tasks or not engine.idle:
        if tasks and rng.random() < 0.1:
            for _ in range(min(len(tasks), rng.choice((1, 1, 12)))):
                engine.add(tasks.pop())
        if rng.random() < 0.01:
            engine.abort(rng.randrange(200))
        step = engine.step()
        if rng.random() < 0.01:
            engine.wait_until(engine.now_s + 1)
        counts = (engine.held_tokens, engine.waiting, engine.preemptions, engine.recomputed_tokens)
        seen.append((engine.now_s, *counts, sorted(step.ended), sorted(step.running)))
        assert len(seen) < 50_000
    assert engine.preemptions > 5
    return seen


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_same_calls_have_the_same_results(scheduler: Scheduler, prefix_caching: bool) -> None:
    """Also where vLLM is asked everything: the shortcuts save time, and nothing else."""
    first = trace(3, scheduler, prefix_caching)
    assert trace(3, scheduler, prefix_caching) == first
    assert trace(3, scheduler, prefix_caching, shortcuts=False) == first
    assert trace(4, scheduler, prefix_caching) != first


def told(
    seed: int, *, margin: float | None = None, keeping: bool = False, retagging: bool = False, shortcuts: bool = True
) -> Trace:
    """As `trace`, with our scheduler alone and a gateway that speaks to it."""
    rng = random.Random(seed)
    engine = VirtualEngine(
        PROFILE, kv_blocks=24, max_num_seqs=4, prefix_caching=True, displace_margin=margin, shortcuts=shortcuts
    )
    tasks = [
        task(
            key,
            rng.randint(2, 200),
            rng.choice((2, rng.randint(3, 160))),
            rng.randint(0, 9),
            prefix=((f"agent-{key % 5}", rng.choice((48, 100))),),
        )
        for key in range(70)
    ]
    seen: Trace = []
    while tasks or not engine.idle:
        if tasks and rng.random() < 0.05:
            engine.add(tasks.pop())
        dice = rng.random(), rng.randrange(70), rng.randrange(10), rng.choice((3, 20, 300))
        if retagging and dice[0] < 0.1:
            engine.change_tag(dice[1], dice[2])
        if keeping and dice[0] > 0.8:
            engine.keep(f"agent-{dice[2]}", dice[3])
        step = engine.step()
        counts = (engine.held_tokens, engine.waiting, engine.preemptions, engine.recomputed_tokens)
        seen.append((engine.now_s, *counts, sorted(step.ended), sorted(step.running)))
        assert len(seen) < 50_000
    return seen


@pytest.mark.parametrize("retagging", [False, True])
@pytest.mark.parametrize("keeping", [False, True])
@pytest.mark.parametrize("margin", [None, 0.0])
def test_the_shortcuts_change_nothing_of_what_a_gateway_asks_for(
    margin: float | None, keeping: bool, retagging: bool
) -> None:
    """Tasks that are displaced, blocks whose keeping ends, and tags that change, also in the middle of a lull."""
    consequences = 0
    for seed in range(2):
        first = told(seed, margin=margin, keeping=keeping, retagging=retagging)
        second = told(seed, margin=margin, keeping=keeping, retagging=retagging, shortcuts=False)
        differing = [at for at, both in enumerate(zip(first, second, strict=False)) if both[0] != both[1]]
        assert (differing[:1], len(first)) == ([], len(second))
        consequences += first != told(seed)
    assert bool(consequences) is (retagging or keeping or margin is not None)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_what_is_held_is_the_sum_of_what_was_seen_to_run(shortcuts: bool) -> None:
    """Without shared blocks, and but for the last iteration, after which a task does not run: there it holds p + d - 1.

    Each token that is sampled counts as one more, as in the cost model.
    """
    rng = random.Random(5)
    engine = VirtualEngine(PROFILE, kv_blocks=24, shortcuts=shortcuts)
    tasks = {key: task(key, rng.randint(2, 200), rng.randint(1, 120), rng.randint(0, 9)) for key in range(80)}
    for each in tasks.values():
        engine.add(each)
    seen = dict.fromkeys(tasks, 0)
    for step in run(engine):
        for running in step.running:
            seen[running.key] += running.kv_tokens
        for end in step.ended:
            prompt, output = tasks[end.key].prompt_tokens, tasks[end.key].output_tokens
            assert end.held == seen[end.key] + (prompt + output - 1) + output
    assert engine.preemptions > 5


def test_all_end_with_the_tokens_that_they_were_to_have() -> None:
    engine = VirtualEngine(PROFILE, kv_blocks=20)
    rng = random.Random(1)
    tasks = [task(key, rng.randint(1, 150), rng.randint(1, 150), rng.randint(0, 5)) for key in range(60)]
    for each in tasks:
        engine.add(each)
    assert sorted(ended(run(engine))) == [Ended(each.key, each.output_tokens, 0) for each in tasks]
    assert engine.preemptions > 0


def test_it_is_silent_and_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    VirtualEngine(PROFILE, prefix_caching=True)
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
