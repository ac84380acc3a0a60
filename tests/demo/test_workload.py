"""The demo's agents: the same for the same seed, of all kinds and sizes, and within the tiny model's means."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.agent_trace import read_trace, write_trace
from gateway.demo.kinds import KINDS, SIZES, size_counts
from gateway.demo.workload import (
    MAX_OUTPUT_TOKENS,
    MIN_OUTPUT_TOKENS,
    about_tokens,
    demo_mix,
    length_key,
    length_table,
)

SEEDS = range(12)
KV_TOKENS = 128 * 32


def test_the_same_seed_makes_the_same_mix() -> None:
    assert demo_mix(7) == demo_mix(7)
    assert demo_mix(7) != demo_mix(8)


def test_every_kind_is_there() -> None:
    assert {agent.agent_class for seed in SEEDS for agent in demo_mix(seed)} == {kind.name for kind in KINDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mix_is_a_valid_trace(seed: int, tmp_path: Path) -> None:
    mix = demo_mix(seed)
    write_trace(mix, tmp_path / "mix.jsonl")  # refuses unknown and cyclic `after`
    assert read_trace(tmp_path / "mix.jsonl") == mix


@pytest.mark.parametrize("seed", SEEDS)
def test_sizes_and_what_they_cost(seed: int) -> None:
    size_of = {kind.name: kind.size for kind in KINDS}
    mix = demo_mix(seed)
    costs = {size: [agent.cost for agent in mix if size_of[agent.agent_class] == size] for size in SIZES}
    assert {size: len(costs[size]) for size in SIZES} == {"small": 27, "medium": 14, "large": 4}
    assert max(costs["small"]) < min(costs["medium"])
    assert max(costs["medium"]) < min(costs["large"])
    assert sum(costs["large"]) > 0.6 * sum(agent.cost for agent in mix)


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_fit_the_model_and_outgrow_its_memory_together(seed: int) -> None:
    tasks = [task for agent in demo_mix(seed) for task in agent.tasks]
    assert all(MIN_OUTPUT_TOKENS <= task.output_tokens <= MAX_OUTPUT_TOKENS for task in tasks)
    assert all(20 <= task.prompt_tokens <= 320 for task in tasks)
    assert all(task.prompt_tokens == about_tokens(task.prompt or "") for task in tasks)
    assert sum(task.prompt_tokens + task.output_tokens for task in tasks) > 5 * KV_TOKENS


def test_loops_think_and_stages_wait() -> None:
    agents = [agent for seed in SEEDS for agent in demo_mix(seed)]
    loops = [agent for agent in agents if agent.agent_class == "alfworld"]
    assert all(0.05 <= task.think_s <= 0.3 and len(task.after) == 1 for agent in loops for task in agent.tasks[1:])
    assert all(any(task.after for task in agent.tasks) for agent in agents if agent.agent_class == "map-reduce-summary")


def test_agents_arrive_within_the_window_in_order() -> None:
    arrivals = [agent.arrival_s for agent in demo_mix(3, agents=20, window_s=2.0)]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0
    assert arrivals[-1] <= 2.0


@pytest.mark.parametrize("agents", [1, 2, 5, 10, 45, 300])
def test_any_number_of_agents(agents: int) -> None:
    assert sum(size_counts(agents).values()) == agents
    assert len(demo_mix(1, agents=agents)) == agents


@pytest.mark.parametrize(("agents", "window_s", "scale"), [(0, 1, 1), (5, -1, 1), (5, 1, 0)])
def test_an_empty_mix_is_refused(agents: int, window_s: float, scale: float) -> None:
    with pytest.raises(ValueError, match="a mix needs"):
        demo_mix(1, agents, window_s, scale)


def test_scale_makes_the_large_ones_wider_and_leaves_the_small_ones() -> None:
    once, twice = demo_mix(7), demo_mix(7, scale=2)
    small = {kind.name for kind in KINDS if kind.size == "small"}
    assert sum(agent.cost for agent in twice) > 1.6 * sum(agent.cost for agent in once)
    assert max(len(agent.tasks) for agent in twice if agent.agent_class in small) <= 8


def test_the_table_has_a_key_for_every_task_and_the_key_tells_nothing() -> None:
    mixes = [demo_mix(1), demo_mix(2)]
    table = length_table(mixes, "salt")
    tasks = [(agent, task) for mix in mixes for agent in mix for task in agent.tasks]
    assert len(table) == len(tasks)
    assert all(table[length_key("salt", agent.agent_id, task.id)] == task.output_tokens for agent, task in tasks)
    assert not any(
        agent.agent_id in key or str(task.output_tokens) == key for key in table for agent, task in tasks[:20]
    )
    assert table.keys().isdisjoint(length_table(mixes, "other salt"))
