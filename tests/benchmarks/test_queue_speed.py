"""The measurement of the queue's decisions, and that their cost hardly grows with what waits."""

from __future__ import annotations

import itertools
from statistics import median

import pytest
from rich.console import Console

from tests.benchmarks import queue_speed
from tests.benchmarks.queue_speed import SpeedSettings, SteadyQueue, measure, variants

TINY = SpeedSettings(policies=("justitia", "vtc"), waiting=(20, 200), rounds=2, cycles=10, warm_up=5, tenants=3)


def test_a_run_has_every_policy_variant_and_size() -> None:
    record = measure(TINY)
    cases = [(each["policy"], each["variant"], each["waiting"]) for each in record["results"]]
    names = [variant.name for variant in variants(TINY)]
    # Tenants count under justitia only.
    assert cases == [
        *itertools.product(["justitia"], names, [20, 200]),
        *itertools.product(["vtc"], names[:2], [20, 200]),
    ]
    for each in record["results"]:
        for verb in ("enqueue", "complete", "release", "decision", "observe"):
            assert 0 < each["us"][verb]["p50"] <= each["us"][verb]["p99"] <= each["us"][verb]["max"]
        assert each["us"]["decision"]["p50"] > each["us"]["release"]["p50"]
        assert len(each["decision_us_p50_by_round"]) == TINY.rounds
    assert len(record["growth"]["of"]) == 5
    assert record["growth"]["log_ratio"] == pytest.approx(1.77, abs=0.01)
    assert set(record["target"]) == {"slowest_decision_p50_us", "largest_growth", "met"}
    assert "python" in record["versions"]


def test_the_table_has_a_line_for_each_and_for_the_growth() -> None:
    drawn = queue_speed.table(measure(TINY))
    assert drawn.row_count == 5 * 3
    Console(quiet=True).print(drawn)


@pytest.mark.parametrize("variant", variants(TINY), ids=lambda variant: variant.name)
def test_the_state_is_steady(variant: queue_speed.Variant) -> None:
    queue = SteadyQueue("justitia", 200, variant, TINY)
    for _ in range(300):
        assert (queue.waiting, queue.in_flight) == (200, TINY.in_flight)
        queue.cycle()
    assert {len(queue.taken_ns[verb]) for verb in ("enqueue", "complete", "release", "decision", "observe")} == {300}
    assert queue.taken_ns["evict"]


@pytest.mark.parametrize("policy", ["justitia", "vtc"])
def test_a_release_with_a_hundred_times_as_many_waiting_is_not_much_slower(policy: str) -> None:
    few, many = (SteadyQueue(policy, waiting, variants(TINY)[0], TINY) for waiting in (200, 20_000))
    ratios = []
    for _ in range(9):
        for queue in (few, many):
            queue.forget_timings()
            for _ in range(60):
                queue.cycle()
        ratios.append(median(many.taken_ns["release"]) / median(few.taken_ns["release"]))
    # A logarithm has grown by 1.9; a scan would have by 100.
    assert median(ratios) < 6
