"""Inversions in logs made by hand: 10 blocks of 10 tokens, 4 slots."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from engine.link import PROTOCOL, EngineLink, Hello, Report
from tests.benchmarks.inversions import Changed, Inversion, Record, Released, find, judge, main, read, recording, write

HELLO = Hello(PROTOCOL, "e1", "0.32.0", total_blocks=10, block_size=10, max_num_seqs=4, max_model_len=100)


def released(*tags: int, tokens: int = 15) -> list[Record]:
    """Tasks 0, 1, …, each of an agent of its own."""
    return [Released(task, f"a{task}", tag, tokens) for task, tag in enumerate(tags)]


def report(
    iteration: int,
    running: Mapping[int, int],
    waiting: tuple[int, ...] = (),
    *,
    free: int | None = None,
    preempted: int = 0,
    heard: int = 0,
    engine_id: str = "e1",
) -> Report:
    """running: KV tokens by task, all of which have computed their 15 tokens of prompt."""
    return Report(
        engine_id=engine_id,
        iteration=iteration,
        free_blocks=10 - sum(-(-tokens // 10) for tokens in running.values()) if free is None else free,
        running=len(running),
        waiting=len(waiting),
        preempted=preempted,
        tasks=list(running),
        kv_tokens=list(running.values()),
        output_tokens=[max(0, tokens - 14) for tokens in running.values()],
        waiting_tasks=list(waiting),
        heard={"g": heard} if heard else {},
    )


def test_an_idle_engine_and_one_that_keeps_the_order_have_none() -> None:
    assert find([HELLO, report(0, {}), report(0, {})]) == []
    # Task 1 is of the earliest tag and is admitted first; 0 and 2 follow when there is room.
    tail = [report(2 + i, {1: 16 + i, 0: 15 + i}, (2,), free=1) for i in range(9)]
    assert find([HELLO, *released(20, 10, 30), report(1, {1: 15}, (0, 2)), *tail]) == []


def passing(last: int) -> list[Record]:
    """Task 1 comes to run in iteration 3, up to the last, while 0 waits, who has the earlier tag."""
    came = [report(3 + i, {2: 80, 1: 15 + i}, (0,), free=0) for i in range(last - 2)]
    return [HELLO, *released(10, 20, 5), report(1, {2: 80}, (0, 1)), report(2, {2: 80}, (0, 1)), *came]


def test_one_who_is_passed_by_a_later_task_has_waited_in_vain() -> None:
    assert find(passing(last=8)) == [Inversion(waited=0, ran=1, first=3, last=8)]


@pytest.mark.parametrize(("last", "found"), [(4, 0), (5, 1)])
def test_two_iterations_are_forgiven_and_three_are_not(last: int, found: int) -> None:
    assert len(find(passing(last))) == found


def test_who_passed_a_task_that_would_not_have_fit_in_its_place_is_no_inversion() -> None:
    """Task 0 would need 5 blocks: those of 1 and the free ones are 3."""
    log = [HELLO, *released(10, 20, 5), Released(0, "a0", 10, 45), report(2, {2: 70}, (0, 1))]
    assert find([*log, *(report(3 + i, {2: 70, 1: 15}, (0,), free=1) for i in range(9))]) == []
    assert len(find([*log, *(report(3 + i, {2: 70, 1: 15}, (0,), free=3) for i in range(9))])) == 1


def test_later_tasks_that_ran_already_may_run_on() -> None:
    start = [HELLO, *released(10, 20), report(1, {1: 95})]
    assert find([*start, *(report(2 + i, {1: 96}, (0,)) for i in range(20))]) == []


def test_free_memory_that_nobody_takes_is_one() -> None:
    log = [HELLO, *released(10, 20), report(1, {1: 15}), report(1, {1: 15}, (0,))]
    log += [report(2 + i, {1: 16}, (0,)) for i in range(6)]
    assert find(log) == [Inversion(waited=0, ran=1, first=2, last=7)]
    # Only of the later ones is it an inversion that they run.
    assert find([Released(1, "a1", 5, 15) if one == Released(1, "a1", 20, 15) else one for one in log]) == []


def test_one_that_does_not_fit_holds_up_those_behind_it() -> None:
    """Task 0 needs 9 blocks of 8; 1, behind it, needs only 2."""
    tasks = [Released(0, "a0", 10, 85), Released(1, "a1", 20, 15), Released(2, "a2", 30, 15)]
    running = [report(1 + i, {2: 15}, (0, 1)) for i in range(9)]
    assert find([HELLO, *tasks, *running]) == []
    alone = [report(1 + i, {2: 15}, (1,)) for i in range(9)]
    assert len(find([HELLO, *tasks, *alone])) == 1


def test_without_a_slot_nobody_is_admitted() -> None:
    running = dict.fromkeys((1, 2, 3, 4), 15)
    log = [HELLO, *released(10, 20, 20, 20, 20), *(report(1 + i, running, (0,)) for i in range(9))]
    assert find(log) == []
    assert len(find([msgspec.structs.replace(HELLO, max_num_seqs=5), *log[1:]])) == 1


def test_steps_that_preempt_or_compute_prompts_admit_nobody() -> None:
    start = [HELLO, *released(10, 20)]
    assert find([*start, *(report(1 + i, {1: 15}, (0,), preempted=i) for i in range(9))]) == []
    assert find([*start, *(report(1 + i, {1: 10}, (0,)) for i in range(9))]) == [], "10 of its 15 tokens"


def test_a_running_task_takes_its_next_block_before_one_that_waits() -> None:
    start = [HELLO, *released(10, 20)]
    assert find([*start, *(report(1 + i, {1: 80}, (0,)) for i in range(9))]) == []
    assert len(find([*start, *(report(1 + i, {1: 79}, (0,)) for i in range(9))])) == 1


def test_the_wrong_victim_is_found() -> None:
    """Task 0, the earlier one, is preempted, and 1 runs on."""
    log = [HELLO, *released(10, 20), report(9, {0: 49, 1: 50}, free=0)]
    log += [report(10 + i, {1: 51}, (0,), free=4, preempted=1) for i in range(5)]
    assert find(log) == [Inversion(waited=0, ran=1, first=10, last=14)]
    right = [HELLO, *released(20, 10), *log[3:]]
    assert find(right) == []


def test_a_preempted_task_needs_also_what_it_had_put_out() -> None:
    """Task 0 came to run with 15 tokens, and needs 5 blocks when 1 passes it and takes 2."""
    start = [HELLO, *released(10, 20, 5), report(8, {0: 48, 2: 40}, (1,)), report(9, {2: 41}, (0, 1), preempted=1)]
    for free, found in ((2, 0), (3, 1)):
        tail = [report(10 + i, {2: 50, 1: 15}, (0,), preempted=1, free=free) for i in range(9)]
        assert len(find([*start, *tail])) == found


# Changed tags


def changing(*, heard_at: int, admitted_at: int, number: int = 1) -> list[Record]:
    """Task 0 is told to be the first before iteration 2; 1 comes to run later."""
    log: list[Record] = [HELLO, *released(30, 20, 5), report(1, {2: 80}, (0, 1))]
    log.append(Changed("g", 1, {0: 10}))
    for at in range(2, 30):
        running = {2: 80, 1: 15} if at >= admitted_at else {2: 80}
        waiting = (0,) if at >= admitted_at else (0, 1)
        log.append(report(at, running, waiting, free=0, heard=number if at >= heard_at else 0))
    return log


def test_a_change_counts_two_iterations_after_it_was_heard() -> None:
    assert find(changing(heard_at=5, admitted_at=4)) == [], "it had not heard yet"
    assert find(changing(heard_at=5, admitted_at=6)) == [], "grace"
    assert find(changing(heard_at=5, admitted_at=7)) == [Inversion(0, 1, 7, 29)]


def test_a_change_that_was_not_heard_leaves_it_open() -> None:
    assert find(changing(heard_at=99, admitted_at=10)) == []
    assert find(changing(heard_at=5, admitted_at=10, number=0)) == []


def test_both_tags_count_until_it_is_heard() -> None:
    """Task 0 was the first, and is told to be the last: it may be passed as soon as the engine may have heard."""
    log = changing(heard_at=99, admitted_at=3)
    log[1] = Released(0, "a0", 10, 15)
    assert find([one if not isinstance(one, Changed) else Changed("g", 1, {0: 40}) for one in log]) == []
    assert len(find([one for one in log if not isinstance(one, Changed)])) == 1


def test_a_change_of_a_task_that_no_report_has_named_stays_open() -> None:
    """The engine may not have had the task yet, and passes over such changes."""
    log = changing(heard_at=3, admitted_at=10)
    change = next(one for one in log if isinstance(one, Changed))
    log.remove(change)
    log.insert(4, change)
    assert find(log) == []


# Logs with holes


def test_over_missing_reports_a_passing_is_seen() -> None:
    whole = passing(last=12)
    assert find(whole[:6] + whole[-3:]) == [Inversion(waited=0, ran=1, first=10, last=12)]
    assert find(whole[:6] + whole[-2:]) == [], "since when is not known"


def test_over_missing_reports_a_change_that_was_heard_and_not_obeyed_is_found() -> None:
    """An engine that says it has heard what it has only read, and obeys at its next look, ten iterations later."""
    log = changing(heard_at=3, admitted_at=6)
    early = [one for one in log if not isinstance(one, Report) or one.iteration in (1, 2, 3, 4, 6, 16)]
    assert find(early) == [Inversion(waited=0, ran=1, first=6, last=16)]
    late = [one for one in early if not isinstance(one, Report) or one.iteration not in (3, 4)]
    assert find(late) == [], "for all that is known, it was heard in 6 only"


def test_over_missing_reports_memory_was_free_if_the_same_tasks_run() -> None:
    log = [HELLO, *released(10, 20, 30), *(report(at, {1: 15}, (0,)) for at in range(1, 40, 3))]
    assert find(log) == [Inversion(waited=0, ran=1, first=4, last=37)]
    assert judge(log).missing == 24
    others = [report(at, {1: 15, 2: 15} if at % 2 else {1: 15}, (0,)) for at in range(1, 40, 3)]
    assert [one for one in find([*log[:4], *others]) if one.ran == 1] == []


def test_reports_that_do_not_say_who_waits_are_not_judged() -> None:
    log = [HELLO, *released(10, 20)]
    unnamed = [msgspec.structs.replace(report(1 + i, {1: 15}), waiting=300) for i in range(9)]
    stranger = [report(1 + i, {1: 15, 7: 15}, (0,)) for i in range(9)]
    for reports in (unnamed, stranger):
        assert find([*log, *reports]) == []
        assert judge([*log, *reports]).unjudged == 9
    nameless = [report(1 + i, {1: 15, -1: 15}, (0,)) for i in range(9)]
    assert find([*log, *nameless]) == [], "a task that is not the gateway's may be computing its prompt"


def test_another_engine_has_none_of_the_tasks() -> None:
    other = msgspec.structs.replace(HELLO, engine_id="e2")
    first, second = passing(last=4), passing(last=4)[1:]
    again = [msgspec.structs.replace(one, engine_id="e2") if isinstance(one, Report) else one for one in second]
    assert find([*first, other, *again]) == []
    assert find([*first, HELLO, report(5, {2: 80, 1: 17}, (0,), free=0)]) == [Inversion(0, 1, 3, 5)]


def test_a_log_without_a_hello_is_refused() -> None:
    with pytest.raises(ValueError, match="hello"):
        find([report(1, {})])


# Controls: the same tasks in an engine that keeps the order, and in one that is like a stock one.


def simulate(order: Callable[[Released], object], victim: Callable[[Released], object], seed: int) -> list[Record]:
    """Sixty tasks in ten blocks. order: the first is admitted first. victim: the largest is preempted first."""
    rng = random.Random(seed)
    tasks = [Released(n, f"a{n // 3}", rng.randrange(1000), rng.randrange(5, 40)) for n in range(60)]
    left = {task.task: rng.randrange(2, 30) for task in tasks}
    put_out = dict.fromkeys(left, 0)
    waiting, running, preempted = list(tasks), dict[int, int](), 0
    log: list[Record] = [HELLO, *tasks]
    for iteration in range(5000):
        before = preempted
        for task in sorted((tasks[n] for n in running), key=order):
            while task.task in running and free(running, {task.task: 1}) < 0:
                loser = max((tasks[n] for n in running), key=victim)
                del running[loser.task]
                waiting.append(loser)
                preempted += 1
            if task.task in running:
                running[task.task] += 1
        waiting.sort(key=order)
        while preempted == before and waiting and len(running) < 4:
            first = waiting[0]
            if free(running, {first.task: first.tokens + put_out[first.task]}) < 0:
                break
            running[first.task] = first.tokens + put_out[first.task]
            waiting.pop(0)
        for number in list(running):
            put_out[number] += 1
            if put_out[number] == left[number]:
                del running[number]
        names = [task.task for task in waiting]
        one = report(iteration, running, tuple(names), free=free(running), preempted=preempted)
        log.append(msgspec.structs.replace(one, output_tokens=[put_out[number] for number in running]))
        if not waiting and not running:
            return log
    raise AssertionError("it never ended")


def free(running: Mapping[int, int], more: Mapping[int, int] | None = None) -> int:
    tokens = {number: kv + (more or {}).get(number, 0) for number, kv in running.items()}
    tokens |= {number: kv for number, kv in (more or {}).items() if number not in running}
    return 10 - sum(-(-kv // 10) for kv in tokens.values())


def by_tag(task: Released) -> object:
    return task.tag, task.agent, task.task


def by_arrival(task: Released) -> object:
    return task.task


@pytest.mark.parametrize("seed", range(5))
def test_the_control_of_a_stock_order_is_found_and_ours_is_not(seed: int) -> None:
    ours = judge(simulate(by_tag, by_tag, seed))
    assert ours.inversions == []
    assert ours.preempted > 0
    assert ours.missing == ours.unjudged == 0
    assert len(find(simulate(by_arrival, by_arrival, seed))) >= 10
    wrong_victims = judge(simulate(by_tag, by_arrival, seed))
    assert wrong_victims.inversions, wrong_victims.preempted


# Recording


async def test_a_recorder_keeps_every_report_and_what_it_told(session_dir: Path, tmp_path: Path) -> None:
    address, log = f"ipc://{session_dir}/recorded.sock", tmp_path / "log.jsonl"
    engine = EngineLink(address, HELLO)
    try:
        async with asyncio.timeout(30), recording(address, log) as recorder:
            while recorder.hello is None or recorder.name not in engine.heard:
                engine.publish(report(0, {}))
                list(engine.changes())
                await asyncio.sleep(0.01)
            recorder.released(0, "a0", 10, 15)
            recorder.change({0: 20}, {"a0": 7})
            recorder.change(keep={"a0": 0})
            assert not recorder.heard
            for iteration in range(1, 200):
                engine.publish(report(iteration, {0: 15 + iteration}))  # none is lost, though nobody reads meanwhile
            changes = []
            while not recorder.heard:
                changes += engine.changes()
                engine.publish(msgspec.structs.replace(report(200, {}), heard=engine.heard))
                await asyncio.sleep(0.01)
            assert [change.tags for change in changes] == [{0: 20}, {}]
            while recorder.last is None or recorder.last.iteration < 200:
                await recorder.came()
    finally:
        engine.close()
    records = list(read(log))
    assert records == recorder.records
    assert records[0] == HELLO
    assert judge(records).missing == 0
    assert {one.iteration for one in records if isinstance(one, Report)} == set(range(201))
    assert [one for one in records if isinstance(one, Released | Changed)] == [
        Released(0, "a0", 10, 15),
        Changed(recorder.name, 1, {0: 20}),
    ]


# The command


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    write(log, [*passing(last=8), Changed("g", 1, {0: 2**63 - 1})])
    assert list(read(log)) == [*passing(last=8), Changed("g", 1, {0: 2**63 - 1})]
    assert main([str(log)]) == 1
    printed = capsys.readouterr().out
    assert "task 0 waited while task 1 ran, iterations 3 to 8" in printed
    assert "1 inversions in 7 iterations" in printed
    write(log, passing(last=4))
    assert main([str(log)]) == 0
    assert "0 inversions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, b"{}\n", b"nonsense\n", b'{"type": "report"}\n', msgspec.json.encode(report(1, {}))]
)
def test_a_log_that_cannot_be_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_bytes(content)
    assert main([str(log)]) == 2
    assert "log.jsonl" in capsys.readouterr().err
