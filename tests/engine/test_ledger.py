"""The ledger against a naive count of the same thing, on vLLM's real scheduler.

A step's boundary: what is held is looked at when a step has been scheduled, with the tokens that it computes. A request that
ends holds to the end of the step that brought its last token; one that is preempted or displaced, to the end of the step
before. The naive program asks the running requests alone for their blocks, and never the blocks how often they are held.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from engine.hints import Hints
from engine.scheduler.ledger import Ledger
from engine.scheduler.order import hints_of
from engine.scheduler.scheduler import JustitiaScheduler
from tests.engine.clockwork import BLOCK_SIZE, Clockwork

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", autouse=True)
def vllm_is_quiet() -> Iterator[None]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    yield
    logging.getLogger("vllm").setLevel(logging.INFO)


class Naive:
    """Counts beside the ledger. shared: block·iterations in which more than one held a block; total: tokens that were held
    at all, by looking into each block once."""

    def __init__(self, clock: Clockwork) -> None:
        assert isinstance(clock.scheduler, JustitiaScheduler)
        self.scheduler = clock.scheduler
        self.costs: dict[str, float] = defaultdict(float)
        self.total = self.shared = self.iterations = 0
        self._schedule: Callable[..., SchedulerOutput] = clock.scheduler.schedule
        clock.scheduler.schedule = self.schedule  # type: ignore[method-assign, unused-ignore]  # to look after it

    def blocks(self, request: Request) -> list[int]:
        return [block.block_id for block in self.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks[0]]

    def holders(self) -> Counter[int]:
        return Counter(block for request in self.scheduler.running for block in self.blocks(request))

    def held(self, request: Request, holders: Counter[int]) -> float:
        held = 0.0
        for place, block in enumerate(self.blocks(request)):
            tokens = min(BLOCK_SIZE, max(0, request.num_computed_tokens - place * BLOCK_SIZE))
            assert holders[block] == 1 or tokens == BLOCK_SIZE, "full blocks are shared, and no others"
            held += tokens / holders[block]
        return held

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = self._schedule(*args, **kwargs)
        if not output.total_num_scheduled_tokens:
            return output
        self.iterations += 1
        holders = self.holders()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert len(holders) == pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "nobody else holds any"
        fill: dict[int, int] = {}
        by_agent: dict[str, float] = defaultdict(float)
        for request in self.scheduler.running:
            held = self.held(request, holders)
            self.costs[request.request_id] += held
            by_agent[hints_of(request).agent] += held
            for place, block in enumerate(self.blocks(request)):
                fill[block] = max(0, min(BLOCK_SIZE, request.num_computed_tokens - place * BLOCK_SIZE))
        self.total += sum(fill.values())
        self.shared += sum(1 for count in holders.values() if count > 1)
        assert self.scheduler.ledger.by_agent(self.scheduler.running) == pytest.approx(by_agent)
        return output


def cost(request: Request) -> float:
    held: float = vars(request)["justitia_held"]
    return held


def chunked(clock: Clockwork, tokens: int) -> None:
    clock.scheduler.max_num_scheduled_tokens = tokens
    clock.scheduler.scheduler_config.max_num_batched_tokens = tokens


@pytest.mark.parametrize("in_flight", [1, 2])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(14, 40),
    seqs=st.integers(2, 12),
    budget=st.sampled_from([48, 100, 2048]),
    margin=st.sampled_from([None, 0, 15]),
)
def test_costs_are_what_a_naive_program_counts(
    tiny_model_dir: Path, in_flight: int, seed: int, blocks: int, seqs: int, budget: int, margin: int | None
) -> None:
    check_costs(tiny_model_dir, in_flight, seed, blocks, seqs, budget, margin)


def check_costs(
    model: Path, in_flight: int, seed: int, blocks: int, seqs: int, budget: int, margin: int | None
) -> Naive:
    dice = random.Random(seed)
    clock = Clockwork(
        JustitiaScheduler,
        model,
        blocks=blocks,
        max_num_seqs=seqs,
        in_flight=in_flight,
        justitia={"displace_margin": margin},
    )
    chunked(clock, budget)
    naive = Naive(clock)
    for number in range(30):
        agent = dice.randrange(5)
        family = dice.randrange(3)
        shared = dice.choice((0, 31, 32, 33, 64, 100, 160))
        own = dice.randint(1, 120)
        tokens = [family * 10_000 + i for i in range(shared)] + [10**6 + number * 1000 + i for i in range(own)]
        if dice.random() < 0.2:
            tokens = [family * 10_000 + i for i in range(max(shared, 1))]  # nothing of its own
        hints = Hints(10 * agent, f"a{agent}", number) if dice.random() < 0.9 else None
        clock.add(f"r{number}", hints, 0, dice.choice((1, 2, dice.randint(3, 70))), tokens)
        for _ in range(dice.randrange(8)):
            clock.step()
        live = [name for name in clock.requests if not clock.requests[name].is_finished()]
        if live and dice.random() < 0.15:
            clock.abort(dice.choice(live))
        if live and dice.random() < 0.2:
            clock.scheduler.change_tag(dice.randrange(30), dice.randrange(50))  # type: ignore[attr-defined]
        if dice.random() < 0.05:
            clock.scheduler.keep(f"a{agent}", dice.randrange(30))  # type: ignore[attr-defined]
        if dice.random() < 0.03 and in_flight == 1:
            clock.scheduler.reset_prefix_cache(reset_running_requests=True)
    clock.run()
    for name, request in clock.requests.items():
        assert cost(request) == pytest.approx(naive.costs[name], abs=1e-6), name
    assert sum(map(cost, clock.requests.values())) == pytest.approx(naive.total, abs=1e-5)
    ledger = naive.scheduler.ledger
    assert ledger.iteration == naive.iterations
    assert ledger._shared == {}, "nothing is left behind"
    assert ledger.by_agent([]) == {}
    return naive


def test_the_scenario_has_what_it_is_to_test(tiny_model_dir: Path) -> None:
    naive = check_costs(tiny_model_dir, 1, 3, 16, 8, 48, 0)
    assert naive.shared > 100
    assert naive.scheduler.preempted > naive.scheduler.displaced > 0


@pytest.mark.parametrize(
    "broken",
    [
        lambda ledger: setattr(ledger, "admit", lambda request, cached_tokens: None),
        lambda ledger: setattr(ledger, "leave", lambda request: vars(request)["justitia_held"]),
        lambda ledger: setattr(ledger, "_block_size", BLOCK_SIZE - 1),
    ],
    ids=["sharing is not seen", "sharing does not end", "blocks of another size"],
)
def test_control_a_ledger_that_is_wrong_is_found_out(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Ledger], None]
) -> None:
    make = Ledger.__init__

    def init(self: Ledger, *args: Any) -> None:
        make(self, *args)
        broken(self)

    monkeypatch.setattr(Ledger, "__init__", init)
    with pytest.raises(AssertionError):
        check_costs(tiny_model_dir, 1, 3, 16, 8, 48, 0)


def test_two_that_share_by_hand(tiny_model_dir: Path) -> None:
    """Two blocks in common. The first is alone for one step, both share in three, and the first is alone again."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    common = list(range(2 * BLOCK_SIZE))
    first = clock.add("first", Hints(1, "a", 1), 0, 7, [*common, 900])
    clock.step()
    second = clock.add("second", Hints(1, "b", 2), 0, 3, [*common, 901])
    clock.run()
    # Tokens of its own: 1, 2, 3 and the half of 64.
    assert cost(second) == 3 * 32 + 1 + 2 + 3
    assert cost(first) == 65 + (3 * 32 + 2 + 3 + 4) + (64 + 5) + (64 + 6) + (64 + 7)


def test_a_preempted_request_pays_for_both_lives_and_not_for_what_is_between(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=4)
    victim = clock.add("victim", Hints(2, "b", 2), 60, 20)
    clock.step()
    clock.step()
    clock.add("urgent", Hints(1, "a", 1), 60, 10)
    clock.until(lambda: bool(clock.preempted))
    before = cost(victim)
    # At 65 tokens both need another block, and there is none. So this step, the sixth of the victim, is not its own.
    assert before == sum(range(60, 65))
    clock.until(clock.requests["urgent"].is_finished)
    assert cost(victim) == before
    clock.run()
    # 15 more to come, of which the first is of the step in which it computes all again: 64 or 65, less what was cached.
    steps = 20 - 5
    assert cost(victim) == before + sum(range(65, 65 + steps))


def test_a_sequence_of_a_task_is_counted_with_the_others(tiny_model_dir: Path) -> None:
    """A body with `n` = 2: one task, one prompt, two sequences."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    naive = Naive(clock)
    tokens = list(range(3 * BLOCK_SIZE + 5))
    for name in ("x", "y"):
        clock.add(name, Hints(1, "a", 5), 0, 9, tokens)
    clock.run()
    assert sum(cost(request) for request in clock.requests.values()) == pytest.approx(naive.total)
    assert naive.costs["x"] == pytest.approx(cost(clock.requests["x"]))
