"""What was found, drawn for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from tests.benchmarks.engine_check.engines import AGAIN, OURS


def equality_table(figures: dict[str, Any]) -> Table:
    preempted = ", ".join(f"{name} {count}" for name, count in figures["preemptions"].items())
    drawn = Table(title=f"Tokens against a stock engine: {figures['setup']}", title_justify="left")
    drawn.caption = f"preemptions: {preempted}"
    for heading in ("kind", "answers", "equal tokens", "ties", "differing", "rounding", "smallest gap"):
        drawn.add_column(heading, justify="left" if heading == "kind" else "right")
    rows = {**figures["justitia"]["kinds"]}
    for kind, tally in rows.items():
        keys = ("choices", "tokens", "ties", "differing", "rounding", "smallest_gap")
        drawn.add_row(kind, *(str(tally[key]) for key in keys))
    again, other = figures["control_stock_again"], figures["control_other_prompts"]
    if again is not None:
        rounding = max((tally["rounding"] for tally in again["kinds"].values()), default=0.0)
        cells = (again["tokens"], again["ties"], again["differing"], rounding)
        drawn.add_row("stock against stock", "", *map(str, cells))
    drawn.add_row("another first token", str(other["choices"]), "", "", str(other["differing"]))
    return drawn


def speed_table(figures: dict[str, Any]) -> Table:
    drawn = Table(title=f"Output tokens a second: {figures['verdict']}", title_justify="left")
    for heading in ("engine", "median", "against stock", "sure within", "quartiles"):
        drawn.add_column(heading, justify="left" if heading == "engine" else "right")
    for name, rate in figures["tokens_per_s"].items():
        ratio = {OURS: figures["ratio"], AGAIN: figures["control_ratio"]}.get(name)
        cells = ("", "", "")
        if ratio is not None:
            quartiles = f"{ratio['quartile_low']:.3f} to {ratio['quartile_high']:.3f}"
            cells = (f"{ratio['median']:.3f}", f"{ratio['sure_low']:.3f} to {ratio['sure_high']:.3f}", quartiles)
        drawn.add_row(name, f"{rate:,.0f}", *cells)
    return drawn
