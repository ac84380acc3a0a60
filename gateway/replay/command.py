"""The command `justitia replay`: settings in, runs, and out come a table, JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.lab.collector import collector_at_rest
from engine.lab.profile import ProfileError, load_profile
from gateway.agent_trace import AgentTrace, TraceError, read_trace
from gateway.config.settings import command_config
from gateway.extras import how_to_get
from gateway.flowcontrol.fairqueue import POLICIES
from gateway.replay.environment import versions
from gateway.replay.predictors import COSTS, LEARNED, Believed, UnknownPredictor, beliefs
from gateway.replay.results import ReleaseName, Replay, Run, against_vtc, label, own_release, write
from gateway.replay.simulation import Setup, simulate
from gateway.replay.traces import BUILT_IN, built_in, describe

# A built-in trace is drawn from a seed; the ladder then learns from the same trace with other seeds.
LEARN_FROM_SEEDS = (101, 102, 103)


class ReplaySettings(BaseSettings):
    """`justitia replay`: agents through policies, release and vLLM's own scheduler, on a virtual clock."""

    model_config = command_config("JUSTITIA_REPLAY_") | SettingsConfigDict(cli_shortcuts={"out": "json"})

    trace: CliPositionalArg[str] = Field(
        description="A file of agents (JSON Lines), or a built-in trace: " + "; ".join(BUILT_IN.values())
    )
    policy: str = Field(
        "justitia,vtc,agent-fcfs,fcfs,las,sjf,srjf",
        description="Policies, separated by commas. NAME@RELEASE takes another release than the policy's own: memory (by"
        " predicted memory; justitia's), engine (what the engine has room for; all others'), all (everything at once).",
    )
    predictor: str = Field(
        "exact", description="What is believed of costs: exact, xgboost, mlp, ladder, or noise:SIGMA."
    )
    learn_from: str = Field(
        "",
        description="Traces that a predictor has learned from, separated by commas, or `nothing`; default: other"
        " seeds of this one.",
    )
    seed: int = Field(0, ge=0, description="Seed of the noise.")
    profile: str = Field("llama-7b-a100", description="Step times of an engine: a shipped profile, or a TOML file.")
    kv_blocks: int | None = Field(None, ge=1, description="Blocks of KV cache; default: the profile's.")
    block_size: int | None = Field(None, ge=1, description="Tokens of a block; default: the profile's.")
    max_num_seqs: int | None = Field(None, ge=1, description="Tasks the engine runs at once; default: the profile's.")
    engine_scheduler: Literal["justitia", "stock"] = Field(
        "justitia", description="The scheduler in the engine: ours, or vLLM's own by priority."
    )
    beta: float = Field(1.0, gt=0, description="Share of the KV cache that what is in flight may come to hold.")
    cost: Literal["memory", "compute"] = Field(
        "memory", description="What costs are made of: KV tokens held over iterations, or tokens computed."
    )
    capacity: Literal["served", "blocks"] = Field(
        "served", description="What the reference shares out: what the engine was seen to hold, or all blocks."
    )
    prefix_caching: bool | None = Field(
        None, description="vLLM's prefix cache; default: on if the trace says that prompts begin alike."
    )
    keep_kv: bool = Field(
        True, description="Keep the KV of agents that wait for tools, as the gateway does (own release, own scheduler)."
    )
    charge: Literal["held", "formula"] = Field(
        "held",
        description="What tasks are charged: what the engine's scheduler says they held, or the formula's value.",
    )
    displace_margin: float | None = Field(
        None, ge=0, description="Urgent tasks displace those whose tag is larger by more than this; default: none does."
    )
    timings: bool = Field(False, description="Add how long decisions took; the output then differs from run to run.")
    out: Path | None = Field(None, description="File for the results, as JSON.")
    plot: Path | None = Field(None, description="Directory for pictures of the results. Needs the extra `demo`.")

    @field_validator("policy")
    @classmethod
    def _known_policies(cls, policies: str) -> str:
        for spec in policies.split(","):
            name, at, release = spec.strip().partition("@")
            if name not in POLICIES:
                raise ValueError(f"no policy {name!r}: {', '.join(POLICIES)}")
            if at and release not in get_args(ReleaseName):
                raise ValueError(f"no release {release!r}: {', '.join(get_args(ReleaseName))}")
        return policies

    def runs(self) -> list[tuple[str, ReleaseName]]:
        specs = [spec.strip().partition("@") for spec in self.policy.split(",")]
        return [(name, release or own_release(name)) for name, _, release in specs]  # type: ignore[misc]


def run_replay(settings: ReplaySettings) -> int:
    """0, or 2 when the trace, the profile or the predictor cannot be had."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        agents = load_trace(settings.trace)
        past = load_past(settings.trace, settings.learn_from) if settings.predictor in LEARNED else []
        setup = _setup(settings, agents)
        cost = COSTS[settings.cost]
        believed: Believed | None = beliefs(settings.predictor, seed=settings.seed, past=past, cost=cost)
    except (TraceError, ProfileError, UnknownPredictor, OSError) as error:
        console.print(f"justitia replay: {error}", markup=False)
        return 2
    if complaint := _cannot_write(settings):
        console.print(f"justitia replay: {complaint}", markup=False)
        return 2
    console.print(f"{len(agents)} agents, {sum(len(agent.tasks) for agent in agents)} tasks, {settings.profile}")
    runs = []
    with collector_at_rest(), _progress(console) as progress:
        for policy, release in settings.runs():
            name = label(policy, release)
            bar = progress.add_task(name, total=len(agents))
            believed = believed or beliefs(settings.predictor, seed=settings.seed, past=past, cost=cost)
            try:
                run = simulate(
                    agents,
                    policy,
                    release,
                    believed,
                    setup,
                    predictor=settings.predictor,
                    finished=lambda done, bar=bar: progress.update(bar, completed=done),  # type: ignore[misc]
                )
            except TraceError as error:
                console.print(f"justitia replay: {error}", markup=False)
                return 2
            runs.append(run)
            believed = None  # the next one has not seen these agents
            if not console.is_terminal:
                console.print(f"{name}: mean JCT {run.summary.mean_jct_s:.1f} s")
    replay = Replay(_config(settings), describe(agents), against_vtc(runs))
    Console(highlight=False).print(table(replay.runs))
    if settings.out is not None:
        write(replay, settings.out)
        console.print(f"results: {settings.out}")
    if settings.plot is not None:
        from gateway.replay.plot import draw_all

        for path in draw_all(replay, settings.plot):
            console.print(f"picture: {path}")
    return 0


def load_trace(spec: str) -> list[AgentTrace]:
    """A built-in trace, or a file. Raises `TraceError` and `OSError`."""
    agents = built_in(spec)
    if agents is None:
        path = Path(spec)
        if not path.exists():
            raise TraceError(f"no file {spec}, and no built-in trace: {', '.join(BUILT_IN)}")
        agents = read_trace(path)
    return agents


def begin_alike(agents: Sequence[AgentTrace]) -> bool:
    """Whether any prompt of the trace shares its beginning."""
    return any(task.prefix is not None for agent in agents for task in agent.tasks)


def load_past(spec: str, learn_from: str) -> list[AgentTrace]:
    """What a ladder has learned before the trace begins: by default other seeds of a built-in trace."""
    if learn_from == "nothing":
        return []
    if learn_from:
        return [agent for each in learn_from.split(",") for agent in load_trace(each.strip())]
    name, *rest = spec.split(":")
    place = {"paper": 0, "tools": 0, "coding": 0, "prefix": 0, "tenants": 0, "text": 0, "elephant": 1}.get(name)
    if place is None:
        return []
    if name == "text":  # nothing is learned from what is held out
        rest = [word for word in rest if word != "held-out"]
    rest = [*rest, "0"] if len(rest) == place else rest
    seeds = [str(int(rest[place]) + further) for further in LEARN_FROM_SEEDS]
    return [agent for seed in seeds for agent in load_trace(":".join([name, *rest[:place], seed, *rest[place + 1 :]]))]


def table(runs: Sequence[Run]) -> Table:
    drawn = Table(
        title="Completion time of an agent (JCT), seconds",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    drawn.add_column("policy", no_wrap=True)
    for heading in ("mean", "P50", "P99", "÷ vtc", "no later", "worst", "late", "bound"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    vtc = next((run.summary.mean_jct_s for run in runs if run.label == "vtc"), None)
    for run in runs:
        summary = run.summary
        jcts = (summary.mean_jct_s, summary.p50_jct_s, summary.p99_jct_s)
        drawn.add_row(
            run.label,
            *(f"{value:.1f}" for value in jcts),
            "" if vtc is None else f"{summary.mean_jct_s / vtc:.2f}",
            "" if summary.no_later_than_vtc is None else f"{100 * summary.no_later_than_vtc:.1f} %",
            "" if summary.worst_ratio_to_vtc is None else f"{summary.worst_ratio_to_vtc:.2f}",
            f"{summary.worst_lateness_s:.1f}",
            f"{summary.bound_s:.1f}",
        )
    drawn.caption = (
        "no later, worst: agents that finish no later than under vtc, and the largest ratio to it.\n"
        "late, bound: the latest against ideal fair sharing, and what justitia's order allows."
    )
    return drawn


def _cannot_write(settings: ReplaySettings) -> str | None:
    """What would go wrong after all runs, found out before them. Makes the directories."""
    try:
        if settings.out is not None:
            settings.out.parent.mkdir(parents=True, exist_ok=True)
            with settings.out.open("ab"):
                pass
        if settings.plot is not None:
            settings.plot.mkdir(parents=True, exist_ok=True)
            import matplotlib  # noqa: F401 (whether it is there)
    except OSError as error:
        return str(error)
    except ImportError:
        return f"a picture {how_to_get('matplotlib')}"
    return None


def _setup(settings: ReplaySettings, agents: Sequence[AgentTrace]) -> Setup:
    profile = load_profile(settings.profile)
    if settings.max_num_seqs is not None and settings.max_num_seqs > profile.max_num_batched_tokens:
        raise ProfileError(
            f"max_num_seqs {settings.max_num_seqs} is more than the {profile.max_num_batched_tokens} tokens that"
            f" {profile.name} computes in an iteration"
        )
    return Setup(
        profile=profile,
        kv_blocks=settings.kv_blocks,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        engine_scheduler=settings.engine_scheduler,
        beta=settings.beta,
        cost=COSTS[settings.cost],
        capacity=settings.capacity,
        prefix_caching=begin_alike(agents) if settings.prefix_caching is None else settings.prefix_caching,
        keep=settings.keep_kv,
        charge=settings.charge,
        displace_margin=settings.displace_margin,
        timings=settings.timings,
        memory_over_time=settings.plot is not None,
    )


def _config(settings: ReplaySettings) -> dict[str, Any]:
    """All that the result follows from, and no more: the same command gives the same file."""
    return {**settings.model_dump(mode="json", exclude={"out", "plot"}), "versions": versions()}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(32),
        MofNCompleteColumn(),
        TextColumn("agents"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
