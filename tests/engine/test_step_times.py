"""What a token of a prompt costs, from when steps are scheduled."""

from __future__ import annotations

import random

import pytest

from engine.scheduler.step_times import StepTimes

pytestmark = pytest.mark.vllm


def test_a_prompts_token_in_iterations() -> None:
    """A step takes 20 ms, and 0.1 ms more for each token of a prompt; every tenth has 512 of them."""
    dice = random.Random(1)
    times, now_s, total_s = StepTimes(), 0.0, 0.0
    for i in range(2000):
        tokens = 512 if i % 10 == 0 else 0
        times.step(now_s, tokens)
        took_s = (0.02 + 0.0001 * tokens) * dice.uniform(0.9, 1.1)
        now_s, total_s = now_s + took_s, total_s + took_s
    assert times.prefill_iterations == pytest.approx(0.0001 / (total_s / 2000), rel=0.2)


def test_nothing_is_known_before_both_kinds_were_seen() -> None:
    times = StepTimes()
    for now_s in (0.0, 0.02, 0.04):
        times.step(now_s, 0)
        assert times.prefill_iterations == 0


def test_a_pause_is_no_long_step() -> None:
    times = StepTimes()
    for i in range(50):
        times.step(0.02 * i, 0)
    times.step(1.0, 1000)
    times.pause()
    times.step(500.0, 0)
    times.step(500.02, 0)
    assert times.prefill_iterations == 0
