"""The predictor report: `python -m tests.benchmarks.predictor_report` runs the studies, and writes what they say.

Into docs/benchmarks: `results/predictor.json`, `predictor.md` (from `predictor_report.md` beside this file), and pictures.
`--anew nothing` writes page and pictures of an earlier run anew. Some twenty minutes on two cores, which should be idle for
the first of them: it is then that times are measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from string import Template
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track

from gateway.replay import plot
from gateway.replay.environment import machine, versions
from gateway.replay.evaluation import Evaluation
from gateway.replay.figures import mean
from predictor.evaluate import Quality
from predictor.train import FEWEST_AGENTS
from tests.benchmarks.page import mean_of_known, signed, table
from tests.benchmarks.predictor_costs import Costs, measure
from tests.benchmarks.predictor_studies import NOISES, PER_CLASS, Row, jobs, run_one

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGE = Path(__file__).with_name("predictor_report.md")
NAMES = {"xgboost": "xgboost", "mlp": "the paper's MLP", "ladder": "ladder", "oracle": "oracle", "exact": "exact"}
PREDICTORS = ("xgboost", "mlp", "ladder", "oracle")
BLIND = {"": "all of it", "text": "without text", "class": "without the class", "growth": "without growth"}


class Report(msgspec.Struct, frozen=True):
    environment: dict[str, Any]
    costs: Costs
    rows: list[Row]

    def of(self, study: str, predictor: str, **more: Any) -> list[Row]:
        """One for each seed."""
        wanted = {
            "study": study,
            "predictor": predictor,
            "without": "",
            "renamed": False,
            "hints": "",
            "own_tenant": False,
        } | more
        found = [row for row in self.rows if all(getattr(row.job, name) == value for name, value in wanted.items())]
        if not found:
            raise KeyError(f"no {study} {predictor} {more}")
        return found

    def evaluations(self, predictor: str, without: str = "") -> list[Evaluation]:
        found = [row.evaluation for row in self.of("accuracy", predictor, without=without)]
        return [one for one in found if one is not None]


def page(report: Report) -> str:
    return Template(PAGE.read_text()).substitute(
        per_class=PER_CLASS,
        fewest=FEWEST_AGENTS,
        targets=_targets(report),
        classes=_classes(report),
        ablations=_ablations(report),
        replays=_replays(report),
        cold=_cold(report),
        hints=_hints(report),
        gain_of_tenant=_gain(report, own_tenant=True),
        gain_of_agent=_gain(report, own_tenant=False),
        costs=_costs(report.costs),
    )


def _targets(report: Report) -> str:
    def line(
        what: str, paper: str, target: str, of: Callable[[Quality], float | None], form: Callable[[float], str]
    ) -> str:
        cells = []
        for name in PREDICTORS:
            values = [value for one in report.evaluations(name) if (value := of(one.first)) is not None]
            # The oracle tells one number only, and no ninth decile.
            cells.append("–" if name == "oracle" and what.startswith("below") else _spread(values, form))
        return "| " + " | ".join((what, paper, target, f"**{cells[0]}**", *cells[1:])) + " |"

    return "\n".join(
        (
            line("median relative error", "–", "≤ 30 %", lambda q: q.median_error, _percent),
            line("mean relative error", "53 %", "–", lambda q: q.mean_error, _percent),
            line("order: Kendall's τ, all classes", "–", "≥ 0.80", lambda q: q.tau, _two),
            line("order within a class, mean", "–", "≥ 0.5", lambda q: q.tau_within, _two),
            line("below P90", "–", "87 to 93 %", lambda q: q.coverage, _percent),
        )
    )


def _classes(report: Report) -> str:
    header = ["class", *(f"{NAMES[name]}: error" for name in PREDICTORS), "τ, xgboost", "below P90"]
    rows = []
    for agent_class in sorted(report.evaluations("xgboost")[0].first.classes):
        errors = [
            mean_of_known(one.first.classes[agent_class].median_error for one in report.evaluations(name))
            for name in PREDICTORS
        ]
        cells = [agent_class, *map(_percent, errors)]
        ours = [one.first.classes[agent_class] for one in report.evaluations("xgboost")]
        cells += [_two(mean_of_known(one.tau for one in ours)), _percent(mean_of_known(one.coverage for one in ours))]
        rows.append(cells)
    return table(header, rows)


def _ablations(report: Report) -> str:
    header = (
        "xgboost",
        "first task: error",
        "τ",
        "τ within a class",
        "formed: error",
        "τ",
        "half: error",
        "decode length: error",
    )
    rows = []
    for without, name in BLIND.items():
        found = report.evaluations("xgboost", without)
        rows.append(
            (
                name,
                _percent(mean_of_known(one.first.median_error for one in found)),
                _two(mean_of_known(one.first.tau for one in found)),
                _two(mean_of_known(one.first.tau_within for one in found)),
                _percent(mean_of_known(one.formed.median_error for one in found)),
                _two(mean_of_known(one.formed.tau for one in found)),
                _percent(mean_of_known(one.half.median_error for one in found)),
                _percent(mean_of_known(one.decode.median_error for one in found)),
            )
        )
    return table(header, rows)


def _replays(report: Report) -> str:
    rows = []
    for name in ("exact", "oracle", "xgboost", "mlp", "ladder", *NOISES):
        found = report.of("replay", name)
        rows.append(
            (_named(name), _jct(found), _loss(report, found), f"{mean([row.preemptions for row in found]):.0f}")
        )
    return table(("costs by", "mean JCT, s", "against exact (range of seeds)", "preempted"), rows)


def _cold(report: Report) -> str:
    known = (
        ("xgboost, nothing known", report.of("cold", "xgboost")),
        ("ladder, nothing known", report.of("cold", "ladder")),
        ("xgboost, the same kinds under new names", report.of("cold", "xgboost", renamed=True)),
        (f"xgboost, {PER_CLASS} of each class known", report.of("replay", "xgboost")),
        ("oracle", report.of("replay", "oracle")),
    )
    rows = [(name, _jct(found), _loss(report, found)) for name, found in known]
    return table(("", "mean JCT, s", "against exact (range of seeds)"), rows)


def _hints(report: Report) -> str:
    rows = []
    said = (("true", "the truth"), ("few", "a tenth of it"), ("many", "ten times as many"))
    for own_tenant, (hints, name) in itertools.product((True, False), said):
        true = report.of("hints", "xgboost", hints="true", own_tenant=own_tenant)
        found = report.of("hints", "xgboost", hints=hints, own_tenant=own_tenant)
        cells = [
            "half of all, a tenant of their own" if own_tenant else "every tenth, among others of their tenant",
            name,
        ]
        for half in (0, 1):
            jcts, honest = [row.liars_jct_s[half] for row in found], [row.liars_jct_s[half] for row in true]
            cells.append(
                f"{mean(jcts):.1f} s" + ("" if hints == "true" else f" ({_signed(mean(jcts) / mean(honest) - 1)})")
            )
        rows.append((*cells, _jct(found)))
    return table(("who", "their clients say", "first half", "second half", "mean JCT of all, s"), rows)


def _gain(report: Report, own_tenant: bool) -> str:
    """Of those that say a tenth, over the whole run."""
    few, true = (
        mean([sum(row.liars_jct_s) for row in report.of("hints", "xgboost", hints=hints, own_tenant=own_tenant)])
        for hints in ("few", "true")
    )
    return _signed(few / true - 1)


def _costs(costs: Costs) -> str:
    rows = (
        (
            f"prediction at arrival, prompt of {costs.prompt_tokens:,} tokens, features included: median, P99",
            "2.16 ms",
            "≤ 0.5 ms, ≤ 1 ms",
            f"{costs.arrive_ms_p50:.2f} ms, {costs.arrive_ms_p99:.2f} ms",
        ),
        (
            f"training on {costs.trained_agents:,} agents, {costs.threads} threads: time, memory",
            "about 1 min for 900",
            "≤ 5 min, ≤ 4 GiB",
            f"{costs.train_s:.0f} s, {costs.train_gib:.1f} GiB",
        ),
    )
    return table(("", "paper", "target", "here"), rows)


def pictures(report: Report, directory: Path) -> None:
    classes = sorted(report.evaluations("xgboost")[0].first.classes)
    errors = {
        NAMES[name]: [
            100 * mean_of_known(one.first.classes[c].median_error for one in report.evaluations(name)) for c in classes
        ]
        for name in PREDICTORS
    }
    plot.dots(
        classes,
        errors,
        "Error of predicted costs, by class",
        "median relative error, %",
        directory / "predictor-classes.png",
    )
    losses = {
        _named(name): [100 * (loss - 1) for loss in _losses(report, report.of("replay", name))]
        for name in (*PREDICTORS, *NOISES)
    }
    plot.ranges(
        losses,
        "Mean completion time against exactly known costs",
        "slower, % (five seeds)",
        directory / "predictor-jct.png",
    )


def _losses(report: Report, found: Sequence[Row]) -> list[float]:
    exact = {row.job.seed: row.mean_jct_s for row in report.of("replay", "exact")}
    return [row.mean_jct_s / exact[row.job.seed] for row in found]


def _loss(report: Report, found: Sequence[Row]) -> str:
    losses = [loss - 1 for loss in _losses(report, found)]
    if found[0].job.predictor == "exact":
        return ""
    return f"{_signed(mean(losses))} ({_signed(min(losses))} to {_signed(max(losses))})"


def _jct(found: Sequence[Row]) -> str:
    return f"{mean([row.mean_jct_s for row in found]):.1f}"


def _named(name: str) -> str:
    kind, _, sigma = name.partition(":")
    return f"noise, σ = {sigma}" if sigma else NAMES[kind]


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(mean(values))} ({form(min(values))} to {form(max(values))})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(share: float) -> str:
    return signed(100 * share)


def _two(value: float) -> str:
    return f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--anew",
        choices=("all", "runs", "missing", "costs", "nothing"),
        default="all",
        help="what is not taken from the last JSON",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results = DOCS / "results" / "predictor.json"
    before = Report({}, Costs(), [])
    if options.anew != "all" and results.exists():
        before = msgspec.json.decode(results.read_bytes(), type=Report)
    if options.anew != "nothing":
        costs = measure() if options.anew in ("all", "costs") else before.costs  # before others are at work
        kept = before.rows if options.anew in ("missing", "costs") else []
        rows = kept if options.anew == "costs" else _run(options.processes, kept)
        results.write_bytes(b"\n".join(_lines(Report({"machine": machine(), "versions": versions()}, costs, rows))))
    report = msgspec.json.decode(results.read_bytes(), type=Report)
    pictures(report, DOCS)
    (DOCS / "predictor.md").write_text(page(report))


def _run(processes: int, kept: Sequence[Row]) -> list[Row]:
    """All jobs' rows, in order; those that are kept are not run."""
    done = {row.job: row for row in kept}
    todo = [job for job in jobs() if job not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = track(pool.map(run_one, todo), total=len(todo), console=Console(stderr=True))
        done |= {row.job: row for row in found}
    return [done[job] for job in jobs()]


def _lines(report: Report) -> Iterator[bytes]:
    """JSON with a line for each run, so that changes can be read."""
    yield b'{"environment":' + msgspec.json.encode(report.environment)
    yield b',"costs":' + msgspec.json.encode(report.costs) + b',"rows":['
    yield b",\n".join(msgspec.json.encode(row) for row in report.rows)
    yield b"]}\n"


if __name__ == "__main__":
    main()
