"""The agent trace: what is written can be read again, and every kind of bad line is refused with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.agent_trace import AgentTrace, Prefix, TaskTrace, TraceError, parse_trace, read_trace, write_trace

names = st.text(min_size=1, max_size=20)
seconds = st.floats(min_value=0, max_value=1e6)


@st.composite
def agents(draw: st.DrawFn) -> AgentTrace:
    ids = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    tasks = []
    for place, task_id in enumerate(ids):
        prompt_tokens = draw(st.integers(1, 10_000))
        output_tokens = draw(st.integers(1, 10_000))
        prefix = st.builds(Prefix, names, st.integers(0, prompt_tokens))
        tasks.append(
            TaskTrace(
                task_id,
                prompt_tokens,
                output_tokens,
                # Only on earlier ones, so that there is no cycle.
                tuple(draw(st.lists(st.sampled_from(ids[:place]), unique=True))) if place else (),
                draw(seconds),
                draw(st.integers(0, prompt_tokens)),
                draw(st.none() | st.text(max_size=50)),
                draw(st.none() | prefix),
                draw(st.none() | st.text(max_size=50)),
                tuple(draw(st.lists(st.text(max_size=20), max_size=2))),
                draw(st.none() | st.integers(output_tokens, 20_000)),
            )
        )
    weight = draw(st.floats(min_value=1e-3, max_value=1e3))
    expected_tasks = draw(st.none() | st.integers(1, 100))
    return AgentTrace(
        draw(names),
        draw(seconds),
        tuple(tasks),
        draw(st.text(max_size=10)),
        draw(st.text(max_size=10)),
        weight,
        expected_tasks,
    )


@settings(deadline=None)  # it writes files, which take what they take
@given(st.lists(agents(), min_size=1, max_size=4, unique_by=lambda agent: agent.agent_id))
def test_a_trace_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[AgentTrace]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    write_trace(written, path)
    assert read_trace(path) == written


def test_the_example_of_the_format() -> None:
    line = """{"agent_id":"a17","class":"map-reduce","tenant":"t1","weight":1.0,"arrival_s":12.5,
     "tasks":[{"id":"m1","prompt_tokens":700,"output_tokens":180,"prefix":{"id":"sys-7","tokens":256}},
              {"id":"m2","prompt_tokens":650,"output_tokens":210,"prompt":"optional text"},
              {"id":"r","after":["m1","m2"],"think_s":0.4,"prompt_tokens":900,"cached_tokens":0,"output_tokens":300}]}"""
    (agent,) = parse_trace([line])
    assert (agent.agent_class, agent.tenant, agent.arrival_s) == ("map-reduce", "t1", 12.5)
    assert agent.tasks[0].prefix == Prefix("sys-7", 256)
    assert agent.tasks[2].after == ("m1", "m2")


def test_what_a_client_says_can_be_told() -> None:
    line = """{"agent_id":"a17","arrival_s":0,"expected_tasks":2,
     "tasks":[{"id":"m1","prompt_tokens":70,"output_tokens":18,"prompt":"Sum up: …","system":"Be brief.",
               "tools":["{\\"name\\":\\"find\\"}"],"max_tokens":18}]}"""
    (agent,) = parse_trace([line])
    (task,) = agent.tasks
    assert agent.expected_tasks == 2
    assert (task.system, task.tools, task.max_tokens) == ("Be brief.", ('{"name":"find"}',), 18)


def test_what_is_not_told_is_not_written(tmp_path: Path) -> None:
    write_trace([AgentTrace("a", 0.0, (TaskTrace("t", 5, 5),))], tmp_path / "trace.jsonl")
    (written,) = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert written == {
        "agent_id": "a",
        "arrival_s": 0.0,
        "tasks": [{"id": "t", "prompt_tokens": 5, "output_tokens": 5}],
    }


def test_cost_is_prompt_times_output_plus_the_triangle() -> None:
    assert TaskTrace("t", 10, 4).cost == 50


def line(
    agent: dict[str, Any] | None = None, task: dict[str, Any] | None = None, more: list[dict[str, Any]] | None = None
) -> str:
    first = {"id": "t", "prompt_tokens": 5, "output_tokens": 5, **(task or {})}
    return json.dumps({"agent_id": "a", "arrival_s": 0, "tasks": [first, *(more or [])], **(agent or {})})


OTHER = {"id": "u", "prompt_tokens": 5, "output_tokens": 5}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        (b'{"agent_id":"\xff"}', ""),
        (line({"colour": "red"}), "unknown field `colour`"),
        (line(task={"colour": "red"}), "unknown field `colour`"),
        (
            '{"agent_id":"a","arrival_s":0,"tasks":[{"id":"t","prompt_tokens":5}]}',
            "missing required field `output_tokens`",
        ),
        (
            '{"agent_id":"a","tasks":[{"id":"t","prompt_tokens":5,"output_tokens":5}]}',
            "missing required field `arrival_s`",
        ),
        (line({"tasks": []}), "length >= 1"),
        (line({"agent_id": ""}), "length >= 1"),
        (line({"arrival_s": -1}), ">= 0"),
        (line({"arrival_s": float("nan")}), "malformed"),
        (line({"arrival_s": float("inf")}), "malformed"),
        (line({"arrival_s": 0}).replace('"arrival_s": 0', '"arrival_s": 1e999'), ""),
        (line({"weight": 0}), "> 0"),
        (line({"weight": -2}), "> 0"),
        (line({"expected_tasks": 0}), ">= 1"),
        (line({"expected_tasks": 2.5}), "Expected `int"),
        (line(task={"prompt_tokens": -5}), ">= 1"),
        (line(task={"prompt_tokens": 2.5}), "Expected `int`"),
        (line(task={"output_tokens": 0}), ">= 1"),
        (line(task={"output_tokens": 10**30}), ""),
        (line(task={"think_s": -0.1}), ">= 0"),
        (line(task={"cached_tokens": -1}), ">= 0"),
        (line(task={"cached_tokens": 6}), "more cached tokens than prompt tokens"),
        (line(task={"max_tokens": 0}), ">= 1"),
        (line(task={"max_tokens": 4}), "more output tokens than its limit of 4"),
        (line(task={"tools": "find"}), "Expected `array"),
        (line(task={"tools": [{"name": "find"}]}), "Expected `str`"),
        (line(task={"system": 1}), "Expected `str"),
        (line(task={"prefix": {"id": "p", "tokens": 6}}), "longer than its prompt"),
        (line(more=[{**OTHER, "id": "t"}]), "two tasks with the same id"),
        (line(task={"after": ["x"]}), "comes after 'x'"),
        (line(task={"after": ["t"]}), "t → t"),
        (line(task={"after": ["u"]}, more=[{**OTHER, "after": ["t"]}]), "wait for each other"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(bad: str | bytes, reason: str) -> None:
    good = line({"agent_id": "before"})
    with pytest.raises(TraceError) as raised:
        list(parse_trace([good, "", bad]))
    assert raised.value.line == 3
    assert str(raised.value).startswith("line 3: ")
    assert reason in raised.value.reason


def test_an_agent_that_comes_twice_is_refused() -> None:
    with pytest.raises(TraceError, match="line 2: agent 'a' was already on line 1"):
        list(parse_trace([line(), line()]))


def test_a_trace_without_agents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(TraceError, match="holds no agent"):
        read_trace(path)
    with pytest.raises(TraceError):
        write_trace([], path)


@pytest.mark.parametrize(
    "agent",
    [
        AgentTrace("a", float("nan"), (TaskTrace("t", 1, 1),)),
        AgentTrace("a", 0, (TaskTrace("t", 1, -1),)),
        AgentTrace("a", 0, (TaskTrace("t", 1, 1, after=("gone",)),)),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, agent: AgentTrace) -> None:
    path = tmp_path / "bad.jsonl"
    with pytest.raises(TraceError):
        write_trace([agent], path)
    assert not path.exists()
