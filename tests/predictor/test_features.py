"""What a row says of a task, and that it says the same wherever it is made."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.features import (
    COLUMN,
    COLUMNS,
    HISTORY_COLUMNS,
    SKETCH_COLUMNS,
    Row,
    columns_of,
    is_kept,
    numbers,
    row,
    sketch,
)
from predictor.learned import Answer, Learned
from predictor.types import AgentProgress, TaskContent, TaskPrediction


def column(of: TaskContent, name: str) -> float:
    return float(columns_of(sketch(of))[SKETCH_COLUMNS.index(name)])


def words(text: str) -> list[float]:
    made = columns_of(sketch(TaskContent(len(text), text=text.encode())))
    return [float(value) for name, value in zip(SKETCH_COLUMNS, made, strict=True) if name.startswith("text_")]


def test_lengths_are_logarithms_and_what_is_not_known_is_no_number() -> None:
    content = TaskContent(400, b"Be brief.", b"Why?", messages=2, tools=3, tool_bytes=50, sequences=4)
    assert column(content, "prompt_bytes") == pytest.approx(math.log1p(400))
    assert column(content, "tools") == 3
    assert column(content, "sequences") == pytest.approx(math.log1p(4))
    assert math.isnan(column(content, "max_tokens"))
    assert column(TaskContent(1, max_tokens=99), "max_tokens") == pytest.approx(math.log1p(99))


def test_numbers_and_signs_in_a_text_are_seen() -> None:
    content = TaskContent(99, text=b"Merge 17 files, in 300 words at most. Part 2 of 17?\n- one\n- two\n1. three")
    assert column(content, "counted") == pytest.approx(math.log1p(17))
    assert column(content, "parts") == pytest.approx(math.log1p(17))
    assert column(content, "asked_words") == pytest.approx(math.log1p(300))
    assert column(content, "largest_number") == pytest.approx(math.log1p(300))
    assert column(content, "items") == pytest.approx(math.log1p(3))
    assert column(content, "questions") == pytest.approx(math.log1p(1))
    assert math.isnan(column(TaskContent(9, text=b"no number"), "largest_number"))
    assert math.isnan(column(TaskContent(9, text=b"v1.25 a7 12345678901"), "largest_number"))


def test_items_are_found_after_empty_lines() -> None:
    assert column(TaskContent(9, text=b"a\n\n  - one\r\n\t2) two\n \n\n* three\n-none"), "items") == pytest.approx(
        math.log1p(3)
    )


def test_words_count_whatever_their_case_and_place() -> None:
    assert words("Prove it") == words("it: PROVE!")
    assert words("Prove it") != words("prove that")
    assert sum(words("")) == 0


def test_only_the_edges_of_a_long_text_are_read() -> None:
    begin, end = "Summarise. " * 300, " In one line." * 300
    one, other = (
        TaskContent(9, text=f"{begin}{'x y ' * 1000}{end}".encode()),
        TaskContent(9, text=f"{begin}{end}".encode()),
    )
    np.testing.assert_array_equal(columns_of(sketch(one)), columns_of(sketch(other)))


def test_a_row_has_the_task_its_opening_and_its_agents_progress() -> None:
    opening, latest = sketch(TaskContent(100)), sketch(TaskContent(900))
    progress = AgentProgress("kind", "t", 5, 3, 1e6, returns=2, expected_tasks=9, opening=opening, latest=latest)
    history = tuple(float(i) for i in range(len(HISTORY_COLUMNS)))
    made = row(latest, opening, numbers(progress, history, 2e6, TaskPrediction(100, 50)))
    assert made.shape == (len(COLUMNS),) and made.dtype == np.float32
    told = {name: float(value) for name, value in zip(COLUMNS, made, strict=True)}
    assert told["task_prompt_bytes"] == pytest.approx(math.log1p(900))
    assert told["opening_prompt_bytes"] == pytest.approx(math.log1p(100))
    assert told["tasks_arrived"] == pytest.approx(math.log1p(5))
    assert told["expected_tasks"] == pytest.approx(math.log1p(9))
    assert told["agent_guess"] == pytest.approx(math.log1p(2e6))
    assert told["decode_guess"] == pytest.approx(math.log1p(50))
    assert [told[name] for name in HISTORY_COLUMNS] == list(history)
    assert len(COLUMN) == len(COLUMNS), "no name twice"


def test_rows_are_kept_ever_more_rarely() -> None:
    assert [n for n in range(1, 70) if is_kept(n)] == [*range(1, 9), 12, 16, 24, 32, 48, 64]
    assert sum(map(is_kept, range(1, 10_001))) < 30


class Listening:
    """A model that notes what it is asked."""

    name = "listening"

    def __init__(self) -> None:
        self.asked: list[Row] = []

    def predict(self, row: Row) -> Answer:
        self.asked.append(row.copy())
        return Answer(1e6, 2e6, 30.0)


def test_what_is_kept_for_training_is_what_the_model_was_asked() -> None:
    model = Listening()
    serving = Learned(model)
    contents = [TaskContent(400, b"Be brief.", b"First question?"), TaskContent(900, text=b"Then 12 more.")]
    first = serving.arrive(contents[0], AgentProgress("kind", "t", expected_tasks=3))
    then = AgentProgress("kind", "t", 1, 1, 500.0, 500.0, expected_tasks=3, opening=first.sketch, latest=first.sketch)
    second = serving.arrive(contents[1], then)
    assert first.sketch is not None and second.sketch is not None
    kept = [row(arrival.sketch, first.sketch, arrival.numbers) for arrival in (first, second)]
    assert [each.tobytes() for each in kept] == [asked.tobytes() for asked in model.asked]
    without = Learned().arrive(contents[0], AgentProgress("kind", "t", expected_tasks=3))
    assert (without.sketch, without.numbers) == (first.sketch, first.numbers), "also while there is no model"


def test_nothing_is_made_of_a_task_that_no_model_asks_for_and_no_row_is_kept_of() -> None:
    asked = [Learned().arrive(TaskContent(400), AgentProgress("kind", "t", arrived)) for arrived in (0, 8, 11)]
    assert [arrival.sketch is not None for arrival in asked] == [True, False, True]
    assert [bool(arrival.numbers) for arrival in asked] == [True, False, True]


@given(
    st.builds(
        TaskContent,
        prompt_bytes=st.integers(0, 10**12),
        system=st.binary(max_size=200),
        text=st.binary(max_size=10_000),
        messages=st.integers(0, 10**6),
        tools=st.integers(0, 10**6),
        tool_bytes=st.integers(0, 10**12),
        max_tokens=st.none() | st.integers(0, 10**18),
        sequences=st.integers(1, 1024),
        structured=st.booleans(),
    ),
    st.floats(0, 1e300),
)
def test_nothing_that_a_client_can_send_makes_an_infinity(content: TaskContent, cost: float) -> None:
    made = sketch(content)
    progress = AgentProgress(None, "t", 10**9, 0, cost, opening=made, latest=made)
    told = row(made, made, numbers(progress, (math.nan,) * len(HISTORY_COLUMNS), cost, TaskPrediction(1, 1)))
    assert not np.isinf(told).any()
