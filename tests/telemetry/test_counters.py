"""Counted in plain numbers, told as the client library would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from gateway.telemetry.counters import Counts, Distributions

BOUNDS = (0.005, 0.25, 1, 1800)
LABELS = ("endpoint", "outcome")
labels = st.tuples(st.sampled_from(("/a", 'a "quoted"\nline')), st.sampled_from(("completed", "failed")))


def told(registry: CollectorRegistry) -> list[str]:
    """But for the times at which the library has made each."""
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


@given(
    st.lists(st.tuples(labels, st.integers(0, 10**6))), st.lists(st.tuples(labels, st.sampled_from((0, 0.25, 3, 1e9))))
)
def test_what_is_told_is_what_the_library_tells(
    counted: list[tuple[tuple[str, str], int]], observed: list[tuple[tuple[str, str], float]]
) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts, counter = Counts(ours, "x_total", "X.", LABELS), Counter("x_total", "X.", LABELS, registry=theirs)
    spread = Distributions(ours, "y_seconds", "Y.", BOUNDS, LABELS)
    histogram = Histogram("y_seconds", "Y.", LABELS, registry=theirs, buckets=BOUNDS)
    for values, amount in counted:
        counts[values].inc(amount)
        counter.labels(*values).inc(amount)
    for values, value in observed:
        spread[values].observe(value)
        histogram.labels(*values).observe(value)
    assert told(ours) == told(theirs)


def test_without_labels_it_is_there_from_the_start() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    Counts(ours, "x_total", "X.")
    Distributions(ours, "y", "Y.", BOUNDS)
    Counter("x_total", "X.", registry=theirs)
    Histogram("y", "Y.", registry=theirs, buckets=BOUNDS)
    assert told(ours) == told(theirs)
