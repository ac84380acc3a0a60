"""What reports tell of iterations, and a line through iterations whose times are made up. No engine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from engine.lab.profile import load_profile
from engine.link import PROTOCOL, Hello, Report
from gateway.demo.client import TaskResult
from tests.benchmarks import fit
from tests.benchmarks.fit import Heard, Iteration, Others, OtherWork, TooFewSamples

HELLO = Hello(PROTOCOL, "e", "0.32.0", 127, 32, 64, 1024)
CONSTANT_S, PREFILL_S, DECODE_S, KV_S = 4e-3, 15e-6, 80e-6, 0.5e-6


def heard(at_s: float, iteration: int, held: dict[int, tuple[int, int]], preempted: int = 0, life: str = "e") -> Heard:
    report = Report(
        engine_id=life,
        iteration=iteration,
        free_blocks=100,
        running=len(held),
        waiting=0,
        preempted=preempted,
        tasks=list(held),
        kv_tokens=[kv_tokens for kv_tokens, _ in held.values()],
        output_tokens=[output_tokens for _, output_tokens in held.values()],
    )
    return Heard(at_s, report)


def made_up(count: int, *, noise: float = 0.0, outliers: float = 0.0, kv_s: float = KV_S) -> list[Iteration]:
    """Up to 24 tasks, a prompt in every seventh iteration; noise is log-normal, and an outlier takes 40 ms more."""
    rng = Random(5)
    samples, end_s = [], 0.0
    for _ in range(count):
        decodes = rng.randint(1, 24)
        prefill = rng.randint(60, 600) if rng.random() < 1 / 7 else 0
        kv_tokens = prefill + sum(rng.randint(50, 350) for _ in range(decodes))
        seconds = CONSTANT_S + PREFILL_S * prefill + DECODE_S * decodes + kv_s * kv_tokens
        seconds = seconds * rng.lognormvariate(0, noise) + (0.04 if rng.random() < outliers else 0)
        end_s += seconds
        samples.append(Iteration(end_s, seconds, prefill, decodes, kv_tokens))
    return samples


def test_an_iteration_is_what_two_reports_differ_by() -> None:
    told = fit.iterations(
        [
            heard(1.000, 7, {1: (100, 1)}),
            heard(1.004, 8, {1: (101, 2)}),
            heard(1.010, 9, {1: (102, 3), 2: (60, 1), 3: (300, 0)}),  # two come; the third has a part of its prompt
            heard(1.015, 10, {1: (103, 4), 2: (61, 2), 3: (420, 1)}),
            heard(1.020, 11, {2: (62, 3), 3: (421, 2)}),  # the first had its last token
        ]
    )
    assert [(each.prefill_tokens, each.decodes, each.kv_tokens) for each in told] == [
        (0, 1, 101),
        (360, 1, 102 + 60 + 300),
        (120, 2, 103 + 61 + 420),
        (0, 3, 104 + 62 + 421),
    ]
    assert [round(each.seconds, 6) for each in told] == [0.004, 0.006, 0.005, 0.005]


def test_a_repeated_report_changes_the_state_and_not_the_time() -> None:
    told = fit.iterations(
        [heard(1.0, 7, {1: (100, 1), 2: (50, 1)}), heard(1.9, 7, {1: (100, 1)}), heard(2.0, 8, {1: (101, 2)})]
    )
    assert [(each.seconds, each.decodes) for each in told] == [(1.0, 1)]  # the second was aborted in between


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (heard(1, 7, {1: (100, 1)}), heard(2, 9, {1: (102, 3)})),  # a report was lost
        (heard(1, 7, {}), heard(2, 8, {1: (100, 1)})),  # the engine was idle
        (heard(1, 7, {1: (100, 1), 2: (9, 1)}), heard(2, 8, {1: (101, 2)}, preempted=1)),
        (heard(1, 7, {1: (100, 1)}), heard(2, 8, {1: (100, 1)}, life="another")),
    ],
)
def test_what_cannot_be_told_is_left_out(before: Heard, after: Heard) -> None:
    assert fit.iterations([before, after]) == []


def test_disturbed_iterations_are_left_out() -> None:
    samples = [Iteration(end_s, 0.2, 0, 1, 1) for end_s in (0.5, 1.1, 1.5, 2.5, 3.5)]
    others = [Others(0, 1, 0.01), Others(1, 2, 0.05), Others(2, 3, 0.9)]
    kept = fit.undisturbed(samples, others)
    # One lies across two windows, one in a disturbed window, one outside of all.
    assert [each.end_s for each in kept] == [0.5, 1.5]


def test_the_line_is_found_again() -> None:
    found = fit.fit(made_up(4000))
    assert found.constant_s == pytest.approx(CONSTANT_S)
    assert found.per_prefill_token_s == pytest.approx(PREFILL_S)
    assert found.per_decode_s == pytest.approx(DECODE_S)
    assert found.per_kv_token_s == pytest.approx(KV_S)
    assert (found.samples, found.outliers) == (4000, 0)
    assert found.r2 == pytest.approx(1)
    assert found.stretch_error_worst == pytest.approx(0, abs=1e-9)


def test_the_line_is_found_through_noise_and_outliers() -> None:
    found = fit.fit(made_up(8000, noise=0.1, outliers=0.02))
    assert found.constant_s == pytest.approx(CONSTANT_S, rel=0.03)
    assert found.per_prefill_token_s == pytest.approx(PREFILL_S, rel=0.05)
    assert found.per_decode_s == pytest.approx(DECODE_S, rel=0.15)
    assert found.per_kv_token_s == pytest.approx(KV_S, rel=0.15)
    assert found.outliers == pytest.approx(0.02, abs=0.005)
    # The errors hold the outliers too: they took 0.8 ms of each iteration.
    assert 0.05 < found.step_error < 0.1
    assert found.total_error == pytest.approx(-0.0008 / 0.0075, abs=0.03)
    assert found.stretch_error_worst < 0.3


def test_no_coefficient_is_below_zero() -> None:
    found = fit.fit(made_up(4000, kv_s=-0.1e-6))
    assert found.per_kv_token_s == 0
    assert min(found.constant_s, found.per_prefill_token_s, found.per_decode_s) > 0


def test_latency_is_the_time_that_nobody_had_the_task() -> None:
    tasks = [
        TaskResult("a", "t", submit_s=0.0, end_s=1.0, queue_s=0.3),
        TaskResult("a", "u", submit_s=0.0, end_s=1.2, queue_s=0.3),
    ]
    reports = [
        heard(5.0, 1, {1: (10, 1)}),
        heard(5.2, 2, {1: (11, 2), 2: (10, 1)}),
        heard(5.3, 2, {1: (11, 2), 2: (10, 1)}),  # repeated
        heard(5.7, 3, {2: (11, 2)}),
        heard(5.8, 4, {}),
        heard(9.0, 5, {3: (10, 1)}),  # the engine was idle
    ]
    # Two for 0.2 s and for 0.5 s, one for 0.1 s: 1.5 s of 0.7 + 0.9.
    assert fit.task_latency_s(tasks, reports) == pytest.approx((1.6 - 1.5) / 2)


def test_too_few_are_refused() -> None:
    with pytest.raises(TooFewSamples, match="12 iterations"):
        fit.fit(made_up(12))


def test_the_profile_can_be_read_again(tmp_path: Path) -> None:
    found = fit.profile(fit.fit(made_up(3000, noise=0.1)), HELLO, 0.04)
    path = tmp_path / "mine.toml"
    path.write_text(fit.toml(found), encoding="utf-8")
    read = load_profile(str(path))
    assert read.step_s(100, 10, 2000) == found.step_s(100, 10, 2000)
    assert (read.kv_blocks, read.block_size, read.max_num_seqs, read.max_num_batched_tokens) == (127, 32, 64, 2048)
    assert read.fit == found.fit
    assert read.fit["task_latency_s"] == 0.04
    assert read.description == found.description.strip()


def test_our_own_work_is_not_that_of_others() -> None:
    work = OtherWork()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    others = work.since()
    assert others.end_s - others.start_s >= 0.3
    # What else runs here is not known; that it is less than the machine, is.
    assert 0 <= others.cores <= (os.cpu_count() or 1)
