"""Counters and histograms of what happens at every request, kept as plain numbers until a scrape.

The client library's own take a lock and check their arguments each time; for one request that takes as long as its place in
the queue. These are for the event loop alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Distribution:
    """How many values fell into each bucket, and their sum."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: of the buckets, upper and inclusive, in order; the last one infinite."""
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


Child = TypeVar("Child")


class _Tally(dict[Labels, Child], Collector, Generic[Child]):
    """One metric: its children by the values of their labels, each made when it is first looked up."""

    # A registry keeps collectors by identity, not by content.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, registry: CollectorRegistry, make: Callable[[], Child], labels: Labels) -> None:
        super().__init__()
        self._make, self._labelnames = make, labels  # as the client library calls them
        if not labels:
            self[()] = make()
        registry.register(self)

    def __missing__(self, labels: Labels) -> Child:
        child = self[labels] = self._make()
        return child

    def describe(self) -> Iterator[Metric]:
        return iter(self.collect())


class Counts(_Tally[Count]):
    """A counter."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, labels: Labels = ()) -> None:
        self._name, self._text = name, text
        super().__init__(registry, Count, labels)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labelnames)
        for labels, count in self.items():
            family.add_metric(labels, count.value)
        yield family


class Distributions(_Tally[Distribution]):
    """A histogram."""

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, bounds: Sequence[float], labels: Labels = ()
    ) -> None:
        """bounds: in order, all of them finite."""
        self._name, self._text = name, text
        all_bounds = (*map(float, bounds), math.inf)
        self._written = [*map(str, all_bounds[:-1]), "+Inf"]
        super().__init__(registry, lambda: Distribution(all_bounds), labels)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labelnames)
        for labels, found in self.items():
            buckets = zip(self._written, accumulate(found.counts), strict=True)
            family.add_metric(labels, list(buckets), found.sum)
        yield family
