from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.cost import task_cost
from predictor.types import FinishedTask


def test_known_fixture() -> None:
    assert task_cost(10, 4) == 50


@given(st.integers(0, 500), st.integers(0, 200))
def test_is_the_sum_of_what_is_held_in_each_iteration(prompt: int, decode: int) -> None:
    assert task_cost(prompt, decode) == sum(prompt + i for i in range(1, decode + 1))


def test_net_cost_leaves_out_the_cached_part() -> None:
    assert task_cost(100, 10, cached_tokens=90) == task_cost(10, 10)


@pytest.mark.parametrize(("prompt", "decode", "cached"), [(-1, 1, 0), (1, -1, 0), (1, 1, 2), (float("nan"), 1, 0)])
def test_what_is_no_number_of_tokens_is_refused(prompt: float, decode: float, cached: float) -> None:
    with pytest.raises(ValueError, match="not token counts"):
        task_cost(prompt, decode, cached)


def test_sequences_of_one_request_are_charged_each() -> None:
    task = FinishedTask(prompt_bytes=40, prompt_tokens=10, cached_tokens=0, decode_tokens=12, prompts=1, sequences=3)
    assert task.cost == 3 * task_cost(10, 4)
