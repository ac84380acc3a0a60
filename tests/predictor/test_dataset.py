"""From finished agents to matrices: the rows that were served, and no others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from predictor import dataset as module
from predictor.dataset import dataset
from predictor.features import COLUMN, COLUMNS
from predictor.types import FinishedAgent, FinishedTask
from tests.predictor.made import Gateway, replaced_rows


def test_rows_are_those_that_were_served() -> None:
    agents = Gateway().serve(12)
    made = dataset(agents)
    served = [task.row for agent in agents for task in agent.tasks]
    assert made.x.tobytes() == b"".join(served)
    assert made.rows == len(served) and made.left_out == 0
    assert made.classes == tuple(agent.agent_class for agent in agents)
    np.testing.assert_array_equal(made.task, [n for agent in agents for n in range(1, len(agent.tasks) + 1)])
    np.testing.assert_array_equal(made.x[:, COLUMN["tasks_arrived"]], np.log1p(made.task).astype(np.float32))
    for number, agent in enumerate(agents):
        of_agent = made.agent == number
        assert made.weight[of_agent].sum() == pytest.approx(1)
        assert made.log_cost[of_agent] == pytest.approx(math.log1p(agent.cost))
        decodes = [math.log1p(task.decode_tokens) for task in agent.tasks]
        np.testing.assert_allclose(made.log_decode[of_agent], decodes, rtol=1e-6)


def test_a_decode_length_is_of_one_sequence() -> None:
    (agent,) = Gateway().serve(1)
    row = agent.tasks[0].row
    of_four = FinishedAgent("a", "t", [FinishedTask(40, 40, 0, 120, sequences=4, row=row)], agent.schema)
    assert dataset([of_four]).log_decode[0] == pytest.approx(math.log1p(30))


def test_other_schemas_sizes_and_costs_are_left_out_and_counted() -> None:
    agents = Gateway().serve(5)
    other_schema = FinishedAgent("a", "t", agents[0].tasks, "1-other")
    other_size = replaced_rows(agents[1:2], lambda row: row[:-4])[0]
    row = agents[2].tasks[0].row
    absurd = [
        FinishedAgent("a", "t", [FinishedTask(4, 1, 0, 1, held=held, row=row)], agents[0].schema)
        for held in (math.nan, math.inf, 0.0)
    ]
    without_rows = FinishedAgent("a", "t", [FinishedTask(4, 1, 0, 1)], agents[0].schema)
    made = dataset([other_schema, other_size, *absurd, without_rows, *agents[3:]])
    assert made.left_out == len(agents[0].tasks) + len(agents[1].tasks) + 3
    assert made.classes == tuple(agent.agent_class for agent in agents[3:])
    assert dataset([without_rows]).x.shape == (0, len(COLUMNS))


def test_infinities_of_a_damaged_row_are_unknown() -> None:
    guesses = [COLUMN["agent_guess"], COLUMN["decode_guess"]]

    def damaged(row: bytes) -> bytes:
        values = np.full(len(COLUMNS), np.inf, np.float32)
        values[guesses] = np.frombuffer(row, np.float32)[guesses]
        return values.tobytes()

    x = dataset(replaced_rows(Gateway().serve(1), damaged)).x
    assert np.isnan(np.delete(x, guesses, axis=1)).all() and np.isfinite(x[:, guesses]).all()


@pytest.mark.parametrize("guess", [math.nan, math.inf, -1.0, 3e38])
def test_a_row_without_a_guess_is_left_out(guess: float) -> None:
    def damaged(row: bytes) -> bytes:
        values = np.frombuffer(row, np.float32).copy()
        values[COLUMN["agent_guess"]] = guess
        return values.tobytes()

    agents = Gateway().serve(4)
    made = dataset([*replaced_rows(agents[:1], damaged), *agents[1:]])
    assert made.left_out == len(agents[0].tasks)
    assert set(made.agent) == {1, 2, 3}


def test_rows_of_an_agent_are_limited_to_some_over_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    (agent,) = Gateway().serve(1)
    row = agent.tasks[0].row
    long = FinishedAgent("a", "t", [FinishedTask(4, 1, 0, 1, row=arrived(row, n)) for n in range(1, 42)], agent.schema)
    assert dataset([long], rows_per_agent=5).task.tolist() == [1, 11, 21, 31, 41]
    assert dataset([long], rows_per_agent=1).task.tolist() == [1]
    monkeypatch.setattr(module, "MAX_ROWS", 6)
    assert dataset([long] * 3).task.tolist() == [1, 41] * 3
    assert dataset([long] * 9).task.tolist() == [1] * 9


def test_which_task_it_is_says_its_row_not_its_place() -> None:
    """Of those that arrive at once, the first to end may stand first."""
    (agent,) = Gateway().serve(1)
    row = agent.tasks[0].row
    swapped = FinishedAgent("a", "t", [FinishedTask(4, 1, 0, n, row=arrived(row, n)) for n in (2, 1)], agent.schema)
    made = dataset([swapped])
    assert made.task.tolist() == [2, 1]
    assert made.first_tasks().log_decode == pytest.approx(math.log1p(1))


def arrived(row: bytes, tasks: int) -> bytes:
    """It, as if so many tasks of its agent had arrived with it."""
    values = np.frombuffer(row, np.float32).copy()
    values[COLUMN["tasks_arrived"]] = math.log1p(tasks)
    return values.tobytes()


def test_the_newest_are_split_off() -> None:
    made = dataset(Gateway().serve(10))
    older, newest = made.split(3)
    assert set(older.agent) == set(range(7)) and set(newest.agent) == {7, 8, 9}
    assert older.rows + newest.rows == made.rows
    assert newest.first_tasks().rows == 3
