"""Pictures of what a replay found, from its results alone. Needs matplotlib (the extra `demo`).

Each function writes one PNG. A label is a policy, or a policy and how tasks were released (`fcfs@memory`): a policy has the
same colour in every picture, and a release that is not its own is dashed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.replay.figures import DPI, GREY, HEIGHT, INK, WIDTH, mean
from gateway.replay.results import AgentResult, Memory, Replay, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's, without the yellow, which is too light for a line.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
YELLOW, OTHERS, GRID = "#F0E442", "#d0d7de", "#d8dee4"
COLOURS = {
    "justitia": BLUE,
    "vtc": VERMILION,
    "srjf": GREEN,
    "agent-fcfs": ORANGE,
    "las": PURPLE,
    "sjf": SKY,
    "fcfs": "#57606a",
}
AGENT_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW)
OWN_STYLE, OTHER_STYLE = "-", (0, (4, 1.5))
# Inches around the axes; right of them, what the labels need.
LEFT, TOP, BOTTOM = 0.8, 0.55, 0.6
# What a line of labels and a letter take, in inches, and what names an agent at most, in letters.
LINE_HEIGHT, LETTER_WIDTH, NAME_LENGTH = 0.175, 0.086, 18
# Averages over time that a stack of areas is drawn from: more would be a comb.
MEMORY_POINTS = 120
# From here on a logarithm shows more than a straight axis.
LOG_FROM = 8.0

Point = tuple[float, float]
Banded = Point | tuple[float, float, float, float]  # x, mean; and the smallest and the largest of several seeds


def draw_all(replay: Replay, directory: Path) -> list[Path]:
    """The pictures of one replay. The directory has to exist. Raises `ImportError` without matplotlib."""
    drawn = [directory / "jct.png"]
    jct_distribution(replay.runs, drawn[0])
    if any(run.label == "vtc" for run in replay.runs) and len(replay.runs) > 1:
        drawn.append(directory / "ratio-to-vtc.png")
        ratio_to_vtc(replay.runs, drawn[-1])
    for run in replay.runs:
        if run.memory is not None and run.memory.times_s:
            drawn.append(directory / f"memory-{run.label.replace('@', '-')}.png")
            memory_over_time(run, drawn[-1])
    return drawn


def jct_distribution(runs: Sequence[Run], path: Path) -> None:
    """The share of the agents that took at most so long, by policy."""
    labels = {run.label: f"{run.label}, {_seconds(run.summary.mean_jct_s)}" for run in runs}
    figure, axes = _figure(f"Completion times of {len(runs[0].agents)} agents", labels.values(), beside=0.6)
    everything = [agent.jct_s for run in runs for agent in run.agents]
    for run, colour, style in sorted(_styled(runs), key=lambda styled: styled[0].summary.mean_jct_s):
        jcts = sorted(agent.jct_s for agent in run.agents)
        shares = [100 * (i + 1) / len(jcts) for i in range(len(jcts))]
        label = labels[run.label]
        axes.step([jcts[0], *jcts], [0, *shares], where="post", color=colour, linestyle=style, lw=1.8, label=label)
    _log(axes.xaxis, min(everything) / 1.1, max(everything) * 1.1)
    axes.set_ylim(0, 102)
    axes.grid(axis="both", color=GRID, linewidth=0.8)
    axes.set_xlabel("completion time, s (log)")
    axes.set_ylabel("agents, %")
    axes.legend(
        title="policy, mean",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=1.6,
        alignment="left",
        title_fontproperties={"size": 9},
    ).get_title().set_color(GREY)
    _save(figure, path)


def ratio_to_vtc(runs: Sequence[Run], path: Path) -> None:
    """Every agent's JCT over its JCT in the run of `vtc`, sorted by that. Raises `ValueError` without such a run."""
    vtc = next((run for run in runs if run.label == "vtc"), None)
    if vtc is None:
        raise ValueError("no run of vtc to compare with")
    before = {agent.agent_id: agent.jct_s for agent in vtc.agents}
    lines = [
        (sorted(agent.jct_s / before[agent.agent_id] for agent in run.agents), run.label, colour, style)
        for run, colour, style in _styled(runs)
        if run is not vtc
    ]
    ends = [(ratios[-1], _against_vtc(label, ratios), colour) for ratios, label, colour, _ in lines]
    ends.append((1.0, "vtc", COLOURS["vtc"]))
    figure, axes = _figure(f"Completion time against vtc's, each of {len(before)} agents", [end[1] for end in ends])
    for ratios, _, colour, style in lines:
        places = [100 * (i + 0.5) / len(ratios) for i in range(len(ratios))]
        axes.plot(places, ratios, color=colour, linestyle=style, lw=1.8, zorder=3)
    everything = [1.0, *(ratio for ratios, *_ in lines for ratio in ratios)]
    _log(axes.yaxis, min(everything) / 1.15, max(everything) * 1.15)
    axes.axhline(1, color=COLOURS["vtc"], linewidth=1.4, zorder=2)
    axes.set_xlim(0, 100)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xlabel("agents, %, the most improved first")
    axes.set_ylabel("JCT ÷ JCT under vtc (log)")
    _label_ends(axes, ends)
    _save(figure, path)


def elephant(points: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """The JCT of one very large agent against the number of small ones, by policy."""
    figure, axes = _figure("Completion time of the elephant against the number of mice", points)
    axes.set_xlabel("mice")
    _lines(axes, points, "completion time of the elephant, s", may_be_log=False)
    _save(figure, path)


def against_load(points: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Mean JCT against load, by policy."""
    figure, axes = _figure("Mean completion time against load", points)
    axes.set_xlabel("load")
    _lines(axes, points, "mean completion time, s")
    _save(figure, path)


def against_error(points: Mapping[str, Sequence[Banded]], path: Path) -> None:
    """Mean JCT against the σ of the prediction's error, by policy; with four numbers in a point also a band."""
    figure, axes = _figure("Mean completion time when predictions are wrong", points)
    axes.set_xlabel("σ of the prediction's error (log-normal; 0 is exact)")
    _lines(axes, points, "mean completion time, s")
    _save(figure, path)


def memory_over_time(run: Run, path: Path, capacity_tokens: float | None = None) -> None:
    """What each agent held, stacked, the most costly ones in colour: the same ones under every policy. In per cent of the
    capacity, where it is known, else in tokens. Raises `ValueError` for a run without it."""
    if run.memory is None or not run.memory.times_s:
        raise ValueError(f"the run of {run.label} has no memory over time")
    times_s, held = _averaged(run.memory)
    unit = 100 / capacity_tokens if capacity_tokens else 1e-3
    costly = [agent for agent in sorted(run.agents, key=lambda agent: -agent.cost) if agent.agent_id in held]
    colours = {agent.agent_id: colour for agent, colour in zip(costly, AGENT_COLOURS, strict=False)}
    shown = [agent for agent in sorted(run.agents, key=lambda agent: agent.arrival_s) if agent.agent_id in colours]
    rest = [tokens for agent_id, tokens in held.items() if agent_id not in colours]
    layers = [[unit * tokens for tokens in held[agent.agent_id]] for agent in shown]
    layers.append([unit * sum(at) for at in zip(*rest, strict=True)] if rest else [0.0] * len(times_s))
    lines = [("all others", OTHERS), *((_agent(agent), colours[agent.agent_id]) for agent in reversed(shown))]
    figure, axes = _figure(f"Who holds the memory: {run.label}", [text for text, _ in lines])
    colour_of_layers = [*(colours[agent.agent_id] for agent in shown), OTHERS]
    axes.stackplot(times_s, layers, colors=colour_of_layers, linewidth=0, step="post")
    axes.set_xlim(0, times_s[-1] or 1.0)
    highest = max(map(sum, zip(*layers, strict=True)))
    axes.set_ylim(0, max(100.0, highest) if capacity_tokens else highest * 1.03 or 1.0)
    axes.set_xlabel("time, s")
    axes.set_ylabel("KV memory held, %" if capacity_tokens else "KV tokens held, thousands")
    _swatches(axes, "agent, completion time", lines)
    _save(figure, path)


def dots(places: Sequence[str], values: Mapping[str, Sequence[float]], title: str, what: str, path: Path) -> None:
    """A row for each place, and in it a dot for each name."""
    figure, axes = _figure(title, values, beside=0.6)
    box = axes.get_position()
    left = (0.3 + LETTER_WIDTH * max(map(len, places))) / WIDTH
    axes.set_position((left, box.y0, box.x1 - left, box.height))
    rows = range(len(places), 0, -1)
    for (name, along), colour in zip(values.items(), AGENT_COLOURS, strict=False):
        axes.plot(along, rows, "o", color=colour, ms=7, label=name, zorder=3)
    axes.hlines(rows, 0, max(map(max, values.values())), color=GRID, linewidth=0.8, zorder=1)
    axes.set_yticks(rows, places)
    axes.set_xlim(0, None)
    axes.set_xlabel(what)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=10, labelcolor=INK)
    _save(figure, path)


def ranges(values: Mapping[str, Sequence[float]], title: str, what: str, path: Path) -> None:
    """A bar for each name, as long as the mean, and a dot for each value."""
    figure, axes = _figure(title, ())
    box = axes.get_position()
    left = (0.3 + LETTER_WIDTH * max(map(len, values))) / WIDTH
    axes.set_position((left, box.y0, box.x1 - left, box.height))
    for row, (along, colour) in enumerate(zip(values.values(), AGENT_COLOURS, strict=False)):
        axes.barh(-row, mean(along), height=0.6, color=colour, alpha=0.55, zorder=2)
        axes.plot(along, [-row] * len(along), "o", color=INK, ms=4, zorder=3)
    axes.set_yticks([-row for row in range(len(values))], list(values))
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel(what)
    _save(figure, path)


# How they are drawn


def _figure(title: str, labels: Iterable[str], beside: float = 0.35) -> tuple[Figure, Axes]:
    """With room for the labels right of the axes, and so many inches beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    right = beside + LETTER_WIDTH * max(map(len, labels), default=0)
    box = (LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + right) / WIDTH, 1 - (TOP + BOTTOM) / HEIGHT)
    axes = figure.add_axes(box)
    figure.suptitle(title, x=0.012, y=0.975, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(fontsize=10, color=INK)
    figure.savefig(path, dpi=DPI)


def _averaged(memory: Memory) -> tuple[list[float], dict[str, list[float]]]:
    """Tokens, each the mean of as many samples in a row as leave `MEMORY_POINTS` at most, and when each begins to hold; the
    last one twice, since it holds until the end."""
    samples = len(memory.times_s)
    of = math.ceil(samples / MEMORY_POINTS)
    rows = [slice(start, start + of) for start in range(0, samples, of)]
    tokens = {agent_id: [mean(held[row]) for row in (*rows, rows[-1])] for agent_id, held in memory.tokens.items()}
    return [*(memory.times_s[row.start] for row in rows), memory.times_s[-1]], tokens


def _styled(runs: Iterable[Run]) -> list[tuple[Run, str, object]]:
    return [(run, _colour(run.label, i), _style(run.label)) for i, run in enumerate(runs)]


def _colour(label: str, place: int) -> str:
    return COLOURS.get(label.partition("@")[0]) or list(COLOURS.values())[place % len(COLOURS)]


def _style(label: str) -> object:
    return OTHER_STYLE if "@" in label else OWN_STYLE


def _lines(axes: Axes, points: Mapping[str, Sequence[Banded]], what: str, *, may_be_log: bool = True) -> None:
    """One line with points for each label, named at its end."""
    from matplotlib.ticker import FuncFormatter

    xs = sorted({point[0] for line in points.values() for point in line})
    ys = [y for line in points.values() for point in line for y in point[1:]]
    ends = []
    for i, (label, line) in enumerate(points.items()):
        colour, ordered = _colour(label, i), sorted(line)
        places, means = [point[0] for point in ordered], [point[1] for point in ordered]
        top = 4 if label == "justitia" else 3
        axes.plot(
            places, means, color=colour, linestyle=_style(label), lw=1.8, marker="o", ms=4.5, zorder=top, clip_on=False
        )
        bands = [(point[2], point[3]) for point in ordered if len(point) == 4]
        if len(bands) == len(ordered):
            low, high = zip(*bands, strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
        ends.append((means[-1], label, colour))
    if may_be_log and min(ys) > 0 and max(ys) / min(ys) > LOG_FROM:
        _log(axes.yaxis, min(ys) / 1.15, max(ys) * 1.15)
        what += " (log)"
    else:
        axes.set_ylim(0, max(ys) * 1.06)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel(what)
    margin = 0.02 * (xs[-1] - xs[0]) or 1.0
    axes.set_xlim(xs[0] - margin, xs[-1] if len(xs) > 1 else xs[-1] + margin)
    apart = all(later - earlier > 0.05 * (xs[-1] - xs[0]) for earlier, later in itertools.pairwise(xs))
    if apart:
        axes.set_xticks(xs, [f"{x:,g}" for x in xs])
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _label_ends(axes, ends)


def _log(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis with as many round numbers as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes = axis.axes
    if axis is axes.xaxis:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    ticks: list[float] = []
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**power for power in range(-9, 10) for digit in digits if low <= digit * 10**power <= high]
        if len(ticks) <= 10:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each text at the height of its value, right of the axes, in the colour of its line; none on top of another."""
    height = axes.get_position().height * HEIGHT / LINE_HEIGHT  # in lines
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    wanted = [float(to_axes.transform((right, value))[1]) * height for value, _, _ in ends]
    for (_, text, colour), at, place in zip(ends, wanted, _apart(wanted, height), strict=True):
        axes.plot(
            [1.0, 1.022], [at / height, place / height], transform=axes.transAxes, color=colour, lw=0.8, clip_on=False
        )
        axes.text(
            1.03, place / height, text, transform=axes.transAxes, va="center", fontsize=10, color=colour, clip_on=False
        )


def _apart(wanted: Sequence[float], top: float) -> list[float]:
    """Places at least 1 apart and between 0 and `top`, as far as they fit there, each group of neighbours about its mean."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, list[int]]] = []  # the lowest place, and the texts from there up
    for i in order:
        low, members = min(max(wanted[i], 0.0), top), [i]
        while groups and groups[-1][0] + len(groups[-1][1]) > low:
            members = groups.pop()[1] + members
            middle = mean([wanted[member] for member in members])
            low = max(0.0, min(middle - (len(members) - 1) / 2, top - (len(members) - 1)))
        groups.append((low, members))
    places = [0.0] * len(wanted)
    for low, members in groups:
        for k, i in enumerate(members):
            places[i] = low + k
    return places


def _swatches(axes: Axes, heading: str, lines: Sequence[tuple[str, str]]) -> None:
    """A list of colours and names, right of the axes, from the top."""
    from matplotlib.patches import Rectangle

    step = 1.25 * LINE_HEIGHT / (axes.get_position().height * HEIGHT)
    axes.text(1.03, 1 - step / 2, heading, transform=axes.transAxes, va="center", fontsize=9, color=GREY)
    for i, (text, colour) in enumerate(lines, start=1):
        middle = 1 - step * (i + 0.5)
        axes.add_patch(
            Rectangle((1.03, middle - step / 4), 0.02, step / 2, transform=axes.transAxes, color=colour, clip_on=False)
        )
        axes.text(1.065, middle, text, transform=axes.transAxes, va="center", fontsize=9, color=INK)


def _against_vtc(label: str, ratios: Sequence[float]) -> str:
    no_later = 100 * sum(ratio <= 1 for ratio in ratios) / len(ratios)
    worst = f"{max(ratios):.2f}" if max(ratios) < 10 else f"{max(ratios):,.0f}"
    return f"{label}: {no_later:.0f}% ≤ 1, worst {worst}"


def _agent(agent: AgentResult) -> str:
    name = agent.agent_id if len(agent.agent_id) <= NAME_LENGTH else f"…{agent.agent_id[1 - NAME_LENGTH :]}"
    return f"{name}, {_seconds(agent.jct_s)}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"
