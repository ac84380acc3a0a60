"""Training: a challenger learns from the older agents, and is judged on the newest against the champion.

The model that orders the newest agents better at their first task takes over, for that is what the fair queue needs; of two
that order alike, the one with the smaller error. A challenger that wins learns once more, from all agents. How far the
truth lies from what is said is taken from agents that were left out in turn (cross-conformal prediction; Vovk, 2015): the
newest alone are too few for a ninth decile.

That a class has changed is the ladder's to notice: its guesses are what a model corrects. Newer agents do not weigh more:
that was no better after a change, and worse without one.

The same agents, seed and number of threads make the same model. It needs XGBoost, of the extra `train`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from predictor.dataset import Dataset, dataset
from predictor.evaluate import Quality, quality
from predictor.features import COLUMNS
from predictor.model import OUTPUTS, Boosted, Calibration, Settings, Told, guesses
from predictor.trees import Trees, grown
from predictor.types import FinishedAgent

if TYPE_CHECKING:
    import xgboost

HELD_OUT_SHARE = 0.2
FEWEST_AGENTS, FEWEST_HELD_OUT = 60, 12
# Each of so many parts of the agents is left out in turn; where they are many, one is enough.
PARTS, MANY_AGENTS = 4, 5_000
# Of fewer rows than these, a ninth decile is not looked at apart.
FEWEST_FOR_P90 = 30
# The mean of a log-normal of σ = 1 is e^0.5 medians: what is wider is an error, not a spread.
MOST_SMEARING = 0.5

Floats = NDArray[np.floating[Any]]


class TooFewAgents(ValueError):
    """There is not enough to learn from, in words."""


class Report(msgspec.Struct, frozen=True):
    """agents, rows: that can be learned from; left_out: rows that cannot; held_out: agents judged on, at their first task.
    champion: None, if there is none. promote: the challenger takes over; reason: why, or why not."""

    agents: int
    rows: int
    left_out: int
    held_out: int
    challenger: Quality
    champion: Quality | None
    ladder: Quality
    promote: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Trained:
    """model: the challenger; if it is promoted, trained anew on all agents."""

    model: Boosted
    report: Report


def train(
    agents: Sequence[FinishedAgent],
    champion: Boosted | None = None,
    *,
    unseen: int | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    nthread: int = 1,
    created: str = "",
) -> Trained:
    """agents: in the order in which they finished. unseen: how many of the newest the champion has not learned from; judged is
    on no others, for those it knows by heart. nthread: where others are at work too, two wait for each other most of the time.
    created: see `Told`. Raises `TooFewAgents`."""
    settings = settings or Settings()
    known = dataset(agents)
    count = len(known.classes)
    if count < FEWEST_AGENTS:
        raise TooFewAgents(f"{count} agents with rows of this version; {FEWEST_AGENTS} are needed")
    held_out = round(HELD_OUT_SHARE * count)
    if champion is not None and unseen is not None:
        # Not all of them have rows.
        held_out = min(held_out, len(dataset(agents[max(0, len(agents) - unseen) :]).classes))
    older, newest = known.split(held_out)
    held_out = newest.first_tasks().rows
    if held_out < FEWEST_HELD_OUT:
        raise TooFewAgents(f"{held_out} new agents to judge by; {FEWEST_HELD_OUT} are needed")

    left_out = _left_out(older, settings, seed, nthread)
    challenger = Boosted(
        _boosted(older, settings, seed, nthread),
        Told(len(np.unique(older.agent)), older.rows, created, settings, calibration([left_out])),
    )
    report = _report(known, newest, held_out, challenger, champion)
    told = msgspec.structs.replace(challenger.told, metrics=_metrics(report.challenger))
    if not report.promote:
        return Trained(Boosted(challenger.trees, told), report)
    judged = (newest, challenger.medians(newest.x))
    told = msgspec.structs.replace(told, agents=count, rows=known.rows, calibration=calibration([left_out, judged]))
    return Trained(Boosted(_boosted(known, settings, seed, nthread), told), report)


def calibration(judged: Sequence[tuple[Dataset, Floats]]) -> Calibration:
    """Of agents, and the medians of models that have not learned from them, shape (rows, OUTPUTS)."""
    weights = np.concatenate([data.weight for data, _ in judged])
    costs = np.concatenate([data.log_cost - medians[:, 0] for data, medians in judged])
    first = np.concatenate([data.task == 1 for data, _ in judged])
    overall = _ninth_decile(costs, weights)
    p90_first, p90_later = (
        _ninth_decile(costs[stage], weights[stage]) if stage.sum() >= FEWEST_FOR_P90 else overall
        for stage in (first, ~first)
    )
    decoded = np.concatenate([np.expm1(data.log_decode) for data, _ in judged])
    said = np.concatenate([np.expm1(medians[:, 1]) for _, medians in judged])
    smearing = np.log(max(1.0, weights @ decoded) / max(1.0, weights @ said))
    return Calibration(p90_first, p90_later, float(np.clip(smearing, 0.0, MOST_SMEARING)))


def _left_out(data: Dataset, settings: Settings, seed: int, nthread: int) -> tuple[Dataset, Floats]:
    """Agents, and what models say of them that have learned from the others."""
    chosen, medians = [], []
    for part in range(PARTS if len(data.classes) < MANY_AGENTS else 1):
        of_part = data.agent % PARTS == part
        model = Boosted(_boosted(data.where(~of_part), settings, seed, nthread), Told(0, 0))
        chosen.append(np.flatnonzero(of_part))
        medians.append(model.medians(data.x[of_part]))
    return data.where(np.concatenate(chosen)), np.concatenate(medians)


def _boosted(data: Dataset, settings: Settings, seed: int, nthread: int) -> Trees:
    import xgboost  # here, as an installation that only asks models does not have it

    targets = np.stack((data.log_cost, data.log_decode), axis=1) - guesses(data.x)
    booster = xgboost.train(
        {
            "objective": "reg:squarederror",
            "base_score": 0.0,  # the ladder's guess
            "tree_method": "hist",
            "max_depth": settings.depth,
            "learning_rate": settings.learning_rate,
            "subsample": settings.rows_share,
            "colsample_bytree": settings.columns_share,
            "seed": seed,
            "nthread": nthread,
        },
        xgboost.QuantileDMatrix(data.x, targets, weight=data.weight, nthread=nthread),
        settings.rounds,
    )
    return trees_of(booster, settings.depth)


def trees_of(booster: xgboost.Booster, depth: int) -> Trees:
    """depth: that none of its trees is deeper than."""
    grown_trees = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]
    return grown(list(zip(grown_trees["tree_info"], grown_trees["trees"], strict=True)), OUTPUTS, depth, len(COLUMNS))


def _report(known: Dataset, newest: Dataset, held_out: int, challenger: Boosted, champion: Boosted | None) -> Report:
    first = newest.first_tasks()
    costs = np.exp(first.log_cost.astype(np.float64))
    classes = [known.classes[agent] for agent in first.agent]

    def judged(model: Boosted) -> Quality:
        said = model.medians(first.x)[:, 0]
        return quality(costs, np.exp(said), np.exp(said + model.told.calibration.cost_p90_first), classes)

    ladder = quality(costs, np.exp(guesses(first.x)[:, 0]), None, classes)
    of_challenger = judged(challenger)
    of_champion = None if champion is None else judged(champion)
    promote, reason = _verdict(
        of_challenger, of_champion or ladder, "the ladder" if champion is None else champion.name
    )
    return Report(
        len(known.classes), known.rows, known.left_out, held_out, of_challenger, of_champion, ladder, promote, reason
    )


def _verdict(challenger: Quality, incumbent: Quality, name: str) -> tuple[bool, str]:
    ours, theirs = challenger.tau or 0.0, incumbent.tau or 0.0
    if ours != theirs:
        return ours > theirs, f"Kendall's tau {ours:.3f} against {theirs:.3f} of {name}"
    ours, theirs = challenger.median_error, incumbent.median_error
    return ours < theirs, f"equal order; median error {ours:.3f} against {theirs:.3f} of {name}"


def _ninth_decile(residuals: Floats, weights: Floats) -> float:
    """The smallest that so many are at most as large as, the one to come counted among those above it."""
    if not len(residuals):
        return 0.0
    order = np.argsort(residuals)
    reached = np.cumsum(weights[order])
    needed = 0.9 * (reached[-1] + weights.max())
    return max(0.0, float(residuals[order][min(len(order) - 1, np.searchsorted(reached, needed))]))


def _metrics(challenger: Quality) -> dict[str, float]:
    told = {name: getattr(challenger, name) for name in ("median_error", "mean_error", "tau", "tau_within", "coverage")}
    return {name: value for name, value in told.items() if value is not None}
