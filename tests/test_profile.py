"""The Hypothesis profile that all property tests run with."""

from __future__ import annotations

import hypothesis


def test_an_example_may_take_as_long_as_a_busy_machine_needs() -> None:
    assert hypothesis.settings().deadline is None
