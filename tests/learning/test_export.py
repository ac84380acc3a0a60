"""What was served becomes a trace that can be read and replayed: the same tasks, waiting for each other as they did."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.agent_trace import AgentTrace, check, read_trace, write_trace
from gateway.learning.export import MAX_AFTER, trace, traced, waits_of
from predictor.types import FinishedAgent, FinishedTask

Span = tuple[float, float]


def agent(*spans: Span, arrived_at: float = 1e9) -> FinishedAgent:
    tasks = [FinishedTask(40, 10, 2, 5, arrived_s=begin, ended_s=end) for begin, end in spans]
    return FinishedAgent("kind", "t", tasks, arrived_at=arrived_at)


def after(made: AgentTrace) -> dict[str, tuple[str, ...]]:
    return {task.id: task.after for task in made.tasks}


def replayed(made: AgentTrace, took_s: Sequence[float]) -> list[Span]:
    """When its tasks arrive and end, by the rules of a trace, if each takes as long as told."""
    ends: dict[str, float] = {}
    spans = []
    for task, took in zip(made.tasks, took_s, strict=True):
        begin = max((ends[name] for name in task.after), default=0.0) + task.think_s
        ends[task.id] = begin + took
        spans.append((begin, begin + took))
    return spans


def test_map_reduce() -> None:
    made = trace(agent((0, 4), (0.1, 3), (0.2, 5), (5.5, 7)), "a")
    assert after(made) == {"t1": (), "t2": (), "t3": (), "t4": ("t2", "t1", "t3")}
    assert [task.think_s for task in made.tasks] == pytest.approx([0, 0.1, 0.2, 0.5])


def test_one_after_the_other_with_a_tool_between() -> None:
    made = trace(agent((0, 1), (3, 4), (4.5, 6)), "a")
    assert after(made) == {"t1": (), "t2": ("t1",), "t3": ("t2",)}
    assert [task.think_s for task in made.tasks] == [0, 2, 0.5]


def test_of_those_before_only_the_latest_wave() -> None:
    """A client with two slots: each task follows the one that made room for it, and the last follows both."""
    made = trace(agent((0, 2), (0, 3), (2, 5), (3, 4), (5, 6)), "a")
    assert after(made) == {"t1": (), "t2": (), "t3": ("t1",), "t4": ("t1", "t2"), "t5": ("t4", "t3")}


def test_tasks_that_took_no_time_wait_for_nobody_of_their_instant() -> None:
    made = trace(agent((0, 0), (0, 0), (1, 1), (1, 2)), "a")
    assert after(made) == {"t1": (), "t2": (), "t3": ("t1", "t2"), "t4": ("t1", "t2")}


# On a grid, so that ends and arrivals meet.
spans = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=12).map(
    lambda drawn: sorted((float(begin), float(begin + took)) for begin, took in drawn)
)


@given(spans)
def test_a_replay_at_the_same_speed_is_what_was_served(served: list[Span]) -> None:
    made = trace(agent(*served), "a")
    check(made)
    assert replayed(made, [end - begin for begin, end in served]) == [pytest.approx(span) for span in served]


@given(spans)
def test_all_that_had_ended_are_waited_for_and_none_twice(served: list[Span]) -> None:
    """Against the definition: who ended before, without those that others of them waited for."""
    waits = [set(places) for places, _ in waits_of(*zip(*served, strict=True))]
    before = [{p for p, (begin, end) in enumerate(served) if end <= task[0] and begin < task[0]} for task in served]
    for place, ended in enumerate(before):
        assert waits[place] == ended - set().union(*(before[other] for other in ended))


def test_each_sequence_is_a_task_with_its_share() -> None:
    batch = FinishedTask(40, 11, 4, 9, prompts=2, sequences=4, ended_s=1, max_tokens=3, prompt="which?")
    made = trace(FinishedAgent(None, "t", [batch, FinishedTask(40, 3, 0, 1, arrived_s=2, ended_s=3)]), "a", text=True)
    assert [(task.prompt_tokens, task.cached_tokens, task.output_tokens) for task in made.tasks[:4]] == [
        (6, 2, 3),
        (6, 2, 2),
        (5, 2, 2),
        (5, 2, 2),
    ]
    assert {task.max_tokens for task in made.tasks[:4]} == {3}
    assert made.tasks[4].after == ("t1.1", "t1.2", "t1.3", "t1.4")
    assert all(task.prompt is None for task in made.tasks), "nobody knows which text is whose"
    assert made.agent_class == ""


def test_wide_waves_stay_small() -> None:
    tasks = [FinishedTask(40, 10, 0, 1, sequences=1000, arrived_s=t, ended_s=t + 1) for t in (0, 1, 2)]
    made = trace(FinishedAgent(None, "t", tasks), "a")
    assert len(made.tasks) == 3000
    assert {len(task.after) for task in made.tasks} == {0, MAX_AFTER}
    check(made)


def test_nothing_has_no_token_and_no_limit_is_passed() -> None:
    empty = FinishedTask(0, 0, 0, 0, max_tokens=0)
    over = FinishedTask(40, 10, 20, 9, max_tokens=5)
    made = trace(FinishedAgent("kind", "t", [empty, over]), "a")
    check(made)
    assert [(t.prompt_tokens, t.cached_tokens, t.output_tokens, t.max_tokens) for t in made.tasks] == [
        (1, 0, 1, 1),
        (10, 10, 9, 9),
    ]


async def several(*agents: FinishedAgent) -> AsyncIterator[FinishedAgent]:
    for each in agents:
        yield each


async def test_agents_arrive_as_they_did_and_keep_their_names() -> None:
    """In the store they stand as they ended. The oldest may have gone since."""
    first, second, twin, third = (agent((0, 1), arrived_at=1e9 + at) for at in (0.25, 1, 1, 4))
    made = await traced(several(third, second, first, twin))
    assert [(each.agent_id, each.arrival_s) for each in made] == [
        ("a1000000000250", 0),
        ("a1000000001000", 0.75),
        ("a1000000001000.2", 0.75),
        ("a1000000004000", 3.75),
    ]
    assert [each.agent_id for each in await traced(several(third, second), since=1e9 + 0.5)] == [
        "a1000000001000",
        "a1000000004000",
    ]


@pytest.mark.parametrize("text", [False, True])
async def test_what_is_written_can_be_read(tmp_path: Path, text: bool) -> None:
    told = FinishedAgent(
        "kind",
        "t",
        [FinishedTask(40, 10, 2, 5, max_tokens=16, prompt="Why?", system="Be brief.", ended_s=2.0, held=9.0, row=b"x")],
        "schema",
        1e9,
        2.5,
        7,
    )
    made = await traced(several(told, agent((0, 1), (1, 2))), text=text)
    write_trace(made, tmp_path / "trace.jsonl")
    (first, _) = read_trace(tmp_path / "trace.jsonl")
    assert (first.agent_class, first.tenant, first.weight, first.expected_tasks) == ("kind", "t", 2.5, 7)
    (task,) = first.tasks
    assert (task.prompt, task.system) == (("Why?", "Be brief.") if text else (None, None))
    assert (task.prompt_tokens, task.cached_tokens, task.output_tokens, task.max_tokens) == (10, 2, 5, 16)
