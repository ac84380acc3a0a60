"""Results to figures: the summary of a run, the JSON that every comparison ends in, and a table for the terminal.

Only what was measured is here; a report never runs anything. JCT is the end of an agent's last task minus the sending
of its first, in seconds of the wall clock.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table

from gateway.agent_trace import AgentTrace
from gateway.demo.kinds import SIZES, Size, size_counts
from gateway.replay.figures import mean, percentile
from predictor.cost import task_cost

if TYPE_CHECKING:  # replays report too, and have no HTTP client
    from gateway.demo.client import ReplayResult, TaskResult


class AgentOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent of one run. Costs are in KV token·iterations."""

    agent_id: str
    arrival_s: float
    finish_s: float
    jct_s: float | None  # None when a task failed: the agent did not complete
    size: Size
    cost: float  # from the engine's usage
    tasks: int
    agent_class: str = msgspec.field(name="class", default="")
    tenant: str = ""
    predicted_cost: float | None = None  # from the headers of the agent's first answer
    queue_s: float = 0.0  # summed over its tasks
    failed_tasks: int = 0


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """Over the agents that completed. What only the engine knows is None when it did not report it."""

    agents: int
    tasks: int
    failed_tasks: int
    mean_jct_s: float
    p50_jct_s: float
    p90_jct_s: float
    p99_jct_s: float
    max_jct_s: float
    makespan_s: float
    prompt_tokens: int
    output_tokens: int
    mean_first_token_s: float
    preemptions: int | None = None
    iterations: int | None = None
    mean_kv_usage: float | None = None  # share of the KV cache held, mean over the iterations while tasks waited
    mean_running: float | None = None  # tasks, over the same iterations
    waiting_share: float | None = None  # of the iterations: those while tasks waited, in the gateway or in the engine


class Run(msgspec.Struct, frozen=True):
    """A trace under one policy."""

    policy: str
    predictor: str
    summary: Summary
    agents: list[AgentOutcome]


class EngineFigures(msgspec.Struct, frozen=True):
    """What the engine reported of itself during one run."""

    preemptions: int
    iterations: int
    mean_kv_usage: float
    mean_running: float
    waiting_share: float


def sizes(agents: Sequence[AgentTrace]) -> dict[str, Size]:
    """By true cost: the smallest 60 % of the agents are small, the next 30 % medium, the rest large."""
    ranked = sorted(agents, key=lambda agent: (agent.cost, agent.agent_id))
    names: list[Size] = [size for size, count in size_counts(len(ranked)).items() for _ in range(count)]
    return {agent.agent_id: name for agent, name in zip(ranked, names, strict=True)}


def summarise(
    policy: str,
    agents: Sequence[AgentTrace],
    result: ReplayResult,
    predictor: str = "",
    engine: EngineFigures | None = None,
) -> Run:
    """Raises `KeyError` for an agent of the trace that has no result at all."""
    size = sizes(agents)
    results: dict[str, list[TaskResult]] = defaultdict(list)
    for task in result.tasks:
        results[task.agent_id].append(task)
    outcomes = [_outcome(agent, results[agent.agent_id], size[agent.agent_id]) for agent in agents]
    jcts = [outcome.jct_s for outcome in outcomes if outcome.jct_s is not None]
    firsts = [task.first_token_s - task.submit_s for task in result.tasks if task.first_token_s is not None]
    summary = Summary(
        agents=len(outcomes),
        tasks=len(result.tasks),
        failed_tasks=len(result.errors),
        mean_jct_s=mean(jcts),
        p50_jct_s=percentile(jcts, 0.5),
        p90_jct_s=percentile(jcts, 0.9),
        p99_jct_s=percentile(jcts, 0.99),
        max_jct_s=max(jcts, default=math.nan),
        makespan_s=max(outcome.finish_s for outcome in outcomes) - min(outcome.arrival_s for outcome in outcomes),
        prompt_tokens=sum(task.prompt_tokens or 0 for task in result.tasks),
        output_tokens=sum(task.output_tokens or 0 for task in result.tasks),
        mean_first_token_s=mean(firsts),
        preemptions=engine.preemptions if engine else None,
        iterations=engine.iterations if engine else None,
        mean_kv_usage=engine.mean_kv_usage if engine else None,
        mean_running=engine.mean_running if engine else None,
        waiting_share=engine.waiting_share if engine else None,
    )
    return Run(policy, predictor, summary, outcomes)


def _outcome(agent: AgentTrace, tasks: Sequence[TaskResult], size: Size) -> AgentOutcome:
    if not tasks:
        raise KeyError(agent.agent_id)
    first, last = min(tasks, key=lambda task: task.submit_s), max(tasks, key=lambda task: task.end_s)
    failed = sum(task.error is not None for task in tasks)
    return AgentOutcome(
        agent_id=agent.agent_id,
        arrival_s=first.submit_s,
        finish_s=last.end_s,
        jct_s=None if failed else last.end_s - first.submit_s,
        size=size,
        cost=sum(
            task_cost(task.prompt_tokens or 0, task.output_tokens or 0, task.cached_tokens or 0) for task in tasks
        ),
        tasks=len(tasks),
        agent_class=agent.agent_class,
        tenant=agent.tenant,
        predicted_cost=first.predicted_cost,
        queue_s=sum(task.queue_s or 0.0 for task in tasks),
        failed_tasks=failed,
    )


def jcts(run: Run, size: Size | None = None) -> list[float]:
    """Of the completed agents of one size, or of all."""
    return [agent.jct_s for agent in run.agents if agent.jct_s is not None and size in (None, agent.size)]


def ratio(run: Run, baseline: Run) -> float:
    """Mean JCT of a run over that of a baseline: below 1 is faster. NaN when either has nothing to show."""
    return run.summary.mean_jct_s / baseline.summary.mean_jct_s


def prediction_factor(run: Run) -> float:
    """Median over the agents of predicted cost over cost, or its inverse where that is larger: 1 is exact. NaN when no
    prediction was sent."""
    pairs = [(agent.predicted_cost, agent.cost) for agent in run.agents if agent.predicted_cost and agent.cost]
    return percentile([max(predicted / cost, cost / predicted) for predicted, cost in pairs], 0.5)


def differing_tokens(left: ReplayResult, right: ReplayResult) -> list[tuple[TaskResult, TaskResult]]:
    """Tasks with other prompt or output tokens in two replays of one trace: none, in a fair comparison."""
    other = {(task.agent_id, task.task_id): task for task in right.tasks}
    pairs = [(task, other[task.agent_id, task.task_id]) for task in left.tasks]
    return [
        (one, two)
        for one, two in pairs
        if (one.prompt_tokens, one.output_tokens) != (two.prompt_tokens, two.output_tokens)
    ]


def write_json(path: Path, config: dict[str, Any], trace: dict[str, Any], runs: Sequence[Run]) -> None:
    """The output format of `justitia replay` and of the demo: `{"config", "trace", "runs"}`."""
    document = msgspec.json.encode({"config": config, "trace": trace, "runs": list(runs)})
    path.write_bytes(msgspec.json.format(document, indent=1) + b"\n")


def table(run: Run, baseline: Run) -> Table:
    """JCT in seconds by size of agent, a run beneath a baseline."""
    drawn = Table(title="Completion time of an agent, seconds", title_justify="left")
    drawn.add_column("agents")
    drawn.add_column("policy")
    for heading in ("mean", "P50", "P90", "worst"):
        drawn.add_column(heading, justify="right")
    groups: list[tuple[str, Size | None]] = [*((size, size) for size in SIZES), ("all", None)]
    for name, size in groups:
        before, after = _figures(jcts(baseline, size)), _figures(jcts(run, size))
        drawn.add_row(name, baseline.policy, *(f"{figure:.2f}" for figure in before), style="dark_orange")
        drawn.add_row(
            f"({len(jcts(run, size))})", run.policy, *(f"{figure:.2f}" for figure in after), style="bright_cyan"
        )
        ratios = (new / old for new, old in zip(after, before, strict=True))
        drawn.add_row("", "ratio", *(f"× {figure:.2f}" for figure in ratios), style="bold", end_section=True)
    return drawn


def _figures(values: Sequence[float]) -> tuple[float, float, float, float]:
    return mean(values), percentile(values, 0.5), percentile(values, 0.9), max(values, default=math.nan)
