"""The studies of the replay report: which trace, under which policy, with which belief, and what is compared.

Each run is a `Job`, and its outcome a `Row`. All that the report says follows from rows, and rows are what it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from typing import Any

import msgspec

from engine.lab.collector import collector_at_rest
from engine.lab.profile import load_profile
from gateway.replay.command import begin_alike, load_past, load_trace
from gateway.replay.predictors import COSTS, LEARNED, Believed, beliefs
from gateway.replay.results import ReleaseName, Summary, own_release
from gateway.replay.simulation import Setup, simulate

PROFILE = "llama-7b-a100"
SEEDS = range(5)
LOADS = (1, 2, 3)
SIGMAS = (0.0, 0.25, 0.5, 1.0, 2.0)
BETAS = (0.8, 0.9, 0.95, 1.0, 1.05, 1.1)
MICE = (100, 300, 500)
FEWER_SEEDS = range(3)  # where runs differ little

# What stands for learned costs on the page.
LEARNED_BY = "xgboost"
JUSTITIA = (("justitia", "exact"), ("justitia", LEARNED_BY))
FIELD = (("vtc", "exact"), ("agent-fcfs", "exact"), ("srjf@all", "exact"))


class Job(msgspec.Struct, frozen=True):
    """`x`: what the study varies. `policy`: NAME or NAME@RELEASE."""

    study: str
    trace: str
    seed: int
    x: float
    policy: str
    predictor: str
    cost: str = "memory"
    beta: float = 1.0


class Row(msgspec.Struct, frozen=True):
    """A job and what came of it. The comparisons are with the runs of the same trace with exact costs: mean JCT as a ratio, and
    agent by agent against vtc. `tenants`: work done for each while all of them had work."""

    job: Job
    summary: Summary
    jcts: list[float]
    elephant_jct_s: float
    tenants: dict[str, float]


def jobs(public: Sequence[str] = ()) -> Iterator[Job]:
    """`public`: paths of public traces, for their arrivals."""
    everybody = (
        *JUSTITIA,
        ("justitia", "ladder"),
        *FIELD,
        ("fcfs", "exact"),
        ("las", "exact"),
        ("sjf", "exact"),
        ("srjf", "exact"),
    )
    with_release = (
        ("srjf@memory", "exact"),
        ("srjf@memory", LEARNED_BY),
        ("vtc@memory", "exact"),
        ("justitia@engine", "exact"),
    )
    for seed in SEEDS:
        for load in LOADS:
            yield from _each("paper", f"paper:{seed}:{load}", seed, load, (*everybody, *with_release))
        for place, mix in enumerate(("light", "heavy")):
            yield from _each(mix, f"paper:{seed}:3:{mix}", seed, place, (*JUSTITIA, *FIELD))
        for sigma in SIGMAS:
            noisy = tuple((policy, f"noise:{sigma:g}") for policy in ("justitia", "srjf@all"))
            yield from _each("error", f"paper:{seed}:3", seed, sigma, noisy)
        yield Job("compute", f"paper:{seed}:3", seed, 0, "justitia", "exact", cost="compute")
        for mice in MICE:
            rivals = (("vtc", "exact"), ("srjf@all", "exact"))
            yield from _each("elephant", f"elephant:{mice}:{seed}", seed, mice, (*JUSTITIA, *rivals))
        yield from _each("tools", f"tools:{seed}", seed, 0, (*JUSTITIA, *FIELD, ("las", "exact")))
        yield from _each(
            "prefix", f"prefix:{seed}", seed, 0, (*JUSTITIA, *FIELD, ("vtc@memory", "exact"), ("fcfs", "exact"))
        )
        yield from _each("tenants", f"tenants:{seed}", seed, 0, (*JUSTITIA, ("vtc", "exact"), ("srjf@all", "exact")))
    for seed in FEWER_SEEDS:
        for beta, predictor in itertools.product(BETAS, ("exact", LEARNED_BY, "noise:1")):
            yield Job("beta", f"paper:{seed}:3", seed, beta, "justitia", predictor, beta=beta)
        for place, path in enumerate(public):
            yield from _each("public", f"public:{path}:{seed}:3", seed, place, (*JUSTITIA, *FIELD))


def run_all(todo: Sequence[Job], processes: int) -> Iterator[Row]:
    """Rows in the order of the jobs."""
    if processes == 1:
        yield from map(run_one, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_one, todo)


def run_one(job: Job) -> Row:
    agents = load_trace(job.trace)
    policy, _, release = job.policy.partition("@")
    cost = COSTS[job.cost]
    setup = Setup(
        profile=load_profile(PROFILE),
        cost=cost,
        beta=job.beta,
        prefix_caching=begin_alike(agents),
    )
    chosen: ReleaseName = release or own_release(policy)  # type: ignore[assignment]
    with collector_at_rest():
        run = simulate(agents, policy, chosen, _believed(job), setup, predictor=job.predictor)
    # Until the first of the tenants has nothing left, both are backlogged.
    tenants = sorted({agent.tenant for agent in run.agents})
    until_s = min(max(a.finish_s for a in run.agents if a.tenant == tenant) for tenant in tenants)
    done = {t: sum(a.cost for a in run.agents if a.tenant == t and a.finish_s <= until_s) for t in tenants}
    return Row(job, run.summary, [agent.jct_s for agent in run.agents], run.agents[0].jct_s, done)


# What was learned last, and from what: the next job often learns from the same agents.
_learned: dict[tuple[Any, ...], Believed] = {}


def _believed(job: Job) -> Believed:
    cost = COSTS[job.cost]
    if job.predictor not in LEARNED:
        return beliefs(job.predictor, seed=job.seed, cost=cost)
    past = load_past(job.trace, _past_of_public(job))
    key = (job.predictor, job.seed, job.cost, *((agent.agent_id, agent.cost) for agent in past))
    if key not in _learned:
        _learned.clear()
        _learned[key] = beliefs(job.predictor, seed=job.seed, past=past, cost=cost)
    return deepcopy(_learned[key])


def _past_of_public(job: Job) -> str:
    """The agents on a public trace's arrivals are the paper's mix."""
    return ",".join(f"paper:{job.seed + further}:3" for further in (101, 102, 103)) if job.study == "public" else ""


def _each(study: str, trace: str, seed: int, x: float, what: Sequence[tuple[str, str]]) -> Iterator[Job]:
    for policy, predictor in what:
        yield Job(study, trace, seed, x, policy, predictor)
