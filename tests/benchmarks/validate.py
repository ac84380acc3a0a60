"""Is the replay like the engine? `python -m tests.benchmarks.validate --out docs/benchmarks/results/validation.json`.

The same agents twice: through the live gateway with the demo's engine on the CPU, and through the replay with a profile that
was fitted to that engine (`tests.benchmarks.fit`). Both know the classes from the same agents of the past, both release by
predicted memory under every policy, and nothing is tuned to what comes out. What is compared: the mean completion time of
each policy, the order of the policies by it, and each agent's own time.

A processor that is shared with others is not equally fast at all times, not even for the length of a run. So the engine's
reports are heard, and every live run is also told on a steady clock, on which each of its iterations took what the profile
says of it; that is compared with a replay of the same arrivals on that clock. What differs there is not the machine's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.table import Table

from engine.lab.profile import ProfileError, StepProfile, load_profile
from engine.launcher import EngineFailed
from engine.link import Hello, LinkError
from gateway.agent_trace import AgentTrace
from gateway.demo import report
from gateway.demo.client import ReplayResult
from gateway.demo.demo import BASELINE
from gateway.demo.kinds import Size
from gateway.demo.processes import ServerFailed
from gateway.demo.settings import DemoSettings
from gateway.replay import environment
from gateway.replay.figures import mean, percentile
from tests.benchmarks.fit import Heard, Iteration, Mix, OtherWork, iterations, listening, stage

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
    """One agent under one policy, in seconds: replayed, live in each repeat, and both for each repeat on its steady clock."""

    agent_id: str
    agent_class: str = msgspec.field(name="class")
    size: Size
    replayed_s: float
    live_s: list[float]
    steady_live_s: list[float]
    steady_replayed_s: list[float]


class LiveRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One repeat. pace: what its iterations took over what the profile says of them. other_cores: what processes of others
    had of the machine meanwhile. steady: on the clock on which the pace is always 1."""

    mean_jct_s: float
    steady_mean_jct_s: float
    steady_replayed_mean_jct_s: float
    pace: float
    other_cores: float
    makespan_s: float
    iterations: int | None = None
    preemptions: int | None = None
    mean_kv_usage: float | None = None


class PolicyCompared(msgspec.Struct, frozen=True):
    """ratio, steady_ratio: replayed over live mean. spread, steady_spread: largest minus smallest live mean, over their mean.
    agent_error: median over the agents of replayed over live on the steady clock, or its inverse where that is larger,
    minus one."""

    policy: str
    live_mean_s: float
    spread: float
    replayed_mean_s: float
    ratio: float
    steady_live_mean_s: float
    steady_spread: float
    steady_replayed_mean_s: float
    steady_ratio: float
    agent_error: float
    replayed_makespan_s: float
    replayed_iterations: int
    replayed_preemptions: int
    replayed_kv_usage: float
    live: list[LiveRun]
    agents: list[AgentCompared]


class Verdict(msgspec.Struct, frozen=True):
    """The orders are of policies from the shortest mean to the longest, in seconds as they were, and on the steady
    clocks. swapped: neighbours in the live order that the replay has the other way round, with how far apart they are live."""

    live_order: list[str]
    replayed_order: list[str]
    steady_live_order: list[str]
    steady_replayed_order: list[str]
    swapped: dict[str, float]
    worst_ratio: float
    worst_steady_ratio: float
    same_order: bool
    steady_same_order: bool
    within_tolerance: bool
    steady_within_tolerance: bool


class SteadyClock:
    """From a monotonic clock to one on which every iteration took what the profile says. Between iterations, and where they
    cannot be told, both run alike. pace: what the iterations took over what the profile says of them."""

    def __init__(self, told: Sequence[Iteration], profile: StepProfile) -> None:
        """Raises `ValueError` when there are no iterations to go by."""
        if not told:
            raise ValueError("no iteration was heard of")
        self.start_s = told[0].end_s - told[0].seconds
        self._times: list[float] = []
        self._steady: list[float] = []
        now, steady, said, took = self.start_s, 0.0, 0.0, 0.0
        for each in told:
            start_s = each.end_s - each.seconds
            steady += start_s - now
            self._knot(start_s, steady)
            step_s = profile.step_s(each.prefill_tokens, each.decodes, each.kv_tokens)
            now, steady = each.end_s, steady + step_s
            self._knot(now, steady)
            said, took = said + step_s, took + each.seconds
        self.pace = took / said

    def at(self, time_s: float) -> float:
        """0 is where the first iteration began. Both clocks run alike before it, and after the last one."""
        first, last = self._times[0], self._times[-1]
        if time_s <= first:
            return time_s - first
        if time_s >= last:
            return self._steady[-1] + time_s - last
        place = bisect.bisect_right(self._times, time_s)
        before, after = self._times[place - 1], self._times[place]
        low, high = self._steady[place - 1], self._steady[place]
        return low + (high - low) * (time_s - before) / (after - before)

    def _knot(self, time_s: float, steady_s: float) -> None:
        self._times.append(time_s)
        self._steady.append(steady_s)


def on_steady_clock(
    agents: Sequence[AgentTrace], run: report.Run, clock: SteadyClock
) -> tuple[list[AgentTrace], dict[str, float]]:
    """The agents, arriving as they did live but on that clock, and how long each took on it. Agents with a failed task have
    no time."""
    # The run counts from the client's start: its first agent came when the engine began, but for some milliseconds.
    zero_s = clock.start_s - min(outcome.arrival_s for outcome in run.agents)
    spans = {
        outcome.agent_id: (clock.at(zero_s + outcome.arrival_s), clock.at(zero_s + outcome.finish_s))
        for outcome in run.agents
    }
    arriving = [msgspec.structs.replace(agent, arrival_s=max(0.0, spans[agent.agent_id][0])) for agent in agents]
    completed = {outcome.agent_id for outcome in run.agents if outcome.jct_s is not None}
    return arriving, {name: end - start for name, (start, end) in spans.items() if name in completed}


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
    replayed: results.Run,
    paces: Sequence[float],
    steady_live: Sequence[dict[str, float]],
    steady_replayed: Sequence[results.Run],
) -> PolicyCompared:
    """The last three have one for each live run. Raises `ValueError` for agents that did not complete in every run."""
    if not live:
        raise ValueError(f"{policy}: there is no live run")
    there = _times(replayed)
    here = [{agent.agent_id: agent.jct_s for agent in each.run.agents if agent.jct_s is not None} for each in live]
    steady_there = [_times(each) for each in steady_replayed]
    agents = []
    for agent in live[0].run.agents:
        name = agent.agent_id
        if not all(name in times for times in (there, *here, *steady_live, *steady_there)):
            raise ValueError(f"{policy}: {name} did not complete in every run")
        agents.append(
            AgentCompared(
                name,
                agent.agent_class,
                agent.size,
                there[name],
                [times[name] for times in here],
                [times[name] for times in steady_live],
                [times[name] for times in steady_there],
            )
        )
    repeats = range(len(live))
    means = [mean([agent.live_s[repeat] for agent in agents]) for repeat in repeats]
    steady_means = [mean([agent.steady_live_s[repeat] for agent in agents]) for repeat in repeats]
    steady_replayed_means = [mean([agent.steady_replayed_s[repeat] for agent in agents]) for repeat in repeats]
    replayed_mean_s = mean([agent.replayed_s for agent in agents])
    return PolicyCompared(
        policy=policy,
        live_mean_s=mean(means),
        spread=_spread(means),
        replayed_mean_s=replayed_mean_s,
        ratio=replayed_mean_s / mean(means),
        steady_live_mean_s=mean(steady_means),
        steady_spread=_spread(steady_means),
        steady_replayed_mean_s=mean(steady_replayed_means),
        steady_ratio=mean(steady_replayed_means) / mean(steady_means),
        agent_error=percentile([_factor(agent) for agent in agents], 0.5) - 1,
        replayed_makespan_s=replayed.summary.makespan_s,
        replayed_iterations=replayed.summary.iterations,
        replayed_preemptions=replayed.summary.preemptions,
        replayed_kv_usage=replayed.summary.mean_kv_usage,
        live=[
            LiveRun(
                mean_jct_s=means[repeat],
                steady_mean_jct_s=steady_means[repeat],
                steady_replayed_mean_jct_s=steady_replayed_means[repeat],
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


def _times(run: results.Run) -> dict[str, float]:
    return {agent.agent_id: agent.jct_s for agent in run.agents}


def _spread(means: Sequence[float]) -> float:
    return (max(means) - min(means)) / mean(means)


def _factor(agent: AgentCompared) -> float:
    ratio = mean(agent.steady_replayed_s) / mean(agent.steady_live_s)
    return max(ratio, 1 / ratio)


def judge(compared: Sequence[PolicyCompared]) -> Verdict:
    live = sorted(compared, key=lambda each: each.live_mean_s)
    swapped = {
        f"{first.policy} / {second.policy}": second.live_mean_s / first.live_mean_s - 1
        for first, second in itertools.pairwise(live)
        if second.replayed_mean_s < first.replayed_mean_s
    }
    live_order = [each.policy for each in live]
    replayed_order = _order({each.policy: each.replayed_mean_s for each in compared})
    steady_live_order = _order({each.policy: each.steady_live_mean_s for each in compared})
    steady_replayed_order = _order({each.policy: each.steady_replayed_mean_s for each in compared})
    worst, worst_steady = (
        _farthest([each.ratio for each in compared]),
        _farthest([each.steady_ratio for each in compared]),
    )
    return Verdict(
        live_order=live_order,
        replayed_order=replayed_order,
        steady_live_order=steady_live_order,
        steady_replayed_order=steady_replayed_order,
        swapped=swapped,
        worst_ratio=worst,
        worst_steady_ratio=worst_steady,
        same_order=live_order == replayed_order,
        steady_same_order=steady_live_order == steady_replayed_order,
        within_tolerance=abs(worst - 1) <= TOLERANCE,
        steady_within_tolerance=abs(worst_steady - 1) <= TOLERANCE,
    )


def _order(means: dict[str, float]) -> list[str]:
    return sorted(means, key=means.__getitem__)


def _farthest(ratios: Sequence[float]) -> float:
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def replay_all(
    trace: Sequence[AgentTrace],
    past: Sequence[AgentTrace],
    live: dict[str, list[Live]],
    heard: Sequence[Heard],
    profile: StepProfile,
) -> list[PolicyCompared]:
    """Each policy by the profile, and each live run on its steady clock. Raises `ValueError`, as `compare` does."""
    from gateway.replay.predictors import beliefs
    from gateway.replay.simulation import Setup, simulate

    def replayed(policy: str, agents: Sequence[AgentTrace]) -> results.Run:
        later = with_latency(agents, profile.fit.get("task_latency_s", 0.0))
        return simulate(later, policy, "memory", beliefs("ladder", past=past), Setup(profile), predictor="ladder")

    compared = []
    for policy, repeats in live.items():
        paces, steady_live, steady_replayed = [], [], []
        for repeat in repeats:
            during = [each for each in heard if repeat.start_s <= each.at_s <= repeat.end_s]
            clock = SteadyClock(iterations(during), profile)
            arriving, times = on_steady_clock(trace, repeat.run, clock)
            paces.append(clock.pace)
            steady_live.append(times)
            steady_replayed.append(replayed(policy, arriving))
        compared.append(compare(policy, repeats, replayed(policy, trace), paces, steady_live, steady_replayed))
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
    drawn = Table(title="Mean completion time of an agent, seconds (* on the steady clock)", title_justify="left")
    for heading in ("policy", "live", "±", "replayed", "ratio", "live*", "replayed*", "ratio*"):
        drawn.add_column(heading, justify="left" if heading == "policy" else "right")
    for each in compared:
        drawn.add_row(
            each.policy,
            f"{each.live_mean_s:.2f}",
            f"{each.spread:.0%}",
            f"{each.replayed_mean_s:.2f}",
            f"{each.ratio:.2f}",
            f"{each.steady_live_mean_s:.2f}",
            f"{each.steady_replayed_mean_s:.2f}",
            f"{each.steady_ratio:.2f}",
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

    from gateway.demo.picture import TICKS_S
    from gateway.replay.figures import BASELINE_COLOUR, DPI, GREY, INK, RUN_COLOUR

    colours = {"small": RUN_COLOUR, "medium": "#009E73", "large": BASELINE_COLOUR}  # Okabe and Ito
    times = [
        value
        for each in compared
        for agent in each.agents
        for value in (*agent.steady_live_s, *agent.steady_replayed_s)
    ]
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
            color="#dde3e9",
            zorder=0,
            linewidth=0,
        )
        for size, colour in colours.items():
            agents = [agent for agent in each.agents if agent.size == size]
            axes.scatter(
                [mean(agent.steady_live_s) for agent in agents],
                [mean(agent.steady_replayed_s) for agent in agents],
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
        axes.text(0, 1.03, f"mean × {each.steady_ratio:.2f}", transform=axes.transAxes, fontsize=9.5, color=INK)
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
        prog="python -m tests.benchmarks.validate", description="The replay against the demo's real engine."
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
