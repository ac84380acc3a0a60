"""Finished agents as matrices: what models are trained on, and judged by.

The rows are those that serving made (`features.row`), never made anew. Rows of another schema, of another size, or of agents
that cannot have cost what they say are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from predictor.features import COLUMN, COLUMNS, GUESS_COLUMNS, SCHEMA
from predictor.types import FinishedAgent

# With these, 100,000 agents take 1.7 GB and 200 s of one core.
ROWS_PER_AGENT = 8
MAX_ROWS = 100_000
# Of a logarithm: what `features.row` makes is at most that.
MOST_GUESS = 70.0

# log(1 + tasks) of more than anybody sends.
_MOST_TASKS = 20.0
_ROW_BYTES = len(COLUMNS) * np.dtype(np.float32).itemsize


@dataclass(frozen=True, slots=True)
class Dataset:
    """One row for an arrival; the rows of an agent stand together, and agents in the order in which they finished.

    x: shape (rows, len(COLUMNS)), NaN for unknown. log_cost: log(1 + cost) of the row's agent, in token·iterations. log_decode:
    log(1 + tokens) of a sequence of the row's task. agent: which one of `classes`. task: which of its agent's tasks arrived,
    from 1, as the row says. weight: the rows of an agent share 1. left_out: rows that are not used.
    """

    x: NDArray[np.float32]
    log_cost: NDArray[np.float32]
    log_decode: NDArray[np.float32]
    agent: NDArray[np.int32]
    task: NDArray[np.int32]
    weight: NDArray[np.float32]
    classes: tuple[str | None, ...]
    left_out: int = 0

    @property
    def rows(self) -> int:
        return len(self.x)

    def first_tasks(self) -> Dataset:
        """The rows of agents' first tasks only."""
        return self.where(self.task == 1)

    def split(self, newest: int) -> tuple[Dataset, Dataset]:
        """All but the newest agents, and those. Their numbers in `agent` stay."""
        border = len(self.classes) - newest
        return self.where(self.agent < border), self.where(self.agent >= border)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Dataset:
        return Dataset(
            self.x[chosen],
            self.log_cost[chosen],
            self.log_decode[chosen],
            self.agent[chosen],
            self.task[chosen],
            self.weight[chosen],
            self.classes,
        )


class _Kept(NamedTuple):
    row: bytes
    log_cost: float
    log_decode: float
    agent: int
    weight: float


def dataset(agents: Sequence[FinishedAgent], rows_per_agent: int = ROWS_PER_AGENT) -> Dataset:
    """rows_per_agent: at most; the first one, and others evenly over its life. Fewer, where all would be over `MAX_ROWS`."""
    limit = max(1, min(rows_per_agent, MAX_ROWS // max(1, len(agents))))
    kept: list[_Kept] = []
    classes: list[str | None] = []
    left_out = 0
    for agent in agents:
        stored = [place for place, task in enumerate(agent.tasks) if task.row]
        fitting = [place for place in stored if agent.schema == SCHEMA and len(agent.tasks[place].row) == _ROW_BYTES]
        cost = agent.cost
        if not 0 < cost < math.inf:
            fitting = []
        left_out += len(stored) - len(fitting)
        if not fitting:
            continue
        chosen = _spread(fitting, limit)
        for place in chosen:
            task = agent.tasks[place]
            decode = task.decode_tokens / max(1, task.sequences)
            kept.append(_Kept(task.row, math.log1p(cost), math.log1p(max(0.0, decode)), len(classes), 1 / len(chosen)))
        classes.append(agent.agent_class)
    x = np.frombuffer(b"".join(one.row for one in kept), np.float32).reshape(len(kept), len(COLUMNS)).copy()
    # Rows that were damaged where they were stored.
    x[np.isinf(x)] = np.nan
    # Not by their places among the agent's tasks: of those that came at once, any may stand first.
    tasks_arrived = np.clip(np.nan_to_num(x[:, COLUMN["tasks_arrived"]].astype(np.float64)), 0.0, _MOST_TASKS)
    guesses = x[:, [COLUMN[name] for name in GUESS_COLUMNS]]
    usable: NDArray[np.bool_] = np.all((guesses >= 0) & (guesses <= MOST_GUESS), axis=1)
    made = Dataset(
        x,
        np.array([one.log_cost for one in kept], np.float32),
        np.array([one.log_decode for one in kept], np.float32),
        np.array([one.agent for one in kept], np.int32),
        np.rint(np.expm1(tasks_arrived)).astype(np.int32),
        np.array([one.weight for one in kept], np.float32),
        tuple(classes),
        left_out + int(np.count_nonzero(~usable)),
    )
    return made if usable.all() else replace(made.where(usable), left_out=made.left_out)


def _spread(places: list[int], limit: int) -> list[int]:
    if len(places) <= limit:
        return places
    return [places[at] for at in np.linspace(0, len(places) - 1, limit).round().astype(int)]
