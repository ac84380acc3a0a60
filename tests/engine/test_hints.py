from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.hints import INT64_MAX, INT64_MIN, Hints, from_fields, to_fields, to_tag

tags = st.integers(INT64_MIN, INT64_MAX)


@given(tags, st.text(max_size=255), st.integers(0, INT64_MAX))
def test_there_and_back(tag: int, agent: str, task: int) -> None:
    hints = Hints(tag, agent, task)
    assert from_fields(*to_fields(hints)) == hints


@given(tags, tags)
def test_the_smaller_tag_comes_first(one: int, other: int) -> None:
    assert (Hints(one, "z", 9) < Hints(other, "a", 1)) == (one < other)


@pytest.mark.parametrize("xargs", [None, {}, {"kv_transfer_params": {"x": 1}}])
def test_a_request_from_elsewhere(xargs: dict[str, object] | None) -> None:
    assert from_fields(7, xargs) == Hints(7, "", -1)


def test_nonsense_in_the_task_is_no_task() -> None:
    assert from_fields(0, {"justitia_agent": 5, "justitia_task": "first"}) == Hints(0, "5", -1)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_tag_is_an_int64(rank: float) -> None:
    tag = to_tag(rank)
    assert INT64_MIN <= tag <= INT64_MAX
    if abs(rank) < 2**62:
        assert tag == math.trunc(rank)
