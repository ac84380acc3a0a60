"""Steps as bytes, as batches, and as less: whatever is made of them, it comes to the same in a store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.flowcontrol.records import Step
from gateway.state import pack, unpack
from gateway.state.batch import compact, fold, records_of
from gateway.state.frames import HEADER, UnknownVersion, frame, framed, read
from gateway.state.memory import MemoryStore
from predictor.types import FinishedAgent
from tests.state.steps import HOUR, Life, row

PLENTY = 2**40


async def content(store: MemoryStore) -> object:
    """All that can be asked of a store."""
    agents = {agent.run: agent for agent in await store.agents()}
    samples = sorted([repr(agent) for agent in await store.newest(1000)])
    return agents, samples, await store.usage(0, 2**60), await store.added()


def told(batches: Sequence[Sequence[Step]]) -> object:
    async def tell() -> object:
        store = MemoryStore()
        for number, records in enumerate(batches, 1):
            assert await store.apply(fold(records, "j", number)) == number - 1
        return await content(store)

    return asyncio.run(tell())


# Frames


def test_what_was_written_is_read() -> None:
    life = Life("a")
    records = [life.answer(prompt="Why?\ud7ff"), life.fail(), life.correct(0, 7.5), Step(sample=b"blob"), life.end()]
    assert read(framed(records)) == (records, 0)
    assert read(HEADER) == read(b"") == read(HEADER[:5]) == ([], 0)


@given(st.integers(1, 400))
def test_a_file_may_end_anywhere(cut: int) -> None:
    """Its writer was killed."""
    life = Life("a")
    whole = framed([life.answer()])
    last = frame(life.answer())
    records, unreadable = read(whole + last[: min(cut, len(last) - 1)])
    assert (len(records), unreadable) == (1, 0)


@given(st.data())
def test_what_is_damaged_is_passed_over(data: st.DataObject) -> None:
    life = Life("a")
    frames = [frame(life.answer()) for _ in range(3)]
    which = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(8, len(frames[which]) - 1))  # not its length: what follows that cannot be found
    damaged = bytearray(frames[which])
    damaged[place] ^= data.draw(st.integers(1, 255))
    frames[which] = bytes(damaged)
    records, unreadable = read(HEADER + b"".join(frames))
    assert (len(records), unreadable) == (2, 1)


@given(st.binary(max_size=300))
def test_no_bytes_are_an_error(noise: bytes) -> None:
    read(HEADER + noise)
    if not HEADER.startswith(noise[: len(HEADER)]):
        with pytest.raises(UnknownVersion):
            read(noise)


def test_another_version_is_refused() -> None:
    with pytest.raises(UnknownVersion, match="journal 2"):
        read(b"justitia journal 2\n" + framed([])[len(HEADER) :])


# Batches


def test_who_comes_and_goes_within_a_batch_is_a_finished_agent_and_nothing_else() -> None:
    life, failed = Life("a"), Life("b")
    records = [life.answer(), failed.fail(over=True), life.answer(), life.correct(0, 5.0), life.end()]
    batch = fold(records)
    assert (batch.agents, batch.tasks, batch.over) == ({}, {}, {})
    assert unpack(batch.samples) == ([life.sample], 0)


def test_sums_are_one_row() -> None:
    records = [Step(usage=row()), Step(usage=row(kv_cost=1.0, cached_tokens=3)), Step(usage=row("blue"))]
    batch = fold([*records, Step(usage=row(hour=HOUR + 3600))])
    assert batch.usage["red", HOUR] == row(requests=2, prompt_tokens=20, kv_cost=3.5, cached_tokens=3)
    assert list(batch.usage) == [("red", HOUR), ("blue", HOUR), ("red", HOUR + 3600)]


def test_a_correction_alone_does_not_make_an_agent_new() -> None:
    """It would be forgotten, and the store would have it for ever."""
    life = Life("a")
    first = [life.answer()]
    later = [life.correct(0, 9.0), life.end()]
    assert told([first, later])[0] == {}  # type: ignore[index]


steps = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["answer", "fail", "correct", "end", "answer, over"])),
    max_size=40,
)


def lived(steps: Sequence[tuple[str, str]]) -> list[Step]:
    lives: dict[str, Life] = {}
    records, runs = [], iter(range(1000))
    for name, what in steps:
        life = lives.get(name)
        if life is None:
            life = lives[name] = Life(f"{name}{next(runs)}", tenant="red" if name < "c" else "blue")
        if what == "answer":
            records.append(life.answer())
        elif what == "fail":
            records.append(life.fail())
        elif what == "correct" and life.tasks:
            records.append(life.correct(len(life.tasks) - 1, 3.0 * life.settled))
        elif what == "end" and life.settled:
            records.append(life.end())
            del lives[name]
        elif what == "answer, over":
            records.append(life.answer(over=True))
            del lives[name]
    return records


@given(steps, st.lists(st.integers(0, 40)), st.lists(st.booleans(), min_size=42, max_size=42))
def test_however_they_are_cut_and_written_anew_they_come_to_the_same(
    steps: list[tuple[str, str]], cuts: list[int], anew: list[bool]
) -> None:
    records = lived(steps)
    edges = [0, *sorted(min(cut, len(records)) for cut in cuts), len(records)]
    parts = [records[begin:end] for begin, end in itertools.pairwise(edges)]
    singly = told([[record] for record in records])
    made = []
    for part, is_anew in zip(parts, anew, strict=False):
        if is_anew:
            data, given_up = compact(part, kept_agents=1000, limit_bytes=PLENTY)
            assert given_up == 0
            part, unreadable = read(data)
            assert unreadable == 0
        made.append(part)
    assert told(made) == singly
    twice, _ = compact(
        read(compact(records, kept_agents=1000, limit_bytes=PLENTY)[0])[0], kept_agents=1000, limit_bytes=PLENTY
    )
    assert told([read(twice)[0]]) == singly


# Less


def test_many_steps_become_few() -> None:
    life = Life("a")
    records = [life.answer() for _ in range(50)]
    for number in range(200):
        records.append(Life(f"b{number}").answer(over=True))
        records.append(Life(f"c{number}").fail(over=True))
    few = list(records_of(fold(records)))
    assert len(few) == 1 + 50 + 1 + 200, "a row of usage, tasks and state of who lives, samples"
    data, given_up = compact(records, kept_agents=20, limit_bytes=PLENTY)
    assert given_up == 0
    assert len(read(data)[0]) == 1 + 50 + 1 + 20, "as many as a store would keep"
    assert compact([], kept_agents=1, limit_bytes=PLENTY) == (b"", 0)


def test_finished_agents_give_way_first_and_what_was_used_never() -> None:
    life = Life("a")
    records = [life.answer() for _ in range(20)]
    samples = [FinishedAgent(f"class-{number}", "t", []) for number in range(100)]
    records += [Step(sample=pack(sample)) for sample in samples]
    whole = len(compact(records, kept_agents=100, limit_bytes=PLENTY)[0])
    data, given_up = compact(records, kept_agents=100, limit_bytes=whole - 200)
    batch = fold(read(data)[0])
    kept, _ = unpack(batch.samples)
    assert given_up > 0
    assert kept == samples[given_up:], "the oldest go first"
    assert len(batch.tasks[life.run]) == 20
    data, given_up = compact(records, kept_agents=100, limit_bytes=1)
    batch = fold(read(data)[0])
    assert given_up == 101
    assert (batch.samples, batch.tasks) == ([], {})
    (agent,) = batch.agents.values()
    assert agent.standing == life.state.standing
    assert not agent.whole, "it is not learned from"
    assert batch.usage["red", HOUR].requests == 20
