"""Kept blocks: against plain lists, and on vLLM's real scheduler."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from engine.hints import Hints
from engine.scheduler.kept_blocks import KeptBlocks
from engine.scheduler.scheduler import JustitiaScheduler
from tests.engine.clockwork import BLOCK_SIZE, Clockwork

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", autouse=True)
def vllm_is_quiet() -> Iterator[None]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    yield
    logging.getLogger("vllm").setLevel(logging.INFO)


# Against lists

agents = st.sampled_from(["a", "b", "c", "d"])
tags = st.integers(-3, 3)


class KeptMachine(RuleBasedStateMachine):
    """others: the first to be taken first. keepings: by agent its tag, its end, and its blocks, likewise. taken: not free."""

    @initialize(count=st.integers(0, 24))
    def begin(self, count: int) -> None:
        self.blocks = [KVCacheBlock(number) for number in range(count)]
        self.queue = KeptBlocks(list(self.blocks))
        self.others = list(range(count))
        self.keepings: dict[str, tuple[int, int, list[int]]] = {}
        self.taken: list[int] = []
        self.iteration = 0

    def kept_in_order(self) -> list[int]:
        ordered = sorted(self.keepings, key=lambda agent: (-self.keepings[agent][0], agent))
        return [block for agent in ordered for block in self.keepings[agent][2]]

    def in_order(self) -> list[int]:
        return self.others + self.kept_in_order()

    def gone(self, *numbers: int) -> None:
        self.others = [number for number in self.others if number not in numbers]
        for agent, (tag, until, blocks) in list(self.keepings.items()):
            left = [number for number in blocks if number not in numbers]
            self.keepings[agent] = tag, until, left
            if not left:
                del self.keepings[agent]

    @precondition(lambda self: self.in_order())
    @rule()
    def popleft(self) -> None:
        first = self.in_order()[0]
        assert self.queue.popleft().block_id == first
        self.gone(first)
        self.taken.append(first)

    @precondition(lambda self: not self.in_order())
    @rule()
    def popleft_of_nothing(self) -> None:
        with pytest.raises(ValueError, match="No free blocks"):
            self.queue.popleft()

    @rule(data=st.data())
    def popleft_n(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.in_order())))
        expected = self.in_order()[:count]
        assert [block.block_id for block in self.queue.popleft_n(count)] == expected
        self.gone(*expected)
        self.taken += expected

    @precondition(lambda self: self.in_order())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.in_order()))
        self.queue.remove(self.blocks[number])
        self.gone(number)
        self.taken.append(number)

    def draw_taken(self, data: st.DataObject) -> list[int]:
        drawn: list[int] = data.draw(st.lists(st.sampled_from(self.taken), unique=True)) if self.taken else []
        self.taken = [number for number in self.taken if number not in drawn]
        return drawn

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.taken))
        self.taken.remove(number)
        self.queue.append(self.blocks[number])
        self.others.append(number)

    @rule(data=st.data())
    def append_n(self, data: st.DataObject) -> None:
        numbers = self.draw_taken(data)
        self.queue.append_n([self.blocks[number] for number in numbers])
        self.others += numbers

    @rule(data=st.data())
    def prepend_n(self, data: st.DataObject) -> None:
        numbers = self.draw_taken(data)
        self.queue.prepend_n([self.blocks[number] for number in numbers])
        self.others = numbers + self.others

    @rule(data=st.data(), agent=agents, tag=tags, iterations=st.integers(1, 6))
    def keep(self, data: st.DataObject, agent: str, tag: int, iterations: int) -> None:
        # Also what is kept already, for this agent or another, and one block twice.
        drawn: list[int] = data.draw(st.lists(st.sampled_from(self.in_order()), max_size=8)) if self.in_order() else []
        until = self.iteration + iterations
        self.queue.keep(agent, tag, [self.blocks[number] for number in drawn], until)
        of_others = {n for name, (_, _, blocks) in self.keepings.items() if name != agent for n in blocks}
        before = self.keepings.pop(agent, (0, 0, []))[2]
        blocks = list(dict.fromkeys([*before, *(number for number in drawn if number not in of_others)]))
        self.others = [number for number in self.others if number not in blocks]
        if blocks:
            self.keepings[agent] = tag, until, blocks

    @rule(agent=agents)
    def let_go(self, agent: str) -> None:
        self.queue.let_go(agent)
        self.others += self.keepings.pop(agent, (0, 0, []))[2]

    @rule(iterations=st.integers(0, 3))
    def end_keepings(self, iterations: int) -> None:
        self.iteration += iterations
        over = [agent for agent, (_, until, _) in self.keepings.items() if until <= self.iteration]
        # The scheduler asks only then.
        assert not over or 0 < self.queue.next_end <= self.iteration
        self.queue.end_keepings(self.iteration)
        for agent in sorted(over, key=lambda agent: (-self.keepings[agent][0], agent)):
            self.others += self.keepings.pop(agent)[2]
        assert self.queue.next_end == min((until for _, until, _ in self.keepings.values()), default=0)

    @invariant()
    def it_is_the_model(self) -> None:
        if not hasattr(self, "queue"):
            return
        forwards = [block.block_id for block in self.queue.get_all_free_blocks()]
        assert forwards == self.in_order()
        backwards = []
        block = self.queue.fake_free_list_tail.prev_free_block
        while block is not self.queue.fake_free_list_head:
            assert block is not None
            backwards.append(block.block_id)
            block = block.prev_free_block
        assert backwards == forwards[::-1]
        assert self.queue.num_free_blocks == len(forwards)
        assert self.queue.num_kept_blocks == len(self.kept_in_order())
        assert sorted([*forwards, *self.taken]) == list(range(len(self.blocks)))
        for number in self.taken:
            assert self.blocks[number].prev_free_block is self.blocks[number].next_free_block is None
        assert self.queue.next_end >= 0
        assert not self.keepings or 0 < self.queue.next_end <= min(until for _, until, _ in self.keepings.values())


TestKeptMachine = KeptMachine.TestCase
TestKeptMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_control_a_queue_that_keeps_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = KeptMachine()
    machine.begin(4)
    monkeypatch.setattr(KeptBlocks, "_first_of", lambda self, keeping: self.fake_free_list_tail)
    machine.queue.keep("a", 1, machine.blocks[:2], 5)
    machine.keepings["a"], machine.others = (1, 5, [0, 1]), [2, 3]
    machine.it_is_the_model()
    machine.popleft()
    machine.taken.remove(2)
    machine.queue.append(machine.blocks[2])
    machine.others.append(2)
    with pytest.raises(AssertionError):
        machine.it_is_the_model()


# On the scheduler


def scheduler(clock: Clockwork) -> JustitiaScheduler:
    assert isinstance(clock.scheduler, JustitiaScheduler)
    return clock.scheduler


def kept_blocks(clock: Clockwork) -> int:
    kept = scheduler(clock).kept
    assert kept is not None
    return kept.num_kept_blocks


def prompt(agent: int, blocks: int) -> list[int]:
    """Full blocks of the agent's own, and a token more."""
    return [1000 * agent + i for i in range(blocks * BLOCK_SIZE + 1)]


def turn(clock: Clockwork, agent: int, blocks: int, tag: int | None = None) -> str:
    """A task of the agent, to its end."""
    name = f"r{len(clock.requests)}"
    hints = Hints(agent if tag is None else tag, f"a{agent}", len(clock.requests))
    clock.add(name, hints, 0, 2, prompt(agent, blocks))
    clock.until(clock.requests[name].is_finished)
    return name


def hits(clock: Clockwork, agent: int, blocks: int) -> int:
    """Blocks of the agent's prompt that the next task would find. To ask takes nothing from anybody."""
    pool = clock.scheduler.kv_cache_manager.block_pool
    request = Request(
        request_id="asks",
        prompt_token_ids=prompt(agent, blocks),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=clock._hasher,
    )
    found = 0
    for block_hash in request.block_hashes:
        if pool.get_cached_block(block_hash, [0]) is None:
            break
        found += 1
    return found


def pressure(clock: Clockwork, blocks: int) -> None:
    """Somebody who takes so many blocks at once."""
    name = f"p{len(clock.requests)}"
    start = 10**6 + 10**4 * len(clock.requests)
    tokens = [start + i for i in range(blocks * BLOCK_SIZE - 1)]
    clock.add(name, Hints(99, "", len(clock.requests)), 0, 1, tokens)
    clock.until(clock.requests[name].is_finished)


@pytest.mark.parametrize(("kept", "left"), [(True, 4), (False, 0)], ids=["kept", "control"])
def test_what_is_kept_survives_what_takes_others(tiny_model_dir: Path, kept: bool, left: int) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)  # the least recently used
    turn(clock, 2, 4)
    if kept:
        scheduler(clock).keep("a1", 100)
        assert kept_blocks(clock) == 4
        assert scheduler(clock).reporting.report().kept_blocks == 4
        assert scheduler(clock).reporting.report().free_blocks == 16, "as free as any other"
    pressure(clock, 12)
    assert (hits(clock, 1, 4), hits(clock, 2, 4)) == (left, 4 - left)


def test_who_comes_back_finds_what_was_kept(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    scheduler(clock).keep("a1", 100)
    pressure(clock, 12)
    clock.add("again", Hints(1, "a1", 50), 0, 2, prompt(1, 5))
    output = clock.scheduler.schedule()
    assert output.num_scheduled_tokens == {"again": BLOCK_SIZE + 1}
    assert kept_blocks(clock) == 0, "they are in use, and no longer kept"


def test_a_keeping_ends_when_its_agent_comes_back(tiny_model_dir: Path) -> None:
    """Also with what the new prompt does not begin with: nobody will ask for that."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    scheduler(clock).keep("a1", 1000)
    clock.add("again", Hints(1, "a1", 50), 0, 2, prompt(1, 4)[: 2 * BLOCK_SIZE] + [7] * BLOCK_SIZE)
    clock.step()
    assert kept_blocks(clock) == 0


def test_the_largest_tag_loses_its_own_first_and_the_end_before_the_beginning(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    for agent, tag in ((1, 5), (2, 9), (3, 1)):
        turn(clock, agent, 4, tag)
    for agent in (2, 3, 1):
        scheduler(clock).keep(f"a{agent}", 1000)
    left = []
    for blocks in range(4, 17, 2):
        pressure(clock, blocks)
        left.append([hits(clock, agent, 4) for agent in (2, 1, 3)])
    assert left == [[4, 4, 4], [2, 4, 4], [0, 4, 4], [0, 2, 4], [0, 0, 4], [0, 0, 2], [0, 0, 0]]


def test_the_latest_tag_counts(tiny_model_dir: Path) -> None:
    """The agent's tag moved while its task ran."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4, tag=5)
    clock.add("moves", Hints(3, "a2", 77), 0, 2, prompt(2, 4))
    clock.step()
    scheduler(clock).change_tag(77, 8)
    clock.run()
    for agent in (1, 2):
        scheduler(clock).keep(f"a{agent}", 1000)
    pressure(clock, 12)
    assert (hits(clock, 1, 4), hits(clock, 2, 4)) == (4, 0)


@pytest.mark.parametrize(("iterations", "left"), [(2, 0), (1000, 4)], ids=["over", "control"])
def test_a_keeping_ends_when_its_time_is_over(tiny_model_dir: Path, iterations: int, left: int) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    scheduler(clock).keep("a1", iterations)
    for number in range(2, 5):  # each takes two iterations, and two blocks that stay in the cache
        turn(clock, number, 2)
    assert kept_blocks(clock) == left
    if not left:
        assert scheduler(clock).kept is not None and scheduler(clock).kept.next_end == 0
    pressure(clock, 12)
    assert hits(clock, 1, 4) == left


def test_a_keeping_that_is_let_go_is_the_last_of_all_others(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    for agent in (1, 2, 3):
        turn(clock, agent, 4)
    scheduler(clock).keep("a3", 1000)
    scheduler(clock).keep("a1", 1000)
    scheduler(clock).keep("a1", 0)
    assert kept_blocks(clock) == 4
    pressure(clock, 8)
    assert [hits(clock, agent, 4) for agent in (2, 1, 3)] == [0, 4, 4]
    pressure(clock, 12)
    assert [hits(clock, agent, 4) for agent in (2, 1, 3)] == [0, 0, 4]
    scheduler(clock).keep("a3", -1)
    assert kept_blocks(clock) == 0


def test_nothing_is_withheld_when_everything_is_kept(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    for agent in range(1, 6):
        turn(clock, agent, 3)
        scheduler(clock).keep(f"a{agent}", 10**9)
    assert kept_blocks(clock) == 15, "one more was needed by each, and never full"
    free = clock.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == 16
    clock.add("all", Hints(-5, "z", 100), 16 * BLOCK_SIZE - 5, 5)
    assert clock.step() == ["all"]
    assert clock.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    clock.run()
    assert (clock.preempted, kept_blocks(clock)) == ([], 0)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_under_load_with_much_kept_all_end(tiny_model_dir: Path, in_flight: int) -> None:
    for seed in range(6):
        dice, most_kept = random.Random(seed), 0
        clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=20, max_num_seqs=6, in_flight=in_flight)
        for number in range(50):
            agent = dice.randrange(1, 8)
            clock.add(
                f"r{number}",
                Hints(agent, f"a{agent}", number),
                0,
                dice.randint(1, 40),
                prompt(agent, dice.randrange(8)),
            )
            for _ in range(dice.randrange(20)):
                clock.step()
                scheduler(clock).keep(f"a{dice.randrange(9)}", dice.choice((0, 1, 5, 10**6)))
                most_kept = max(most_kept, kept_blocks(clock))
        clock.run()
        assert all(request.num_output_tokens == request.max_tokens for request in clock.requests.values())
        kept = scheduler(clock).kept
        assert kept is not None and kept.num_free_blocks == len(kept.get_all_free_blocks()) == 20
        assert most_kept > 10


def state(clock: Clockwork) -> Any:
    kept = scheduler(clock).kept
    assert kept is not None
    return [block.block_id for block in kept.get_all_free_blocks()], kept.num_kept_blocks


def test_to_keep_what_is_not_there_changes_nothing(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    before = state(clock)
    for agent, iterations in (("nobody", 5), ("", 5), ("nobody", 0), ("a1", 0), ("a1", -5)):
        scheduler(clock).keep(agent, iterations)
        assert state(clock) == before
    pressure(clock, 16)  # all that was a1's is somebody else's
    before = state(clock)
    scheduler(clock).keep("a1", 5)
    assert state(clock) == before


def test_a_block_that_was_computed_anew_by_another_is_not_kept(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=8)
    turn(clock, 1, 4)
    turn(clock, 2, 7)
    scheduler(clock).keep("a1", 5)
    left = hits(clock, 1, 4)
    assert kept_blocks(clock) == left < 4


def test_blocks_in_use_are_not_kept(tiny_model_dir: Path) -> None:
    """Another agent began with the same prompt, and runs."""
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    clock.add("other", Hints(2, "b", 20), 0, 30, prompt(1, 4))
    clock.step()
    before = state(clock)
    scheduler(clock).keep("a1", 50)
    assert state(clock) == before
    clock.run()


def test_while_an_agents_task_runs_it_has_nothing_to_be_kept(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    turn(clock, 1, 4)
    clock.add("other prompt", Hints(1, "a1", 20), 40, 30)
    clock.step()
    before = state(clock)
    scheduler(clock).keep("a1", 50)
    assert state(clock) == before


def test_several_tasks_of_an_agent_are_kept_and_what_they_share_is_lost_last(tiny_model_dir: Path) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    common = prompt(1, 2)[:-1]
    for number in range(3):
        clock.add(f"t{number}", Hints(1, "a1", number), 0, 2, common + [9000 + 100 * number + i for i in range(33)])
    clock.run()
    scheduler(clock).keep("a1", 1000)
    assert kept_blocks(clock) >= 5
    pressure(clock, 14)
    assert hits(clock, 1, 2) == 2


def test_without_a_prefix_cache_there_is_nothing_to_keep(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork(JustitiaScheduler, tiny_model_dir, blocks=16)
    monkeypatch.setattr(clock.scheduler, "kept", None)
    turn(clock, 1, 4)
    scheduler(clock).keep("a1", 5)
    assert scheduler(clock).reporting.report().kept_blocks == 0
