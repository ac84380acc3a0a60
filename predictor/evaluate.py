"""How good predictions of agents' costs are: pure functions of what was predicted and what was true.

Order counts first: the fair queue serves by it. Kendall's τ is the share of pairs in the right order minus that of those in
the wrong one; *within* classes it leaves out what knowing the class alone would earn. Errors are relative, |predicted −
true| / true: their median and, as in the paper, their mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from predictor.accuracy import Numbers, errors, order

NO_CLASS = ""


class ClassQuality(msgspec.Struct, frozen=True):
    """tau: None where there is no order: of one agent, or of equal costs. coverage: share of agents that cost at most P90."""

    agents: int
    median_error: float
    mean_error: float
    tau: float | None
    coverage: float | None = None


class Quality(msgspec.Struct, frozen=True):
    """tau_within: mean of the classes that have one, each as much as the other. Agents without a class stand under ""."""

    agents: int
    median_error: float
    mean_error: float
    tau: float | None
    tau_within: float | None
    coverage: float | None
    classes: dict[str, ClassQuality]


def quality(
    costs: Numbers, said: Numbers, said_p90: Numbers | None = None, classes: Sequence[str | None] | None = None
) -> Quality:
    """costs: true, above 0; said, said_p90: predicted; each of one agent. All of one shape (agents,), at least one; in any unit
    that they share. Raises ValueError for shapes that differ, and for what is not finite."""
    p90s = said if said_p90 is None else said_p90
    of_class = [NO_CLASS] * len(costs) if classes is None else [name or NO_CLASS for name in classes]
    if not len(costs) == len(said) == len(p90s) == len(of_class) or not len(costs):
        raise ValueError(f"{len(costs)} costs, {len(said)} predictions, {len(p90s)} P90, {len(of_class)} classes")
    if not (np.isfinite(costs).all() and np.isfinite(said).all() and np.isfinite(p90s).all() and costs.min() > 0):
        raise ValueError("costs and predictions must be finite, and costs above 0")
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(of_class):
        places[name].append(place)

    def part(chosen: list[int]) -> ClassQuality:
        return _quality(costs[chosen], said[chosen], None if said_p90 is None else said_p90[chosen])

    by_class = {name: part(places[name]) for name in sorted(places)}
    taus = [one.tau for one in by_class.values() if one.tau is not None]
    overall = part(list(range(len(costs))))
    return Quality(
        overall.agents,
        overall.median_error,
        overall.mean_error,
        overall.tau,
        sum(taus) / len(taus) if taus else None,
        overall.coverage,
        by_class,
    )


def _quality(costs: Numbers, said: Numbers, said_p90: Numbers | None) -> ClassQuality:
    of_agents = errors(costs, said)
    return ClassQuality(
        len(costs),
        float(np.median(of_agents)),
        float(np.mean(of_agents)),
        order(costs, said),
        None if said_p90 is None else float(np.mean(costs <= said_p90)),
    )
