"""What a replay found, as the JSON that it ends in. Times in seconds of the virtual clock, costs in KV token·iterations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gateway.replay.figures import mean, percentile

ReleaseName = Literal["memory", "engine", "all"]


class AgentResult(msgspec.Struct, frozen=True):
    """One agent of one run.

    cost: what it was charged. net_cost: by the formula, without what was cached. held: as the engine's scheduler counts it;
    0 with a stock one. predicted_cost: Ĉ at its first release.
    reference_finish_s: when ideal fair sharing, with the arrivals of this run and true costs, would have finished it.
    """

    agent_id: str
    agent_class: str = msgspec.field(name="class")
    tenant: str
    arrival_s: float
    finish_s: float
    jct_s: float
    reference_finish_s: float
    lateness_s: float
    cost: float
    predicted_cost: float
    tasks: int
    preemptions: int
    cached_tokens: int
    net_cost: float = 0.0
    held: float = 0.0


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """no_later_than_vtc, worst_ratio_to_vtc: against the run of `vtc` in the same output; None without one.
    bound_s: how late the explanation page allows an agent to be. served_tokens: mean KV tokens held by decoding tasks
    while tasks waited, the effective capacity. decision_us: microseconds of one core for a call of the queue; they differ from
    run to run, so only `--timings` adds them."""

    agents: int
    tasks: int
    mean_jct_s: float
    p50_jct_s: float
    p90_jct_s: float
    p99_jct_s: float
    max_jct_s: float
    makespan_s: float
    iterations: int
    preemptions: int
    recomputed_tokens: int
    served_tokens: float
    mean_kv_usage: float
    prefix_hit_rate: float
    no_later_than_reference: float
    worst_lateness_s: float
    bound_s: float
    jain: float
    worst_tag_lateness_iterations: float  # against the largest finish tag that the agent had, as in the bound
    bound_iterations: float
    bound_terms: dict[str, float]
    no_later_than_vtc: float | None = None
    worst_ratio_to_vtc: float | None = None
    decision_us_p50: float | None = None
    decision_us_p99: float | None = None


class Memory(msgspec.Struct, frozen=True):
    """KV tokens held by each agent, sampled over time."""

    times_s: list[float]
    tokens: dict[str, list[int]]


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """One trace under one policy."""

    policy: str
    predictor: str
    release: str
    summary: Summary
    agents: list[AgentResult]
    memory: Memory | None = None

    @property
    def label(self) -> str:
        return label(self.policy, self.release)


class Replay(msgspec.Struct, frozen=True):
    config: dict[str, Any]
    trace: dict[str, Any]
    runs: list[Run]


def own_release(policy: str) -> ReleaseName:
    """By predicted memory is ours; the field's policies stand in engines that admit what they have room for now."""
    return "memory" if policy == "justitia" else "engine"


def label(policy: str, release: str) -> str:
    """The policy's name, and how tasks are released if that is not its own way."""
    return policy if release == own_release(policy) else f"{policy}@{release}"


def spread(jcts: Sequence[float]) -> dict[str, float]:
    return {
        "mean_jct_s": mean(jcts),
        "p50_jct_s": percentile(jcts, 0.5),
        "p90_jct_s": percentile(jcts, 0.9),
        "p99_jct_s": percentile(jcts, 0.99),
        "max_jct_s": max(jcts),
    }


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1/n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def against_vtc(runs: Sequence[Run]) -> list[Run]:
    """The runs, each compared with that of `vtc`, if there is one."""
    vtc = next((run for run in runs if run.label == "vtc"), None)
    if vtc is None:
        return list(runs)
    before = {agent.agent_id: agent.jct_s for agent in vtc.agents}
    compared = []
    for run in runs:
        ratios = [agent.jct_s / before[agent.agent_id] for agent in run.agents]
        summary = msgspec.structs.replace(
            run.summary,
            no_later_than_vtc=sum(ratio <= 1 for ratio in ratios) / len(ratios),
            worst_ratio_to_vtc=max(ratios),
        )
        compared.append(msgspec.structs.replace(run, summary=summary))
    return compared


def write(replay: Replay, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(replay), indent=1) + b"\n")


def read(path: Path) -> Replay:
    """Raises `OSError`, and `msgspec.DecodeError` for what is no replay's output."""
    return msgspec.json.decode(path.read_bytes(), type=Replay)
