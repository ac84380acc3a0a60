"""The picture of a comparison: every agent's JCT under two policies, and the means by size. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gateway.demo.kinds import SIZES
from gateway.demo.report import AgentOutcome, Run, jcts, ratio
from gateway.replay.figures import BAND, BASELINE_COLOUR, DPI, GREY, HEIGHT, INK, RUN_COLOUR, WIDTH, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(run: Run, baseline: Run, path: Path) -> None:
    """Writes a PNG. Agents with a failed task have no JCT and are left out; raises `ValueError` when none is left, and
    `ImportError` without matplotlib (the extra `demo`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = _pairs(run, baseline)
    if not pairs:
        raise ValueError("no agent completed in both runs")
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    _draw_agents(left, pairs, run, baseline)
    _draw_sizes(right, run, baseline)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=10)
    title = (
        f"{len(pairs)} agents, one engine: mean completion time {ratio(run, baseline):.2f} × that of {baseline.policy}"
    )
    figure.suptitle(title, x=0.012, y=0.975, ha="left", fontsize=13, fontweight="bold", color=INK)
    right.tick_params(axis="x", length=0, labelsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1.0), w_pad=2.5)
    figure.savefig(path, dpi=DPI)


def _pairs(run: Run, baseline: Run) -> list[tuple[AgentOutcome, float, float]]:
    """Agent, its JCT in the baseline, and in the run; by size, and within a size by the baseline's JCT."""
    before = {agent.agent_id: agent.jct_s for agent in baseline.agents}
    pairs = [
        (agent, jct_s, agent.jct_s)
        for agent in run.agents
        if agent.jct_s is not None and (jct_s := before[agent.agent_id]) is not None
    ]
    return sorted(pairs, key=lambda pair: (SIZES.index(pair[0].size), pair[1]))


def _draw_agents(axes: Axes, pairs: list[tuple[AgentOutcome, float, float]], run: Run, baseline: Run) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    places = range(len(pairs))
    before, after = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    axes.vlines(places, after, before, color=GREY, linewidth=1, alpha=0.6, zorder=2)
    axes.scatter(places, before, s=30, color=BASELINE_COLOUR, marker="s", zorder=3, label=baseline.policy)
    axes.scatter(places, after, s=36, color=RUN_COLOUR, marker="o", zorder=4, label=run.policy)
    axes.set_yscale("log")
    low, high = min(before + after), max(before + after)
    # Room above for the names of the sizes.
    axes.set_ylim(low / 1.4, high * 2.2)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS_S if low / 1.4 <= tick <= high * 1.4]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(-1, len(pairs))
    axes.set_xticks([])
    axes.set_xlabel("agents, each a pair of points", fontsize=10, color=INK)
    axes.set_ylabel("completion time, s (log)", fontsize=10, color=INK)
    start = 0
    for index, size in enumerate(SIZES):
        count = sum(pair[0].size == size for pair in pairs)
        if not count:
            continue
        if index % 2 == 0:
            axes.axvspan(start - 0.5, start + count - 0.5, color=BAND, zorder=0, linewidth=0)
        axes.text(start + count / 2 - 0.5, high * 1.85, size, ha="center", va="top", fontsize=10, color=INK)
        start += count
    axes.legend(loc="lower right", fontsize=10, frameon=True, framealpha=1, edgecolor="#d8dee4")


def _draw_sizes(axes: Axes, run: Run, baseline: Run) -> None:
    names = [*SIZES, "all"]
    before = [mean(jcts(baseline, size)) for size in (*SIZES, None)]
    after = [mean(jcts(run, size)) for size in (*SIZES, None)]
    for offset, values, colour in ((-0.2, before, BASELINE_COLOUR), (0.2, after, RUN_COLOUR)):
        bars = axes.bar([place + offset for place in range(len(names))], values, width=0.38, color=colour)
        labels = [f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in values]
        axes.bar_label(bars, labels, fontsize=8.5, padding=2, color=INK)
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel("mean completion time, s", fontsize=10, color=INK)
    axes.margins(y=0.12)
