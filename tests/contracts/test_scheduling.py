"""Our scheduler on the real scheduler and block manager of the release that is imported.

`make contracts` runs this on several releases, `make test` on the installed one. What these leave open, tests/engine asks of
the installed release.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from engine import compat
from engine.hints import Hints
from engine.scheduler.scheduler import JustitiaScheduler
from engine.scheduler.waiting_queue import WaitingQueue
from tests.engine.clockwork import BLOCK_SIZE, Clockwork

IN_FLIGHT = pytest.mark.parametrize("in_flight", [1, 2])


@pytest.fixture(scope="module", autouse=True)
def vllm_is_quiet() -> Iterator[None]:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    yield
    logging.getLogger("vllm").setLevel(logging.INFO)


class Machine(Clockwork):
    """A clockwork whose model samples, as the token at a position, the position itself. So an output that was sampled twice,
    dropped or delivered late shows in the answer."""

    def __init__(self, scheduler_class: type[Scheduler], model: Path, **kwargs: Any) -> None:
        super().__init__(scheduler_class, model, **kwargs)
        self.answers: dict[str, list[int]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self._sampled: dict[int, dict[str, int]] = {}  # by the step's output, while it is in flight
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output

        def note(*args: Any) -> Any:
            output = schedule(*args)
            self._sampled[id(output)] = {n: self.requests[n].num_computed_tokens for n in output.num_scheduled_tokens}
            return output

        def deliver(output: Any, result: ModelRunnerOutput) -> Any:
            position = self._sampled.pop(id(output))
            names = result.req_ids
            tokens = [[position[n]] if s else [] for n, s in zip(names, result.sampled_token_ids, strict=True)]
            outputs = update(
                output, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled_token_ids=tokens)
            )
            for of_client in outputs.values():
                for one in of_client.outputs:
                    self.answers.setdefault(one.request_id, []).extend(one.new_token_ids)
            return outputs

        setattr(self.scheduler, "schedule", note)  # noqa: B010  # to listen in
        setattr(self.scheduler, "update_from_output", deliver)  # noqa: B010

    def ask(self, name: str, hints: Hints | None, prompt: int, output: int, tokens: list[int] | None = None) -> None:
        self.shapes[name] = prompt, output
        self.add(name, hints, prompt, output, tokens)

    @property
    def ours(self) -> JustitiaScheduler:
        assert isinstance(self.scheduler, JustitiaScheduler)
        return self.scheduler

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def check_answers(self) -> None:
        """Each has all its tokens, each of them once, in order."""
        assert self.answers == {n: list(range(prompt, prompt + out)) for n, (prompt, out) in self.shapes.items()}

    def check_empty(self, blocks: int) -> None:
        """Nothing is held any more, nor waited for."""
        assert self.free_blocks == blocks
        assert self.scheduler.get_request_counts() == (0, 0)
        assert not self.scheduler.requests
        if isinstance(self.scheduler, JustitiaScheduler):
            report = self.scheduler.reporting.report(whole=True)
            assert (report.running, report.waiting, report.free_blocks) == (0, 0, blocks)
            assert (report.tasks, report.waiting_tasks) == ([], [])


def test_both_queues_are_ours(tiny_model_dir: Path) -> None:
    scheduler = Machine(JustitiaScheduler, tiny_model_dir, blocks=8).scheduler
    found = compat.distribution()
    assert found is not None
    release = compat.release_of(found[1])
    assert release is not None
    second, none = ("kv_holding_waiting", "skipped_waiting")[:: 1 if release >= (0, 31) else -1]
    assert isinstance(scheduler.waiting, WaitingQueue)
    assert isinstance(getattr(scheduler, second), WaitingQueue)
    assert not hasattr(scheduler, none)


def test_the_order_of_the_waiting(tiny_model_dir: Path) -> None:
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    machine.ask("late", Hints(9, "a", 1), 10, 3)
    machine.ask("b", Hints(5, "b", 4), 10, 3)
    machine.ask("a2", Hints(5, "a", 6), 10, 3)
    machine.ask("a1", Hints(5, "a", 3), 10, 3)
    machine.ask("urgent", Hints(-7, "z", 9), 10, 3)
    assert machine.run() == ["urgent", "a1", "a2", "b", "late"]
    machine.check_answers()
    machine.check_empty(32)


def test_who_does_not_fit_is_not_overtaken(tiny_model_dir: Path) -> None:
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=8)
    machine.ask("running", Hints(1, "a", 1), 4 * BLOCK_SIZE, 4)
    machine.step()
    machine.ask("small", Hints(3, "c", 3), 10, 4)
    machine.ask("large", Hints(2, "b", 2), 7 * BLOCK_SIZE, 4)
    assert machine.step() == ["running"]
    assert machine.run() == ["running", "large", "small"]
    machine.check_empty(8)


def victim_of(scheduler_class: type[Scheduler], model: Path) -> str:
    machine = Machine(scheduler_class, model, blocks=8)
    machine.ask("first", Hints(1, "a", 1), BLOCK_SIZE, 90)
    machine.ask("last, long", Hints(2, "b", 2), 3 * BLOCK_SIZE, 90)
    machine.ask("last, short", Hints(2, "b", 3), BLOCK_SIZE, 90)
    machine.requests["last, short"].arrival_time = 0.5  # which would save it from vLLM
    machine.until(lambda: bool(machine.preempted))
    victim = machine.preempted[0]
    machine.run()
    machine.check_answers()
    machine.check_empty(8)
    return victim


def test_the_victim_is_of_the_last_agent_and_loses_the_least(tiny_model_dir: Path) -> None:
    assert victim_of(JustitiaScheduler, tiny_model_dir) == "last, short"


def test_control_vllm_takes_the_one_that_came_last(tiny_model_dir: Path) -> None:
    assert victim_of(AsyncScheduler, tiny_model_dir) == "last, long"


@IN_FLIGHT
def test_a_preempted_one_goes_back_to_its_place(tiny_model_dir: Path, in_flight: int) -> None:
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=6, in_flight=in_flight)
    machine.ask("first", Hints(1, "a", 1), 2 * BLOCK_SIZE, 90)
    machine.ask("victim", Hints(5, "b", 5), 2 * BLOCK_SIZE, 60)
    machine.step()
    machine.ask("behind", Hints(9, "d", 9), 20, 4)
    machine.ask("before", Hints(3, "c", 3), 4 * BLOCK_SIZE, 4)
    machine.until(lambda: bool(machine.preempted))
    assert machine.preempted == ["victim"]
    assert machine.waiting() == ["before", "victim", "behind"]
    ended = machine.run()
    assert ended.index("before") < ended.index("victim")
    machine.check_answers()
    machine.check_empty(6)


def test_one_that_was_passed_over_goes_back_to_its_place(tiny_model_dir: Path) -> None:
    """It cannot be scheduled yet, and when it can there is one before it. Until vLLM 0.30 it waits in a queue of its own."""
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=2)
    machine.ask("running", Hints(1, "a", 1), 10, 20)
    machine.step()
    machine.ask("passed over", Hints(5, "b", 5), 10, 4)
    machine.requests["passed over"].num_stale_output_tokens = 1
    machine.step()
    assert machine.running() == {"running"}
    machine.requests["passed over"].num_stale_output_tokens = 0
    machine.ask("before", Hints(3, "c", 3), 10, 4)
    machine.ask("behind", Hints(9, "d", 9), 10, 4)
    machine.step()
    assert machine.running() == {"running", "before"}
    assert machine.run() == ["before", "passed over", "behind", "running"]
    machine.check_answers()
    machine.check_empty(32)


@IN_FLIGHT
@pytest.mark.parametrize("seed", range(4))
def test_all_end_under_pressure(tiny_model_dir: Path, seed: int, in_flight: int) -> None:
    """Arrivals, aborts, new tags, resets and full memory, at random."""
    choose = random.Random(seed)
    machine = Machine(
        JustitiaScheduler,
        tiny_model_dir,
        blocks=10,
        max_num_seqs=5,
        in_flight=in_flight,
        justitia={"displace_margin": 0},
    )
    aborted = set()
    for number in range(24):
        tag, prompt, output = choose.randint(0, 9), choose.randint(1, 150), choose.randint(1, 100)
        machine.ask(f"r{number}", Hints(tag, f"agent-{number % 7}", number), prompt, output)
        for _ in range(choose.randint(0, 30)):
            machine.step()
        if machine.scheduler.requests:
            name = choose.choice(sorted(machine.scheduler.requests))
            machine.ours.change_tag(int(name[1:]), choose.randint(0, 9))
        if choose.random() < 0.1 and machine.running():
            name = min(machine.running())
            aborted.add(name)
            machine.abort(name)
        if choose.random() < 0.1:
            assert machine.scheduler.reset_prefix_cache(reset_running_requests=True)
    machine.run()
    assert machine.preempted
    for name in aborted:
        prompt, _ = machine.shapes.pop(name)
        answer = machine.answers.pop(name, [])
        assert answer == list(range(prompt, prompt + len(answer)))
    machine.check_answers()
    machine.check_empty(10)


@IN_FLIGHT
def test_an_urgent_one_displaces_and_nothing_is_lost(tiny_model_dir: Path, in_flight: int) -> None:
    machine = Machine(
        JustitiaScheduler,
        tiny_model_dir,
        blocks=64,
        max_num_seqs=1,
        in_flight=in_flight,
        justitia={"displace_margin": 10},
    )
    machine.ask("past", Hints(0, "p", 0), 1000, 2)  # of all that is computed, little may be lost
    machine.run()
    machine.ask("displaced", Hints(100, "a", 1), 10, 30)
    for _ in range(8):
        machine.step()
    machine.ask("near", Hints(95, "b", 2), 10, 4)  # within the margin
    machine.step()
    assert machine.running() == {"displaced"}
    machine.ask("urgent", Hints(1, "c", 3), 10, 4)
    machine.step()
    assert machine.running() == {"urgent"}
    assert machine.preempted == ["displaced"]
    assert machine.ours.displaced == 1
    assert machine.run() == ["past", "urgent", "near", "displaced"]
    machine.check_answers()
    machine.check_empty(64)


def test_a_new_tag_is_a_new_place(tiny_model_dir: Path) -> None:
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=32, max_num_seqs=1)
    machine.ask("running", Hints(1, "a", 1), 10, 5)
    machine.step()
    machine.ask("one", Hints(2, "b", 2), 10, 3)
    machine.ask("two", Hints(3, "c", 3), 10, 3)
    machine.ours.change_tag(2, 9)
    assert machine.waiting() == ["two", "one"]
    assert machine.run() == ["running", "two", "one"]
    machine.check_empty(32)


def cached_after_a_pause(model: Path, *, keep: bool) -> int:
    """Of an agent's next prompt, the tokens that are known after others have taken most of the free blocks."""
    machine = Machine(JustitiaScheduler, model, blocks=16)
    prompt = list(range(4 * BLOCK_SIZE))
    machine.ask("task", Hints(5, "a", 1), len(prompt), 2, prompt)
    machine.run()
    if keep:
        machine.ours.keep("a", 1000)
        assert machine.ours.reporting.report().kept_blocks == 4
    for number in (2, 3):  # one that uses the blocks nobody has used yet, and one that must take used ones
        machine.ask(f"other {number}", Hints(5, "b", number), 12 * BLOCK_SIZE - 8, 4)
        machine.run()
    machine.ask("next", Hints(5, "a", 4), len(prompt) + 9, 2, [*prompt, *range(9)])
    cached = int(machine.scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens)
    machine.abort("next")
    machine.check_empty(16)
    return cached


def test_kept_blocks_are_taken_last(tiny_model_dir: Path) -> None:
    assert cached_after_a_pause(tiny_model_dir, keep=True) == 4 * BLOCK_SIZE


def test_control_blocks_that_nobody_keeps_are_taken_first(tiny_model_dir: Path) -> None:
    assert cached_after_a_pause(tiny_model_dir, keep=False) < 4 * BLOCK_SIZE


def test_reports_go_by_what_is_held(tiny_model_dir: Path) -> None:
    machine = Machine(JustitiaScheduler, tiny_model_dir, blocks=16, max_num_seqs=2)
    machine.ask("one", Hints(1, "a", 7), 40, 9)
    machine.ask("two", Hints(1, "b", 8), 70, 9)
    machine.ask("three", Hints(1, "c", 9), 70, 9)
    machine.step()
    report = machine.ours.reporting.report(whole=True)
    assert dict(zip(report.tasks, report.kv_tokens, strict=True)) == {7: 40, 8: 70}
    assert (report.running, report.waiting, report.waiting_tasks) == (2, 1, [9])
    assert report.free_blocks == 16 - 2 - 3 == machine.free_blocks
    assert report.agents == {"a": 40.0, "b": 70.0}
