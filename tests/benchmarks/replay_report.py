"""The replay report: `python -m tests.benchmarks.replay_report [PUBLIC_TRACE …]` runs the studies, and writes what they say.

Into docs/benchmarks: `results/replay.json` (a summary of each run), `replay.md` (from `replay_report.md` beside this
file), and pictures. `--from-json` writes page and pictures of an earlier run anew. Some twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track

from gateway.replay import plot
from gateway.replay.environment import machine, versions
from gateway.replay.figures import mean
from gateway.replay.predictors import LEARNED
from gateway.replay.results import Summary
from gateway.replay.traces import built_in, describe
from tests.benchmarks.page import mean_of_known, signed, table
from tests.benchmarks.replay_studies import BETAS, LEARNED_BY, LOADS, MICE, PROFILE, SIGMAS, Job, Row, jobs, run_all

DOCS = Path("docs/benchmarks")


class Outcome(msgspec.Struct, frozen=True):
    """A run of a study. `to_vtc`, `to_agent_fcfs`, `to_srjf`: its mean JCT over theirs, on the same trace with exact costs,
    each with its own release (srjf's: everything at once). `no_later`, `worst`: agent by agent against vtc. None where
    that has not been run. `tenants`: work done for each while all of them had work."""

    job: Job
    summary: Summary
    to_vtc: float | None
    to_agent_fcfs: float | None
    to_srjf: float | None
    no_later: float | None
    worst: float | None
    elephant_jct_s: float
    tenants: dict[str, float]


class Report(msgspec.Struct, frozen=True):
    environment: dict[str, Any]
    outcomes: list[Outcome]

    def of(self, study: str, policy: str, predictor: str | None = "exact", x: float | None = None) -> list[Outcome]:
        """One for each seed."""
        found = [
            o
            for o in self.outcomes
            if o.job.study == study
            and o.job.policy == policy
            and predictor in (None, o.job.predictor)
            and x in (None, o.job.x)
        ]
        if not found:
            raise KeyError(f"no {study} {policy} {predictor} {x}")
        return found


def compare(rows: Sequence[Row], before: Sequence[Outcome] = ()) -> list[Outcome]:
    """before: outcomes of an earlier run that stand, which the rows are compared with as well."""
    exact = {(r.job.trace, r.job.policy): r for r in rows if _is_compared_with(r.job)}
    mean_jct_s = {(r.job.trace, r.job.policy): r.summary.mean_jct_s for r in exact.values()}
    mean_jct_s |= {(o.job.trace, o.job.policy): o.summary.mean_jct_s for o in before if _is_compared_with(o.job)}
    outcomes = []
    for row in rows:
        trace = _without_folders(row.job.trace)

        def ratio(policy: str, row: Row = row, trace: str = trace) -> float | None:
            other = mean_jct_s.get((row.job.trace, policy)) or mean_jct_s.get((trace, policy))
            return row.summary.mean_jct_s / other if other else None

        vtc = exact.get((row.job.trace, "vtc"))
        ratios = [mine / theirs for mine, theirs in zip(row.jcts, vtc.jcts, strict=True)] if vtc else []
        outcomes.append(
            Outcome(
                job=msgspec.structs.replace(row.job, trace=trace),
                summary=row.summary,
                to_vtc=ratio("vtc"),
                to_agent_fcfs=ratio("agent-fcfs"),
                to_srjf=ratio("srjf@all"),
                no_later=sum(r <= 1 for r in ratios) / len(ratios) if ratios else None,
                worst=max(ratios) if ratios else None,
                elephant_jct_s=row.elephant_jct_s,
                tenants=row.tenants,
            )
        )
    return outcomes


def _is_compared_with(job: Job) -> bool:
    return job.predictor == "exact" and job.cost == "memory" and job.study not in ("beta", "error")


def _without_folders(trace: str) -> str:
    name, _, rest = trace.partition(":")
    return f"public:{rest.rpartition('/')[2]}" if name == "public" else trace


# The page


def page(report: Report) -> str:
    """`replay_report.md`, with the tables in it."""
    template = Template((Path(__file__).parent / "replay_report.md").read_text())
    return template.substitute(
        profile=PROFILE,
        targets=_targets(report),
        loads=_loads(report),
        mixes=table(
            AGAINST, [_against(m, p, report.of(m, "justitia", p)) for m in ("light", "heavy") for p in BELIEFS]
        ),
        errors=_errors(report),
        betas=_betas(report),
        elephant=_elephant(report),
        tools=_tools(report),
        prefix=_prefix(report),
        tenants=_tenants(report),
        public=_public(report),
        workload=_workload(),
    )


def _change(values: Iterable[float | None]) -> str:
    return signed(100 * (mean_of_known(values) - 1))


def _percent(values: Iterable[float | None]) -> str:
    return f"{100 * mean_of_known(values):.1f} %"


def _jct(outcomes: Sequence[Outcome]) -> str:
    return f"{mean([o.summary.mean_jct_s for o in outcomes]):.1f}"


def _worst(outcomes: Sequence[Outcome]) -> str:
    worst = [o.worst for o in outcomes if o.worst is not None]
    return f"{mean(worst):.2f} ({min(worst):.2f} to {max(worst):.2f})"


def _targets(report: Report) -> str:
    exact, learned = (report.of("paper", "justitia", p, 3) for p in ("exact", LEARNED_BY))
    sigma_1, sigma_0 = (report.of("error", "justitia", None, x) for x in (1.0, 0.0))
    compute = report.of("compute", "justitia")
    held = all(
        o.summary.worst_tag_lateness_iterations <= o.summary.bound_iterations
        for o in report.outcomes
        if o.job.policy.startswith("justitia")
    )
    slower = mean([o.summary.mean_jct_s for o in sigma_1]) / mean([o.summary.mean_jct_s for o in sigma_0])
    dearer = mean([o.summary.mean_jct_s for o in compute]) / mean([o.summary.mean_jct_s for o in exact])
    rows = [
        (
            "mean JCT against VTC",
            "−57.5 %",
            "−61 %",
            _change(o.to_vtc for o in exact),
            "−60 %",
            _change(o.to_vtc for o in learned),
        ),
        (
            "mean JCT against agent FCFS",
            "−61.1 %",
            "−80 %",
            _change(o.to_agent_fcfs for o in exact),
            "−75 %",
            _change(o.to_agent_fcfs for o in learned),
        ),
        (
            "mean JCT against exact SRJF, everything at once",
            "about equal",
            "better",
            _change(o.to_srjf for o in exact),
            "at most +3 %",
            _change(o.to_srjf for o in learned),
        ),
        (
            "agents no later than under VTC",
            "92 %",
            "99 %",
            _percent(o.no_later for o in exact),
            "97 %",
            _percent(o.no_later for o in learned),
        ),
        ("worst ratio to VTC (of five seeds: mean, range)", "1.26", "1.15", _worst(exact), "1.26", _worst(learned)),
        ("mean JCT at an error of σ = 1 against none", "–", "+25 %", signed(100 * (slower - 1)), "", ""),
        ("the bound held, in all runs of this page", "–", "always", "yes" if held else "**no**", "", ""),
        ("compute-centric cost instead", "+42.3 %", "shown", signed(100 * (dearer - 1)), "", ""),
    ]
    header = ("`paper:SEED:3`, five seeds", "paper", "target, exact", "exact costs", "target, learned", "learned costs")
    return table(header, rows)


def _loads(report: Report) -> str:
    policies = [
        ("justitia", "exact"),
        ("justitia", LEARNED_BY),
        ("srjf@all", "exact"),
        ("srjf", "exact"),
        ("srjf@memory", "exact"),
        ("srjf@memory", LEARNED_BY),
        ("vtc", "exact"),
        ("vtc@memory", "exact"),
        ("justitia@engine", "exact"),
        ("las", "exact"),
        ("sjf", "exact"),
        ("agent-fcfs", "exact"),
        ("fcfs", "exact"),
    ]
    rows = []
    for policy, predictor in policies:
        cells = [policy, BELIEFS[predictor]]
        for load in LOADS:
            found = report.of("paper", policy, predictor, load)
            cells += [
                _jct(found),
                _percent(o.no_later for o in found),
                f"{mean_of_known(o.worst for o in found):.2f}",
            ]
        cells.append(f"{mean([o.summary.preemptions for o in report.of('paper', policy, predictor, 3)]):.0f}")
        rows.append(cells)
    header = ["policy", "costs"]
    for load in LOADS:
        header += [f"load {load}: mean JCT, s", "no later", "worst"]
    return table([*header, "preempted (load 3)"], rows)


BELIEFS = {"exact": "exact", LEARNED_BY: "learned"}
AGAINST = (
    "trace",
    "costs",
    "mean JCT, s",
    "against VTC",
    "agent FCFS",
    "SRJF, all at once",
    "no later than VTC",
    "worst ratio: mean (range)",
)


def _against(name: str, predictor: str, found: Sequence[Outcome]) -> tuple[str, ...]:
    return (
        name,
        BELIEFS[predictor],
        _jct(found),
        _change(o.to_vtc for o in found),
        _change(o.to_agent_fcfs for o in found),
        _change(o.to_srjf for o in found),
        _percent(o.no_later for o in found),
        _worst(found),
    )


def _errors(report: Report) -> str:
    rows = []
    for sigma in SIGMAS:
        cells = [f"{sigma:g}"]
        for policy in ("justitia", "srjf@all"):
            found = report.of("error", policy, None, sigma)
            cells += [
                _jct(found),
                _percent(o.no_later for o in found),
                f"{mean_of_known(o.worst for o in found):.2f}",
            ]
        found = report.of("error", "justitia", None, sigma)
        cells.append(f"{max(o.summary.worst_tag_lateness_iterations / o.summary.bound_iterations for o in found):.2f}")
        rows.append(cells)
    header = (
        "σ",
        "justitia: mean JCT, s",
        "no later",
        "worst",
        "srjf, all at once: mean JCT, s",
        "no later",
        "worst",
        "latest over bound",
    )
    return table(header, rows)


def _betas(report: Report) -> str:
    rows = []
    for beta in BETAS:
        cells = [f"{beta:g}"]
        for predictor in ("exact", LEARNED_BY, "noise:1"):
            found = report.of("beta", "justitia", predictor, beta)
            cells += [
                _jct(found),
                f"{mean([o.summary.preemptions for o in found]):.0f}",
            ]
        rows.append(cells)
    header = (
        "β",
        "exact: mean JCT, s",
        "preempted",
        "learned: mean JCT, s",
        "preempted",
        "noise σ = 1: mean JCT, s",
        "preempted",
    )
    return table(header, rows)


def _elephant(report: Report) -> str:
    rows = []
    for policy, predictor in (("justitia", "exact"), ("justitia", LEARNED_BY), ("srjf@all", "exact"), ("vtc", "exact")):
        name = f"{policy}, learned" if predictor == LEARNED_BY else policy
        by_mice = [mean([o.elephant_jct_s for o in report.of("elephant", policy, predictor, m)]) for m in MICE]
        worst = max(
            last.elephant_jct_s / first.elephant_jct_s
            for first, last in zip(
                report.of("elephant", policy, predictor, MICE[0]),
                report.of("elephant", policy, predictor, MICE[-1]),
                strict=True,
            )
        )
        rows.append(
            [
                name,
                *(f"{value:.0f}" for value in by_mice),
                signed(100 * (by_mice[-1] / by_mice[0] - 1), 0),
                signed(100 * (worst - 1), 0),
            ]
        )
    header = (
        "policy",
        *(f"{m} mice: elephant's JCT, s" for m in MICE),
        f"from {MICE[0]} to {MICE[-1]} mice",
        "largest of the seeds",
    )
    return table(header, rows)


def _tools(report: Report) -> str:
    rows = [_against("tools", p, report.of("tools", "justitia", p)) for p in BELIEFS]
    las, fcfs = (mean([o.summary.mean_jct_s for o in report.of("tools", policy)]) for policy in ("las", "agent-fcfs"))
    more = f"Mean JCT of `las`: {las:.1f} s; of `agent-fcfs`: {fcfs:.1f} s."
    return table(AGAINST, rows) + f"\n\n{more}"


def _prefix(report: Report) -> str:
    rows = []
    for policy, predictor in (
        ("justitia", "exact"),
        ("justitia", LEARNED_BY),
        ("srjf@all", "exact"),
        ("vtc", "exact"),
        ("vtc@memory", "exact"),
        ("agent-fcfs", "exact"),
        ("fcfs", "exact"),
    ):
        found = report.of("prefix", policy, predictor)
        rows.append(
            (
                policy,
                BELIEFS[predictor],
                _percent(o.summary.prefix_hit_rate for o in found),
                _jct(found),
                f"{mean([o.summary.makespan_s for o in found]):.0f}",
                _worst(found),
            )
        )
    header = ("policy", "costs", "prompt tokens found in the cache", "mean JCT, s", "makespan, s", "worst ratio to VTC")
    return table(header, rows)


def _tenants(report: Report) -> str:
    rows = []
    for policy, predictor in (("justitia", "exact"), ("justitia", LEARNED_BY), ("vtc", "exact"), ("srjf@all", "exact")):
        shares = [o.tenants["split"] / sum(o.tenants.values()) for o in report.of("tenants", policy, predictor)]
        rows.append(
            (
                policy,
                BELIEFS[predictor],
                f"{_percent(shares)} ({_percent([min(shares)])} to {_percent([max(shares)])})",
            )
        )
    return table(("policy", "costs", "share of `split` in the work done: mean (range)"), rows)


def _public(report: Report) -> str:
    found = [o for o in report.outcomes if o.job.study == "public"]
    if not found:
        return "(None was given.)"
    by_place: dict[float, str] = {o.job.x: o.job.trace.split(":")[1].removesuffix(".csv") for o in found}
    rows = [_against(by_place[x], p, report.of("public", "justitia", p, x)) for x in sorted(by_place) for p in BELIEFS]
    return table(AGAINST, rows)


def _workload() -> str:
    rows = []
    for mix in ("paper", "light", "heavy"):
        facts = describe(built_in(f"paper:0:3:{mix}") or [])
        for size, of_size in facts["sizes"].items():
            rows.append(
                (
                    mix,
                    size,
                    str(of_size["agents"]),
                    f"{of_size['tasks_mean']:.1f}",
                    f"{of_size['prompt_mean']:.0f}",
                    f"{of_size['output_mean']:.0f}",
                    f"{100 * of_size['cost_share']:.0f} %",
                    f"{of_size['class_mean_error']:.2f}",
                )
            )
    header = (
        "mix",
        "size",
        "agents",
        "tasks",
        "prompt tokens",
        "output tokens",
        "share of all work",
        "error of a class's mean",
    )
    return table(header, rows)


# Pictures


def pictures(report: Report, directory: Path) -> None:
    def line(
        study: str, policy: str, predictor: str | None, values: Iterable[float], of: Callable[[Outcome], float]
    ) -> list[tuple[float, float, float, float]]:
        points = []
        for x in values:
            found = [of(o) for o in report.of(study, policy, predictor, x)]
            points.append((x, mean(found), min(found), max(found)))
        return points

    def jct(outcome: Outcome) -> float:
        return outcome.summary.mean_jct_s

    policies = ("justitia", "vtc", "agent-fcfs", "fcfs", "las", "srjf@all")
    plot.against_load(
        {p: [point[:2] for point in line("paper", p, "exact", LOADS, jct)] for p in policies},
        directory / "replay-load.png",
    )
    plot.against_error(
        {p: line("error", p, None, SIGMAS, jct) for p in ("justitia", "srjf@all")}, directory / "replay-error.png"
    )
    elephants = {
        p: [(int(x), y) for x, y, *_ in line("elephant", p, "exact", MICE, lambda o: o.elephant_jct_s)]
        for p in ("justitia", "srjf@all", "vtc")
    }
    plot.elephant(elephants, directory / "replay-elephant.png")


def runs_pictures(directory: Path) -> None:
    """Those that show every agent of one trace; the runs are made anew."""
    from engine.lab.collector import collector_at_rest
    from engine.lab.profile import load_profile
    from gateway.replay.command import load_trace
    from gateway.replay.predictors import Exact
    from gateway.replay.results import against_vtc, own_release
    from gateway.replay.simulation import Setup, simulate

    agents = load_trace("paper:0:3")
    setup = Setup(profile=load_profile(PROFILE), memory_over_time=True)
    with collector_at_rest():
        runs = [
            simulate(agents, p, own_release(p), Exact(), setup, predictor="exact")
            for p in ("justitia", "vtc", "agent-fcfs", "fcfs", "las", "srjf")
        ]
    runs = against_vtc(runs)
    plot.jct_distribution(runs, directory / "replay-jct.png")
    plot.ratio_to_vtc(runs, directory / "replay-ratio.png")
    for run in runs[:2]:
        plot.memory_over_time(
            run,
            directory / f"replay-memory-{run.policy}.png",
            capacity_tokens=setup.profile.kv_blocks * setup.profile.block_size,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("public", nargs="*", help="public traces (CSV), for their arrivals")
    parser.add_argument("--from-json", action="store_true", help="page and pictures only, from the last run's JSON")
    parser.add_argument(
        "--only-learned", action="store_true", help="run what learns, and keep the last run's JSON of all else"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results = DOCS / "results" / "replay.json"
    if not options.from_json:
        todo, stand = list(jobs(options.public)), []
        if options.only_learned:
            last = msgspec.json.decode(results.read_bytes(), type=Report)
            stand = [outcome for outcome in last.outcomes if outcome.job.predictor not in LEARNED]
            learned = {job.trace for job in todo if job.predictor in LEARNED}
            vtc = ("vtc", "exact")
            todo = [
                job
                for job in todo
                if job.predictor in LEARNED or (job.trace in learned and (job.policy, job.predictor) == vtc)
            ]
        rows = list(track(run_all(todo, options.processes), total=len(todo), console=Console(stderr=True)))
        if options.only_learned:  # who is compared with only has run to be compared with
            found = [outcome for outcome in compare(rows, stand) if outcome.job.predictor in LEARNED]
        else:
            found = compare(rows)
        write([*stand, *found], results)
    report = msgspec.json.decode(results.read_bytes(), type=Report)
    pictures(report, DOCS)
    runs_pictures(DOCS)
    (DOCS / "replay.md").write_text(page(report))


def write(outcomes: Sequence[Outcome], path: Path) -> None:
    report = Report({"machine": machine(), "versions": versions(), "profile": PROFILE}, list(outcomes))
    path.write_bytes(b"\n".join(_lines(report)))


def _lines(report: Report) -> Iterator[bytes]:
    """JSON with a line for each run, so that changes can be read."""
    yield b'{"environment":' + msgspec.json.encode(report.environment) + b',"outcomes":['
    yield b",\n".join(msgspec.json.encode(outcome) for outcome in report.outcomes)
    yield b"]}\n"


if __name__ == "__main__":
    main()
