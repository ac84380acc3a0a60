"""Is the replay like the engine? `python -m gateway.bench.validate --out docs/benchmarks/results/validation.json`.

The same agents twice: through the live gateway with the demo's engine on the CPU, and through the replay with a profile that
was fitted to that engine (`gateway.bench.fit`). Both know the classes from the same agents of the past, both release by
predicted memory under every policy, and nothing is tuned to what comes out. What is compared: the mean completion time of
each policy, the order of the policies by it, and each agent's own time.

A processor that is shared is not equally fast at all times. So the engine's reports are heard during each live run, and its
`pace` is what its iterations took over what the profile says of those very iterations. Each run is then replayed a second
time at its own pace: what is still different there is not the machine's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.table import Table

from engine.launcher import EngineFailed
from engine.link import Hello, LinkError
from engine.profile import ProfileError, StepProfile, load_profile
from gateway.bench import environment, report
from gateway.bench.client import ReplayResult
from gateway.bench.demo import BASELINE, DemoSettings
from gateway.bench.fit import Heard, Mix, OtherWork, iterations, listening, stage
from gateway.bench.kinds import Size
from gateway.bench.processes import ServerFailed
from gateway.bench.report import mean, percentile
from gateway.trace import AgentTrace

if TYPE_CHECKING:
    from gateway.replay import results

POLICIES = ("justitia", "srjf", "vtc", "agent-fcfs", "fcfs")
# The mean completion time of a policy may be off by as much.
TOLERANCE = 0.15
WINDOW_S = 6.0
PAST_AGENTS = 60


@dataclass(frozen=True, slots=True)
class Live:
    """One repeat on the engine: between two times of a monotonic clock, while others had so many cores."""

    run: report.Run
    start_s: float
    end_s: float
    other_cores: float


class AgentCompared(msgspec.Struct, frozen=True):
    """One agent under one policy: seconds, live in each repeat, replayed by the profile, and replayed at the pace of each."""

    agent_id: str
    agent_class: str = msgspec.field(name="class")
    size: Size
    live_s: list[float]
    replayed_s: float
    paced_s: list[float]


class LiveRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One repeat. pace: what its iterations took over what the profile says of them. other_cores: what processes of others
    had of the machine meanwhile. paced_mean_jct_s: replayed at that pace."""

    mean_jct_s: float
    paced_mean_jct_s: float
    pace: float
    other_cores: float
    makespan_s: float
    iterations: int | None = None
    preemptions: int | None = None
    mean_kv_usage: float | None = None


class PolicyCompared(msgspec.Struct, frozen=True):
    """ratio: replayed over live mean; paced_ratio: the same with every run replayed at its own pace. spread: largest minus
    smallest live mean, over their mean. agent_error: median over the agents of paced over live, or its inverse where that
    is larger, minus one."""

    policy: str
    live_mean_s: float
    spread: float
    replayed_mean_s: float
    ratio: float
    paced_mean_s: float
    paced_ratio: float
    agent_error: float
    replayed_makespan_s: float
    replayed_iterations: int
    replayed_preemptions: int
    replayed_kv_usage: float
    live: list[LiveRun]
    agents: list[AgentCompared]


class Verdict(msgspec.Struct, frozen=True):
    """The orders are of policies from the shortest mean to the longest, the replayed one by the profile as it is. swapped:
    neighbours in the live order that the replay has the other way round, with how far apart they are live, relative."""

    live_order: list[str]
    replayed_order: list[str]
    paced_order: list[str]
    swapped: dict[str, float]
    worst_ratio: float
    worst_paced_ratio: float
    same_order: bool
    within_tolerance: bool
    paced_within_tolerance: bool


def pace(heard: Sequence[Heard], profile: StepProfile) -> float:
    """What the iterations took over what the profile says of them. NaN when none can be told."""
    told = iterations(heard)
    said_s = sum(profile.step_s(each.prefill_tokens, each.decodes, each.kv_tokens) for each in told)
    return sum(each.seconds for each in told) / said_s if told else math.nan


def at_pace(profile: StepProfile, factor: float) -> StepProfile:
    return replace(
        profile,
        constant_s=profile.constant_s * factor,
        per_prefill_token_s=profile.per_prefill_token_s * factor,
        per_decode_s=profile.per_decode_s * factor,
        per_kv_token_s=profile.per_kv_token_s * factor,
    )


def with_latency(agents: Sequence[AgentTrace], latency_s: float) -> list[AgentTrace]:
    """What the replay leaves out between client, gateway and engine, as a longer pause before each task."""
    return [
        msgspec.structs.replace(
            agent,
            tasks=tuple(msgspec.structs.replace(task, think_s=task.think_s + latency_s) for task in agent.tasks),
        )
        for agent in agents
    ]


def compare(
    policy: str,
    live: Sequence[Live],
    paces: Sequence[float],
    replayed: results.Run,
    paced: Sequence[results.Run],
) -> PolicyCompared:
    """paced: one for each live run, at its pace. Raises `ValueError` for agents that did not complete in every run."""
    if not live:
        raise ValueError(f"{policy}: there is no live run")
    here: list[dict[str, float | None]] = [{agent.agent_id: agent.jct_s for agent in each.run.agents} for each in live]
    there: list[dict[str, float | None]] = [
        {agent.agent_id: agent.jct_s for agent in each.agents} for each in [replayed, *paced]
    ]
    agents = []
    for agent in live[0].run.agents:
        name = agent.agent_id
        times = [each.get(name) for each in here + there]
        completed = [value for value in times if value is not None]
        if len(completed) < len(times):
            raise ValueError(f"{policy}: {name} did not complete in every run")
        repeats = len(live)
        agents.append(
            AgentCompared(
                name,
                agent.agent_class,
                agent.size,
                completed[:repeats],
                completed[repeats],
                completed[repeats + 1 :],
            )
        )
    live_means = [mean([agent.live_s[repeat] for agent in agents]) for repeat in range(len(live))]
    paced_means = [mean([agent.paced_s[repeat] for agent in agents]) for repeat in range(len(live))]
    live_mean_s, replayed_mean_s = mean(live_means), mean([agent.replayed_s for agent in agents])
    return PolicyCompared(
        policy=policy,
        live_mean_s=live_mean_s,
        spread=(max(live_means) - min(live_means)) / live_mean_s,
        replayed_mean_s=replayed_mean_s,
        ratio=replayed_mean_s / live_mean_s,
        paced_mean_s=mean(paced_means),
        paced_ratio=mean(paced_means) / live_mean_s,
        agent_error=percentile([_factor(agent) for agent in agents], 0.5) - 1,
        replayed_makespan_s=replayed.summary.makespan_s,
        replayed_iterations=replayed.summary.iterations,
        replayed_preemptions=replayed.summary.preemptions,
        replayed_kv_usage=replayed.summary.mean_kv_usage,
        live=[
            LiveRun(
                mean_jct_s=live_means[repeat],
                paced_mean_jct_s=paced_means[repeat],
                pace=paces[repeat],
                other_cores=each.other_cores,
                makespan_s=each.run.summary.makespan_s,
                iterations=each.run.summary.iterations,
                preemptions=each.run.summary.preemptions,
                mean_kv_usage=each.run.summary.mean_kv_usage,
            )
            for repeat, each in enumerate(live)
        ],
        agents=agents,
    )


def _factor(agent: AgentCompared) -> float:
    ratio = mean(agent.paced_s) / mean(agent.live_s)
    return max(ratio, 1 / ratio)


def judge(compared: Sequence[PolicyCompared]) -> Verdict:
    live = sorted(compared, key=lambda each: each.live_mean_s)
    swapped = {
        f"{first.policy} / {second.policy}": second.live_mean_s / first.live_mean_s - 1
        for first, second in itertools.pairwise(live)
        if second.replayed_mean_s < first.replayed_mean_s
    }
    ratios, paced_ratios = [each.ratio for each in compared], [each.paced_ratio for each in compared]
    live_order = [each.policy for each in live]
    replayed_order = [each.policy for each in sorted(compared, key=lambda each: each.replayed_mean_s)]
    return Verdict(
        live_order=live_order,
        replayed_order=replayed_order,
        paced_order=[each.policy for each in sorted(compared, key=lambda each: each.paced_mean_s)],
        swapped=swapped,
        worst_ratio=_farthest(ratios),
        worst_paced_ratio=_farthest(paced_ratios),
        same_order=live_order == replayed_order,
        within_tolerance=abs(_farthest(ratios) - 1) <= TOLERANCE,
        paced_within_tolerance=abs(_farthest(paced_ratios) - 1) <= TOLERANCE,
    )


def _farthest(ratios: Sequence[float]) -> float:
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def replay_all(
    trace: Sequence[AgentTrace],
    past: Sequence[AgentTrace],
    live: dict[str, list[Live]],
    heard: Sequence[Heard],
    profile: StepProfile,
) -> list[PolicyCompared]:
    """Each policy by the profile, and each live run at its pace. Raises `ValueError`, as `compare` does."""
    from gateway.replay.predictors import Learned
    from gateway.replay.simulation import Setup, simulate

    later = with_latency(trace, profile.fit.get("task_latency_s", 0.0))

    def replayed(policy: str, by: StepProfile) -> results.Run:
        return simulate(later, policy, "memory", Learned(past), Setup(by), predictor="ladder")

    compared = []
    for policy, repeats in live.items():
        paces = [
            pace([each for each in heard if repeat.start_s <= each.at_s <= repeat.end_s], profile) for repeat in repeats
        ]
        paced = [replayed(policy, at_pace(profile, factor)) for factor in paces]
        compared.append(compare(policy, repeats, paces, replayed(policy, profile), paced))
    return compared


async def live_runs(
    settings: DemoSettings, policies: Sequence[str], repeats: int, console: Console
) -> tuple[list[AgentTrace], list[AgentTrace], dict[str, list[Live]], list[Heard]]:
    """The trace, the agents of the past, the repeats of each policy, and all reports. One engine serves all, in turns.

    Raises `EngineFailed`, `ServerFailed`, `LinkError`, and `ValueError` when a task failed or repeats had other tokens.
    """
    runs: dict[str, list[Live]] = {policy: [] for policy in policies}
    hellos: list[Hello] = []
    heard: list[Heard] = []
    mixes = (
        Mix(settings.seed, settings.agents, WINDOW_S, 1.0),
        Mix(settings.history_seed, PAST_AGENTS, WINDOW_S, 1.0),
    )
    first: ReplayResult | None = None
    async with (
        stage(settings, mixes, console) as (engine_stage, (trace, past)),
        listening(engine_stage.engine.link_address, hellos, heard),
    ):
        await engine_stage.replay("past", BASELINE, past)
        for repeat in range(repeats):
            for policy in policies:
                name = f"{policy}-{repeat + 1}"
                engine_stage.copy_state("past", name)
                others, start_s = OtherWork(), time.monotonic()
                result, run = await engine_stage.replay(name, policy, trace)
                each = Live(run, start_s, time.monotonic(), others.since().cores)
                first = first or result
                if result.errors:
                    raise ValueError(f"{name}: {len(result.errors)} tasks failed, the first: {result.errors[0].error}")
                if report.differing_tokens(first, result):
                    raise ValueError(f"{name}: tasks have other token counts than in the first run")
                runs[policy].append(each)
                said = f"mean JCT {run.summary.mean_jct_s:.2f} s, others had {each.other_cores:.2f} cores"
                console.print(f"{name}: {said}", markup=False)
    return trace, past, runs, heard


def table(compared: Sequence[PolicyCompared]) -> Table:
    drawn = Table(title="Mean completion time of an agent, seconds", title_justify="left")
    for heading in ("policy", "live", "spread", "replayed", "ratio", "at its pace", "ratio", "agent's error"):
        drawn.add_column(heading, justify="left" if heading == "policy" else "right")
    for each in compared:
        drawn.add_row(
            each.policy,
            f"{each.live_mean_s:.2f}",
            f"{each.spread:.0%}",
            f"{each.replayed_mean_s:.2f}",
            f"× {each.ratio:.2f}",
            f"{each.paced_mean_s:.2f}",
            f"× {each.paced_ratio:.2f}",
            f"{each.agent_error:.0%}",
        )
    return drawn


def write(path: Path, config: dict[str, Any], trace: dict[str, Any], compared: list[PolicyCompared]) -> None:
    document = {"config": config, "trace": trace, "verdict": judge(compared), "policies": compared}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


def draw(compared: Sequence[PolicyCompared], path: Path) -> None:
    """Each agent's time, live against replayed, a panel for each policy. Raises `ImportError` without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from gateway.bench.picture import BASELINE_COLOUR, DPI, GREY, INK, RUN_COLOUR, TICKS_S

    colours = {"small": RUN_COLOUR, "medium": "#009E73", "large": BASELINE_COLOUR}  # Okabe and Ito
    times = [value for each in compared for agent in each.agents for value in (*agent.live_s, *agent.paced_s)]
    low, high = min(times) / 1.5, max(times) * 1.5
    figure = Figure(figsize=(2.3 * len(compared) + 0.5, 3.25), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    row = figure.subplots(1, len(compared), sharey=True, squeeze=False)[0]
    for axes, each in zip(row, compared, strict=True):
        axes.plot((low, high), (low, high), color=GREY, linewidth=1, zorder=1)
        axes.fill_between(
            (low, high),
            (low * (1 - TOLERANCE), high * (1 - TOLERANCE)),
            (low * (1 + TOLERANCE), high * (1 + TOLERANCE)),
            color="#f1f4f7",
            zorder=0,
            linewidth=0,
        )
        for size, colour in colours.items():
            agents = [agent for agent in each.agents if agent.size == size]
            axes.scatter(
                [mean(agent.live_s) for agent in agents],
                [mean(agent.paced_s) for agent in agents],
                s=16,
                color=colour,
                alpha=0.85,
                linewidth=0,
                zorder=3,
                label=size,
            )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator([tick for tick in TICKS_S if low < tick < high][::2]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_title(each.policy, fontsize=11, fontweight="bold", color=INK, loc="left", pad=18)
        axes.text(0, 1.03, f"mean × {each.paced_ratio:.2f}", transform=axes.transAxes, fontsize=9.5, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=9)
        axes.set_xlabel("live, s", fontsize=10, color=INK)
    row[0].set_ylabel("replayed, s", fontsize=10, color=INK)
    row[-1].legend(loc="lower right", fontsize=8.5, frameon=False, handletextpad=0.1, borderaxespad=0.1)
    figure.tight_layout(w_pad=1.2)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gateway.bench.validate", description="The replay against the demo's real engine."
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results/validation.json"), help="JSON to write")
    parser.add_argument("--picture", type=Path, help="PNG to write as well (needs matplotlib)")
    parser.add_argument("--profile", default="cpu-tiny", help="of the replay")
    parser.add_argument("--policies", default=",".join(POLICIES), help="separated by commas")
    parser.add_argument("--repeats", type=int, default=2, help="of each live run")
    parser.add_argument("--agents", type=int, default=45)
    parser.add_argument("--seed", type=int, default=21, help="of the trace")
    parser.add_argument("--past-seed", type=int, default=1021, help="of the agents that the predictor has learned from")
    parser.add_argument("--logs", type=Path, default=Path("bench-results/validation"), help="directory for the logs")
    options = parser.parse_args()
    policies = options.policies.split(",")
    console = Console(highlight=False, soft_wrap=True)
    try:
        settings = DemoSettings(
            agents=options.agents, seed=options.seed, history_seed=options.past_seed, out=options.logs
        )
        profile = load_profile(options.profile)
        trace, past, live, heard = asyncio.run(live_runs(settings, policies, options.repeats, console))
        compared = replay_all(trace, past, live, heard, profile)
    except (EngineFailed, ServerFailed, LinkError, ProfileError, ValueError, OSError) as error:
        sys.exit(f"validate: {error}")
    config = {
        "benchmark": "validation",
        "profile": options.profile,
        "repeats": options.repeats,
        "tolerance": TOLERANCE,
        "task_latency_s": profile.fit.get("task_latency_s", 0.0),
        "window_s": WINDOW_S,
        "past": {"seed": options.past_seed, "agents": len(past)},
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    tasks = [task for agent in trace for task in agent.tasks]
    facts = {
        "name": f"demo:{options.seed}",
        "agents": len(trace),
        "tasks": len(tasks),
        "prompt_tokens": sum(task.prompt_tokens for task in tasks),
        "output_tokens": sum(task.output_tokens for task in tasks),
    }
    write(options.out, config, facts, compared)
    verdict = judge(compared)
    console.print(table(compared))
    console.print(f"order, live      {' < '.join(verdict.live_order)}", markup=False)
    console.print(f"order, replayed  {' < '.join(verdict.replayed_order)}", markup=False)
    console.print(f"results  {options.out}")
    if options.picture:
        draw(compared, options.picture)
        console.print(f"picture  {options.picture}")


if __name__ == "__main__":
    main()
