"""How late an agent may be, with what a run has shown of its engine. The derivation is in `docs/explanation/bound.md`.

A finish is at most L + (R + D + E) / M iterations after virtual time has reached the agent's largest finish tag:

    L   the longest that a task was at the engine                                       [iterations]
    R   the most work that was left of what was in flight                               [token·iterations]
    D   the most that the engine fell behind M while tasks waited all along             [token·iterations]
    E   over the agents, how much more was in flight of each than had been predicted    [token·iterations]
"""

from __future__ import annotations

import math


class Bound:
    """Fed with each release, each end, and what was done in each iteration."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[int, str, float]] = {}  # by task: released when, agent, cost more than predicted
        self._longest = 0
        self._left = self._most_left = 0.0
        self._behind = self._most_behind = 0.0
        self._under: dict[str, float] = {}
        self._most_under: dict[str, float] = {}
        self._least_capacity = math.inf

    def released(self, iteration: int, key: int, agent_id: str, cost: float, predicted: float) -> None:
        under = max(0.0, cost - predicted)
        self._since[key] = iteration, agent_id, under
        self._left += cost
        if under:
            self._under[agent_id] = self._under.get(agent_id, 0.0) + under
            self._most_under[agent_id] = max(self._most_under.get(agent_id, 0.0), self._under[agent_id])

    def ended(self, iteration: int, key: int) -> None:
        since, agent_id, under = self._since.pop(key)
        self._longest = max(self._longest, iteration - since)
        if under:
            self._under[agent_id] -= under

    def served(self, work: float, capacity: float | None, shared: float = 0.0) -> None:
        """One iteration's work. `capacity`: M, or None when nothing waits. `shared`: the part of the work that is counted for
        several tasks, and held once."""
        self._most_left = max(self._most_left, self._left)
        self._left -= work
        if capacity is None:
            self._behind = 0.0
        else:
            self._least_capacity = min(self._least_capacity, capacity)
            self._behind = max(0.0, self._behind + capacity - (work - shared))
            self._most_behind = max(self._most_behind, self._behind)

    def terms(self) -> dict[str, float]:
        return {
            "L": float(self._longest),
            "R": self._most_left,
            "D": self._most_behind,
            "E": sum(self._most_under.values()),
            "M": self._least_capacity if math.isfinite(self._least_capacity) else 0.0,
        }

    def iterations(self) -> float:
        terms = self.terms()
        work = terms["R"] + terms["D"] + terms["E"]
        return terms["L"] + (work / terms["M"] if terms["M"] else 0.0)
