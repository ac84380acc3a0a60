"""No inversion: the real engine, under more tasks than it has memory for, keeps the order that it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec
import pytest

from engine.hints import Hints, to_fields
from engine.lab.forced_length import KEY_XARG
from engine.link import Report
from tests.benchmarks.inversions import Changed, Record, Recorder, Released, judge, recording
from tests.engine.live import LiveEngine

pytestmark = pytest.mark.engine

AGENTS = 60
CHANGES = 1000
CHANGES_A_REPORT = 8
ANSWER_S = 120.0
LARGEST_TAG = 10**12


@dataclass(frozen=True)
class Task:
    hints: Hints
    prompt: list[int]  # tokens, so that it is known how many
    output: int


def tasks_of(seed: int) -> list[Task]:
    """About 150, in random order: each agent has one tag and a few tasks. Seeds have no number in common, as the tests share an
    engine, and it keeps a tag for a number that it does not know."""
    rng = random.Random(seed)
    tasks = []
    for agent in range(AGENTS):
        tag = rng.randrange(LARGEST_TAG)
        for _ in range(rng.choice((1, 2, 2, 3, 4))):
            hints = Hints(tag, f"s{seed}-{agent}", 1000 * seed + len(tasks))
            prompt = [rng.randrange(100, 200) for _ in range(rng.randrange(20, 400))]
            tasks.append(Task(hints, prompt, rng.randrange(20, 130)))
    rng.shuffle(tasks)
    return tasks


@pytest.fixture
async def session(engine: LiveEngine) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(engine.socket, limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(ANSWER_S)) as session:
        yield session


@pytest.fixture
async def recorder(engine: LiveEngine) -> AsyncIterator[Recorder]:
    engine.wait_ready()
    async with asyncio.timeout(ANSWER_S), recording(engine.link_address) as recorder:
        while recorder.hello is None or not is_idle(recorder):
            await recorder.came()
        yield recorder


def is_idle(recorder: Recorder) -> bool:
    hello, last = recorder.hello, recorder.last
    assert hello is not None
    return last is not None and (last.running, last.waiting, last.free_blocks) == (0, 0, hello.total_blocks)


async def serve(
    engine: LiveEngine, session: aiohttp.ClientSession, recorder: Recorder, tasks: Sequence[Task], changes: int = 0
) -> None:
    """All at once; meanwhile so many changes, each of one task that a report has named, to a random tag, until all
    are answered."""
    engine.lengths({f"{task.hints.agent}-{task.hints.task}": task.output for task in tasks})
    rng = random.Random(changes)

    async def one(task: Task) -> None:
        priority, xargs = to_fields(task.hints)
        body = {
            "model": engine.model,
            "prompt": task.prompt,
            "max_tokens": 500,
            "priority": priority,
            "vllm_xargs": {**xargs, KEY_XARG: f"{task.hints.agent}-{task.hints.task}"},
        }
        async with session.post("http://engine/v1/completions", json=body) as answer:
            usage = (await answer.json())["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(task.prompt), task.output)

    async def change() -> None:
        while recorder.changes < changes and not all(answer.done() for answer in answers):
            await recorder.came()
            assert recorder.last is not None
            known = [*recorder.last.tasks, *recorder.last.waiting_tasks]
            # Several reports may have come at once.
            due = min(changes, CHANGES_A_REPORT * sum(isinstance(one, Report) for one in recorder.records))
            for task in rng.sample(known, min(len(known), due - recorder.changes)):
                recorder.change({task: rng.randrange(LARGEST_TAG)})
        while not recorder.heard:
            await recorder.came()

    for task in tasks:
        recorder.released(task.hints.task, task.hints.agent, task.hints.tag, len(task.prompt))
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(one(task)) for task in tasks]
        group.create_task(change())
    while not is_idle(recorder):
        await recorder.came()


def shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    """The same log, as if the agents' tags had been dealt out otherwise, and never changed."""
    agents = {record.agent: record.tag for record in records if isinstance(record, Released)}
    tags = list(agents.values())
    random.Random(seed).shuffle(tags)
    dealt = dict(zip(agents, tags, strict=True))
    return [
        msgspec.structs.replace(record, tag=dealt[record.agent]) if isinstance(record, Released) else record
        for record in records
        if not isinstance(record, Changed)
    ]


async def test_no_earlier_task_waits_for_a_later_one(
    engine: LiveEngine, session: aiohttp.ClientSession, recorder: Recorder
) -> None:
    tasks = tasks_of(seed=1)
    await serve(engine, session, recorder, tasks)
    found = judge(recorder.records)
    print(f"{len(tasks)} tasks: {found}")
    assert found.inversions == []
    assert found.preempted > 0
    assert found.judged > 100
    assert found.unjudged == 0
    assert len(judge(shuffled(recorder.records, seed=1)).inversions) > 10


async def test_nor_while_a_thousand_tags_change(
    engine: LiveEngine, session: aiohttp.ClientSession, recorder: Recorder
) -> None:
    tasks = tasks_of(seed=2)
    await serve(engine, session, recorder, tasks, CHANGES)
    found = judge(recorder.records)
    print(f"{len(tasks)} tasks, {recorder.changes} changes: {found}")
    assert found.inversions == []
    assert (recorder.changes, recorder.heard) == (CHANGES, True)
    assert found.preempted > 0
    assert found.judged > 100
    assert found.unjudged == 0
    assert len(judge(shuffled(recorder.records, seed=2)).inversions) > 10
    unchanged = [record for record in recorder.records if not isinstance(record, Changed)]
    assert len(judge(unchanged).inversions) > 10, "the changes were obeyed"
