"""What the engine's scheduler does for agents, as a page: `python -m tests.benchmarks.engine_report`.

Preemptions against stock vLLM's, what tasks hold against what the formula says, KV that is kept over tool waits, and what it
costs to displace. Each line is also a `justitia replay`. Writes docs/benchmarks/scheduler.md and results/scheduler.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from string import Template
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.progress import track

from engine.lab.collector import collector_at_rest
from engine.lab.profile import load_profile
from gateway.replay.command import begin_alike, load_trace
from gateway.replay.environment import machine, versions
from gateway.replay.figures import mean, percentile
from gateway.replay.predictors import beliefs
from gateway.replay.results import AgentResult, ReleaseName, Summary
from gateway.replay.simulation import Setup, simulate
from tests.benchmarks.page import table

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGE = Path(__file__).with_name("engine_report.md")
SEEDS = range(3)
SMALL, LARGE = "llama-7b-a100", "llama-3-8b-a100"
MARGINS = (0.0, 3e5, 1e6, 3e6)
# Every tenth agent has this weight, in the study of those who buy latency.
BUYERS, BUYERS_WEIGHT = 10, 10.0


class Job(msgspec.Struct, frozen=True):
    """`blocks`: the profile's unless given. `buyers`: some agents have a large weight."""

    study: str
    trace: str
    profile: str = SMALL
    policy: str = "justitia"
    release: ReleaseName = "memory"
    engine: Literal["justitia", "stock"] = "justitia"
    keep: bool = True
    charge: Literal["held", "formula"] = "held"
    margin: float | None = None
    blocks: int | None = None
    buyers: bool = False


class Row(msgspec.Struct, frozen=True):
    """held_to_formula: by agent, its 5th, 50th and 95th percentile, and the whole. computed_prompt_tokens: of prompts, those
    that were not found in the prefix cache."""

    job: Job
    summary: Summary
    held_to_formula: tuple[float, float, float, float]
    prompt_tokens: int
    computed_prompt_tokens: int
    buyers_jct_s: float
    others_jct_s: float


def jobs() -> Iterator[Job]:
    for seed in SEEDS:
        paper = f"paper:{seed}:3"
        yield Job("pressure", paper)
        yield Job("pressure", paper, release="all", engine="stock")
        yield Job("pressure", paper, release="all")
        for trace, profile in _conversations(seed):
            yield Job("keep", trace, profile, "fcfs", "engine", "stock")
            yield Job("keep", trace, profile, engine="stock")
            yield Job("keep", trace, profile)
        for trace, profile in ((paper, SMALL), (f"prefix:{seed}", SMALL), *_conversations(seed)):
            for charge in ("held", "formula"):
                yield Job("held", trace, profile, charge=charge)
        for margin in (None, *MARGINS):
            yield Job("displace", paper, margin=margin)
            yield Job("buyers", paper, margin=margin, buyers=True)
    for blocks in (27600, 13800, 6900, 3450):
        for keep in (False, True):
            yield Job("cache", "coding:0", LARGE, keep=keep, blocks=blocks)


def _conversations(seed: int) -> tuple[tuple[str, str], ...]:
    return (f"tools:{seed}:stories", SMALL), (f"coding:{seed}", LARGE)


def run_one(job: Job) -> Row:
    agents = load_trace(job.trace)
    if job.buyers:
        agents = [
            msgspec.structs.replace(agent, weight=BUYERS_WEIGHT) if i % BUYERS == 0 else agent
            for i, agent in enumerate(agents)
        ]
    setup = Setup(
        profile=load_profile(job.profile),
        kv_blocks=job.blocks,
        engine_scheduler=job.engine,
        prefix_caching=begin_alike(agents),
        keep=job.keep,
        charge=job.charge,
        displace_margin=job.margin,
    )
    with collector_at_rest():
        run = simulate(agents, job.policy, job.release, beliefs("exact"), setup, predictor="exact")
    ratios = [agent.held / agent.net_cost for agent in run.agents]
    whole = sum(agent.held for agent in run.agents) / sum(agent.net_cost for agent in run.agents)
    prompt_tokens = sum(task.prompt_tokens for agent in agents for task in agent.tasks)
    buyers = {agent.agent_id for agent in agents if agent.weight != 1}
    return Row(
        job,
        run.summary,
        (percentile(ratios, 0.05), percentile(ratios, 0.5), percentile(ratios, 0.95), whole),
        prompt_tokens,
        prompt_tokens - sum(agent.cached_tokens for agent in run.agents),
        _jct([agent for agent in run.agents if agent.agent_id in buyers]),
        _jct([agent for agent in run.agents if agent.agent_id not in buyers]),
    )


def _jct(agents: Sequence[AgentResult]) -> float:
    return mean([agent.jct_s for agent in agents]) if agents else 0.0


# The page


def page(rows: Sequence[Row]) -> str:
    def of(study: str) -> list[Row]:
        return [row for row in rows if row.job.study == study]

    return Template(PAGE.read_text()).substitute(
        pressure=_pressure(of("pressure")),
        held=_held(of("held")),
        keep=_keep(of("keep")),
        cache=_cache(of("cache")),
        displace=_displace(of("displace")),
        buyers=_displace(of("buyers")),
    )


def _pressure(rows: Sequence[Row]) -> str:
    lines = []
    for ours, stock, at_once in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        share = ours.summary.recomputed_tokens / stock.summary.recomputed_tokens
        lines.append(
            (
                f"`{ours.job.trace}`",
                *(f"{row.summary.preemptions:,} / {row.summary.recomputed_tokens:,}" for row in (stock, at_once, ours)),
                f"**{ours.summary.preemptions / stock.summary.preemptions:.1%}** / **{share:.1%}**",
            )
        )
    heading = (
        "",
        "stock priority, all at once",
        "our scheduler, all at once",
        "ours, released by memory",
        "ours to stock",
    )
    return table(heading, lines)


def _held(rows: Sequence[Row]) -> str:
    lines = []
    for held, formula in (rows[i : i + 2] for i in range(0, len(rows), 2)):
        low, middle, high, whole = held.held_to_formula
        lines.append(
            (
                f"`{held.job.trace}`",
                f"{whole:.2f}",
                f"{low:.2f} / {middle:.2f} / {high:.2f}",
                *(f"{row.summary.mean_jct_s:.1f}" for row in (formula, held)),
                *(f"{row.summary.no_later_than_reference:.0%}" for row in (formula, held)),
            )
        )
    heading = (
        "",
        "held to formula",
        "by agent, P5 / P50 / P95",
        "mean JCT, s: formula",
        "held",
        "no later than the reference: formula",
        "held",
    )
    return table(heading, sorted(lines))


def _keep(rows: Sequence[Row]) -> str:
    lines = []
    for stock, without, kept in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        lines += [
            (
                f"`{row.job.trace}`" if row is stock else "",
                name,
                f"{row.summary.mean_jct_s:.1f}",
                f"{row.summary.mean_jct_s / without.summary.mean_jct_s:.2f}",
                f"{row.computed_prompt_tokens:,}",
                f"{row.computed_prompt_tokens / without.computed_prompt_tokens:.2f}",
                f"{row.summary.prefix_hit_rate:.1%}",
            )
            for name, row in (("stock vLLM, fcfs", stock), ("justitia, stock cache", without), ("justitia", kept))
        ]
    heading = (
        "",
        "",
        "mean JCT, s",
        "to stock cache",
        "prompt tokens computed",
        "to stock cache",
        "found in the cache",
    )
    return table(heading, lines)


def _cache(rows: Sequence[Row]) -> str:
    lines = []
    for without, kept in (rows[i : i + 2] for i in range(0, len(rows), 2)):
        change = kept.summary.mean_jct_s / without.summary.mean_jct_s - 1
        lines.append(
            (
                f"{16 * (without.job.blocks or 0):,}",
                *(f"{row.summary.mean_jct_s:.0f}" for row in (without, kept)),
                f"{change:+.0%}",
                *(f"{row.summary.prefix_hit_rate:.0%}" for row in (without, kept)),
            )
        )
    return table(("KV cache, tokens", "mean JCT, s: stock cache", "kept", "", "found: stock cache", "kept"), lines)


def _displace(rows: Sequence[Row]) -> str:
    """Means over the seeds."""
    lines = []
    for margin in (None, *MARGINS):
        same = [row for row in rows if row.job.margin == margin]

        def average(values: Sequence[float]) -> float:
            return mean(list(values))

        jcts: tuple[str, ...] = (f"{average([row.summary.mean_jct_s for row in same]):.1f}",)
        if rows[0].job.buyers:
            jcts = (
                f"{average([row.buyers_jct_s for row in same]):.1f}",
                f"{average([row.others_jct_s for row in same]):.1f}",
            )
        lines.append(
            (
                "off" if margin is None else f"{margin:,.0f}",
                *jcts,
                f"{average([row.summary.p50_jct_s for row in same]):.1f}",
                f"{average([row.summary.preemptions for row in same]):,.0f}",
                f"{average([row.summary.recomputed_tokens for row in same]):,.0f}",
            )
        )
    who = ("buyers, mean JCT, s", "others") if rows[0].job.buyers else ("mean JCT, s",)
    return table(("margin, token·iterations", *who, "median JCT, s", "preemptions", "recomputed tokens"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-json", action="store_true", help="the page only, from the last run's JSON")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results = DOCS / "results" / "scheduler.json"
    if not options.from_json:
        todo = list(jobs())
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            rows = list(track(pool.map(run_one, todo), total=len(todo), console=Console(stderr=True)))
        results.write_bytes(b"\n".join(_lines(rows)))
    document: dict[str, Any] = msgspec.json.decode(results.read_bytes())
    (DOCS / "scheduler.md").write_text(page(msgspec.convert(document["rows"], list[Row])))


def _lines(rows: Sequence[Row]) -> Iterator[bytes]:
    """JSON with a line for each run, so that changes can be read."""
    yield b'{"environment":' + msgspec.json.encode({"machine": machine(), "versions": versions()}) + b',"rows":['
    yield b",\n".join(msgspec.json.encode(row) for row in rows)
    yield b"]}\n"


if __name__ == "__main__":
    main()
