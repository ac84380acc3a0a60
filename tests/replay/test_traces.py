"""The built-in traces: the same words give the same agents, and the agents are what the words say."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from gateway.agent_trace import AgentTrace, TaskTrace, TraceError, read_trace, write_trace
from gateway.replay import traces
from gateway.replay.agent_types import (
    ITERATION_S,
    KV_IN_USE,
    KV_TOKENS,
    MIXES,
    PAPER_TYPES,
    TOOL_TYPES,
    AgentType,
)
from gateway.replay.traces import BUILT_IN, MICE_SHARE, MOUSE_COST, built_in, describe

SPECS = (
    "paper:0:1",
    "paper:3:2.5:light",
    "paper:1:3:heavy",
    "elephant:40",
    "elephant:40:7",
    "tools:0",
    "prefix:0",
    "tenants:0",
    "text:0",
    "text:1:2:held-out",
)
TOKENS_PER_S = KV_TOKENS * KV_IN_USE / ITERATION_S
SIZE_OF = {kind.name: kind.size for kind in (*PAPER_TYPES, *TOOL_TYPES)}


def made(spec: str) -> list[AgentTrace]:
    agents = built_in(spec)
    assert agents is not None
    return agents


def all_tasks(agents: list[AgentTrace]) -> list[TaskTrace]:
    return [task for agent in agents for task in agent.tasks]


def of_class(agents: list[AgentTrace], name: str) -> list[AgentTrace]:
    return [agent for agent in agents if agent.agent_class == name]


def mooncake(path: Path, times_ms: list[int]) -> Path:
    path.write_text("timestamp_ms,input_tokens\n" + "".join(f"{at},100\n" for at in times_ms), encoding="utf-8")
    return path


# --- what holds for every trace ---


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_words_give_the_same_sorted_agents_that_fit_and_can_be_read_back(spec: str, tmp_path: Path) -> None:
    agents = made(spec)
    assert agents == made(spec)
    assert [agent.arrival_s for agent in agents] == sorted(agent.arrival_s for agent in agents)
    assert all(task.prompt_tokens + task.output_tokens <= PAPER_TYPES[0].longest for task in all_tasks(agents))
    write_trace(agents, tmp_path / "trace.jsonl")
    assert read_trace(tmp_path / "trace.jsonl") == agents


@pytest.mark.parametrize(
    "spec", ["paper:{}:3", "elephant:40:{}", "tools:{}", "coding:{}", "prefix:{}", "tenants:{}", "text:{}"]
)
def test_another_seed_gives_other_agents(spec: str) -> None:
    def sizes(seed: int) -> list[int]:
        return [agent.cost for agent in made(spec.format(seed))]

    assert sizes(0) != sizes(1)


@pytest.mark.wire
def test_another_process_makes_the_same_trace() -> None:
    program = "from gateway.replay.traces import built_in; print(sum(a.cost for a in built_in('paper:0:3')))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == sum(agent.cost for agent in made("paper:0:3"))


# --- paper ---


@pytest.mark.parametrize("seed", range(6))
def test_the_default_mix_is_calibrated(seed: int) -> None:
    facts: dict[str, Any] = describe(made(f"paper:{seed}:3"))
    assert facts["agents"] == 300
    assert 2_600 <= facts["tasks"] <= 3_400
    assert 40_000 <= facts["iterations"] <= 50_000
    assert 0.45 <= facts["class_mean_error"] <= 0.65
    assert {size: row["agents"] for size, row in facts["sizes"].items()} == {"small": 180, "medium": 90, "large": 30}
    assert set(facts["classes"]) == {kind.name for kind in PAPER_TYPES}
    costs = [facts["sizes"][size]["cost_mean"] for size in ("small", "medium", "large")]
    assert all(more > 2.5 * less for less, more in pairwise(costs))


def test_a_mix_shifts_sizes_and_work() -> None:
    facts: dict[str, dict[str, Any]] = {mix: describe(made(f"paper:0:3:{mix}")) for mix in MIXES}
    assert made("paper:0:3:paper") == made("paper:0:3")
    light = facts["light"]["sizes"]
    assert {size: row["agents"] for size, row in light.items()} == {"small": 225, "medium": 60, "large": 15}
    assert facts["light"]["cost"] < 0.6 * facts["paper"]["cost"]
    assert facts["heavy"]["class_mean_error"] > 2 * facts["paper"]["class_mean_error"]

    def largest(mix: str) -> int:
        return max(agent.cost for agent in made(f"paper:0:3:{mix}"))

    assert largest("heavy") > 1.5 * largest("paper")


def test_a_load_squeezes_the_arrivals_of_the_same_agents() -> None:
    once, twice = made("paper:0:1"), made("paper:0:2")
    assert [agent.tasks for agent in once] == [agent.tasks for agent in twice]
    assert [a.agent_id for a in once] == [a.agent_id for a in twice]
    assert all(math.isclose(a.arrival_s, 2 * b.arrival_s, abs_tol=0.01) for a, b in zip(once, twice, strict=True))
    assert 1_000 < once[-1].arrival_s <= 18 * 60
    assert once[17].agent_id.startswith("paper-0-017-")


def test_arrivals_are_burstier_than_a_steady_stream() -> None:
    """Of counts by the minute, a Poisson process has a variance as large as their mean."""
    ratios = []
    for seed in range(10):
        counts = Counter(int(agent.arrival_s // 60) for agent in made(f"paper:{seed}:1"))
        by_minute = [counts[minute] for minute in range(18)]
        mean = fmean(by_minute)
        ratios.append(fmean((count - mean) ** 2 for count in by_minute) / mean)
    assert fmean(ratios) > 2.5


def test_lengths_are_clipped_where_the_tail_is_long() -> None:
    tasks = all_tasks(made("paper:1:3:heavy"))
    assert max(task.prompt_tokens + task.output_tokens for task in tasks) == PAPER_TYPES[0].longest


# --- structure ---


@pytest.mark.parametrize(
    ("name", "part", "last"), [("map-reduce-summary", "map", "reduce"), ("document-merging", "merge", "vote")]
)
def test_many_in_parallel_and_one_that_reads_them(name: str, part: str, last: str) -> None:
    for agent in of_class(made("paper:0:3"), name):
        *parts, end = agent.tasks
        assert end.id == last and end.after == tuple(task.id for task in parts)
        assert all(task.id.startswith(part) and not task.after for task in parts)


def test_a_plan_then_steps_then_an_answer() -> None:
    for agent in of_class(made("paper:0:3"), "plan-and-execute"):
        plan, *steps, answer = agent.tasks
        assert plan.after == () and answer.after == tuple(step.id for step in steps)
        assert all(step.after == ("plan",) for step in steps)


@pytest.mark.parametrize("kind", [kind for kind in PAPER_TYPES if kind.shape in ("parallel", "samples")])
def test_parallel_agents_wait_for_nothing(kind: AgentType) -> None:
    for agent in of_class(made("paper:0:3"), kind.name):
        assert len(agent.tasks) >= 2 and all(task.after == () and task.think_s == 0 for task in agent.tasks)
        if kind.shape == "samples":
            assert len({task.prompt_tokens for task in agent.tasks}) == 1


def test_alfworld_takes_turns_whose_prompts_grow() -> None:
    for agent in of_class(made("paper:0:3"), "alfworld"):
        assert 4 <= len(agent.tasks) <= 8
        for before, turn in pairwise(agent.tasks):
            assert turn.after == (before.id,) and 0.05 <= turn.think_s <= 0.5
            assert turn.prompt_tokens > before.prompt_tokens


# --- elephant ---


def test_the_elephant_is_worth_about_seven_mice() -> None:
    alone = [made(f"elephant:0:{seed}") for seed in range(5)]
    assert all(len(agents) == 1 and agents[0].arrival_s == 0 for agents in alone)
    assert 5 < fmean(agents[0].cost for agents in alone) / MOUSE_COST < 8


def test_more_mice_are_a_longer_stream_of_the_same_rate() -> None:
    some, many = made("elephant:100"), made("elephant:3000")
    assert many[:101] == some
    mice = many[1:]
    assert {SIZE_OF[mouse.agent_class] for mouse in mice} == {"small"}
    assert all(6 <= len(mouse.tasks) <= 12 for mouse in mice)
    work_s = sum(mouse.cost for mouse in mice) / TOKENS_PER_S
    assert work_s / mice[-1].arrival_s == pytest.approx(MICE_SHARE, rel=0.08)


# --- stories ---


@pytest.mark.parametrize(("spec", "classes"), [("tools:1:stories", {"coding"}), ("coding:1", {"coding"})])
def test_a_story_goes_on(spec: str, classes: set[str]) -> None:
    """Each prompt begins with the one before and its answer: they lie in one beginning, and none is longer than it."""
    agents = made(spec)
    assert {agent.agent_class for agent in agents if agent.tasks[0].prefix is not None} == classes
    for agent in agents:
        if agent.agent_class not in classes:
            continue
        for before, task in pairwise(agent.tasks):
            assert before.prefix is not None and task.prefix is not None
            assert before.prefix.id == task.prefix.id
            assert before.prefix.tokens == before.prompt_tokens + before.output_tokens <= task.prompt_tokens


# --- tools ---


def test_two_thirds_wait_for_tools() -> None:
    agents = made("tools:0")
    waiting = [agent for agent in agents if any(task.think_s for task in agent.tasks)]
    assert len(agents) == 300 and len(waiting) == 200
    assert Counter(agent.agent_class for agent in waiting) == {"coding": 100, "plan-and-execute": 100}
    for agent in waiting:
        assert all(task.after == (before.id,) for before, task in pairwise(agent.tasks[:-1]))
    assert all(5 <= len(agent.tasks) <= 15 for agent in of_class(agents, "coding"))
    thinks = sorted(task.think_s for task in all_tasks(waiting) if task.think_s)
    assert thinks[len(thinks) // 2] == pytest.approx(2, rel=0.15)
    assert agents[-1].arrival_s <= 9 * 60


# --- prefix ---


def test_prompts_begin_alike_in_a_class_and_further_in_an_agent() -> None:
    agents, plain = made("prefix:0"), made("paper:0:3")
    assert [agent.cost for agent in agents] == [agent.cost for agent in plain]
    lengths: dict[str, set[int]] = {}
    both = 0
    for agent in agents:
        for task in agent.tasks:
            link = task.prefix
            assert link is None or link.tokens < task.prompt_tokens
            both += link is not None and link.parent is not None
            while link is not None:
                lengths.setdefault(link.id, set()).add(link.tokens)
                assert link.parent is None or link.parent.tokens + 3 * 16 <= link.tokens
                assert link.id == f"{'agent' if link.parent else 'class'}:" + (
                    agent.agent_id if link.parent else agent.agent_class
                )
                link = link.parent
    assert all(len(told) == 1 for told in lengths.values())
    assert sum(name.startswith("class:") for name in lengths) == len(PAPER_TYPES)
    assert all(min(told) >= 2 * 16 for told in lengths.values())
    assert both > 0.95 * len(all_tasks(agents))


# --- tenants ---


@pytest.mark.parametrize("seed", range(3))
def test_one_tenant_has_cut_the_same_work_into_ten_times_the_agents(seed: int) -> None:
    agents = made(f"tenants:{seed}")
    whole = [agent for agent in agents if agent.tenant == "whole"]
    split = [agent for agent in agents if agent.tenant == "split"]
    assert len(split) == 10 * len(whole) and len(whole) + len(split) == len(agents)
    assert {agent.weight for agent in agents} == {1.0}
    for agent in whole:
        pieces = [piece for piece in split if piece.agent_id.startswith(f"{agent.agent_id}-")]
        assert len(pieces) == 10
        assert {(piece.arrival_s, piece.agent_class) for piece in pieces} == {(agent.arrival_s, agent.agent_class)}
        assert {len(piece.tasks) for piece in pieces} == {len(agent.tasks) / 10}
        assert sorted(task.id for task in all_tasks(pieces)) == sorted(task.id for task in agent.tasks)
        assert sum(piece.cost for piece in pieces) == agent.cost
    # Even with the engine to itself, each of them would have work for longer than it arrives.
    assert sum(agent.cost for agent in whole) / TOKENS_PER_S > 1.5 * agents[-1].arrival_s


# --- public ---


def test_a_recording_in_milliseconds_gives_the_arrivals(tmp_path: Path) -> None:
    # Three quarters of the requests in the first tenth of the time.
    times = [1_000 + 10 * i for i in range(300)] + [4_000 + 270 * i for i in range(101)]
    path = mooncake(tmp_path / "with:colon.csv", times)
    agents = traces.public(path, 0, 100, 60.0)
    assert len(agents) == 100 and agents == traces.public(path, 0, 100, 60.0) != traces.public(path, 1, 100, 60.0)
    assert agents[0].arrival_s >= 0 and 50 < agents[-1].arrival_s <= 60
    assert 60 <= sum(agent.arrival_s < 6 for agent in agents) <= 90
    spec = made(f"public:{path}:0:2")
    assert len(spec) == 300 and spec[-1].arrival_s <= 540 < made(f"public:{path}:0")[-1].arrival_s
    assert [agent.tasks for agent in spec] == [agent.tasks for agent in made("paper:0:2")]


def test_a_recording_with_dates_gives_the_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    # Out of order, over midnight, seven digits.
    rows = ["2023-11-17 00:00:02.5000000,1,1", "2023-11-16 23:59:58.5000000,1,1", "2023-11-16 23:59:59.5000000,1,1"]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows), encoding="utf-8")
    assert [agent.arrival_s for agent in traces.public(path, 0, 3, 8.0)] == [0.0, 2.0, 8.0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("when,what\n1,2\n", "neither a column timestamp_ms"),
        ("", "neither a column timestamp_ms"),
        ("timestamp_ms\n1\n2\n", "has 2 rows; 3 agents need as many arrivals"),
        ("timestamp_ms\n5\n5\n5\n", "same time"),
        ("timestamp_ms\n1\nsoon\n3\n", "line 3: .*'soon' in column timestamp_ms is not a time"),
        ("timestamp_ms\n1\nnan\n3\n", "line 3: "),
        ("TIMESTAMP\n2023-11-16 18:17:03\nyesterday\n", "line 3: .*'yesterday'"),
        ("other,timestamp_ms\n1,1\n1\n", "line 3: .*is not a time"),
    ],
)
def test_a_recording_that_cannot_be_used_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=told):
        traces.public(path, 0, 3, 60.0)


def test_a_recording_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        built_in(f"public:{tmp_path}/none.csv:0")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00timestamp_ms")
    with pytest.raises(TraceError, match="cannot be read"):
        built_in(f"public:{tmp_path}/binary.csv:0")


# --- specs ---


@pytest.mark.parametrize("spec", ["trace.jsonl", "paper.jsonl", "./paper:0:1", "papers:0:1", "", "/tmp/a:b"])
def test_what_begins_with_no_name_is_a_path(spec: str) -> None:
    assert built_in(spec) is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("paper", "2 or 3 values are needed after the name, not 0"),
        ("paper:x", "2 or 3 values are needed after the name, not 1"),
        ("paper:x:1", "SEED is a whole number of at most nine digits, not 'x'"),
        ("paper:-1:1", "SEED is a whole number"),
        ("paper:0:0", "LOAD is a number above 0, not '0'"),
        ("paper:0:nan", "LOAD is a number above 0"),
        ("paper:0:1e-320", "LOAD is a number above 0"),
        ("paper:0:fast", "LOAD is a number above 0, not 'fast'"),
        ("paper:0:1:medium", "there is no mix 'medium', only paper, light, heavy"),
        ("paper:0:1:light:2", "2 or 3 values"),
        ("elephant:", "1 or 2 values"),
        ("elephant:many", "MICE is a whole number"),
        ("elephant:1:x", "SEED is a whole number"),
        ("tools:", "one value is needed after the name, not 0"),
        ("tools:0:3", "there may be `stories`, not '3'"),
        ("prefix:a", "SEED is a whole number"),
        ("tenants:1.5", "SEED is a whole number"),
        ("text:", "1 or 2 values are needed after the name, not 0"),
        ("text:held-out", "SEED is a whole number of at most nine digits, not .held-out"),
        ("text:x", "SEED is a whole number"),
        ("text:0:held-in", "LOAD is a number above 0, not 'held-in'"),
        ("text:0:held-out:3", "1 or 2 values"),
        ("text:0:3:held-out:4", "1 or 2 values"),
        ("public:", "it needs a path"),
        ("public:some.csv", "it needs a path"),
        ("public:some.csv:x", "it needs a path"),
        ("public:some.csv:0:fast", "LOAD is a number above 0"),
    ],
)
def test_a_spec_that_is_written_wrongly_is_refused_in_words(spec: str, told: str) -> None:
    with pytest.raises(TraceError, match=told) as refused:
        built_in(spec)
    name = spec.partition(":")[0]
    assert f"It is written {name}:" in str(refused.value)


def test_every_name_has_a_line_with_its_grammar() -> None:
    assert set(BUILT_IN) == {"paper", "elephant", "tools", "coding", "prefix", "tenants", "public", "text"}
    assert all(line.startswith(f"{name}:") and "\n" not in line for name, line in BUILT_IN.items())


# --- describe ---


def test_a_description_adds_up() -> None:
    agents = [
        AgentTrace("a", 0.0, (TaskTrace("t", 10, 4),), agent_class="x"),
        AgentTrace("b", 5.0, (TaskTrace("t", 10, 4), TaskTrace("u", 10, 4)), agent_class="x"),
    ]
    facts: dict[str, Any] = describe(agents)
    assert (facts["agents"], facts["tasks"], facts["cost"], facts["last_arrival_s"]) == (2, 3, 150, 5.0)
    # The mean is 75: 50 off by a half, 100 by a quarter.
    assert facts["class_mean_error"] == pytest.approx(0.375)
    row = facts["classes"]["x"]
    assert row == facts["sizes"]["unknown"]
    assert (row["tasks_mean"], row["prompt_mean"], row["output_mean"], row["cost_mean"]) == (1.5, 10, 4, 75)
    assert row["cost_share"] == 1
