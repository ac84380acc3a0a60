"""How metrics are declared: each is a row, with its full name and its help, in the class of its subject.

There are two kinds. What happens is counted when it happens: `counter`, `counts`, `histogram`, `gauge`. What is, is read at
each scrape: a `Reading` of a view, which is whatever object has the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gateway.telemetry.counters import Counts, Distributions, Labels

Made = TypeVar("Made")
View = TypeVar("View")


class Row(Generic[Made]):
    """A declaration in the body of a `Subject`. An instance of it has the metric under the same name."""

    def __init__(self, make: Callable[[CollectorRegistry], Made]) -> None:
        self.make = make

    if TYPE_CHECKING:

        def __get__(self, subject: object, owner: type) -> Made: ...


class Subject:
    """The metrics of one subject: those that its class declares, on this registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        for name, row in vars(type(self)).items():
            if isinstance(row, Row):
                setattr(self, name, row.make(registry))


def counter(name: str, text: str, *labels: str, values: Iterable[str] = ()) -> Row[Counter]:
    """Of what is rare, or counted in another thread. values: of the only label; they are there, as zero, from the start."""

    def make(registry: CollectorRegistry) -> Counter:
        made = Counter(name, text, labels, registry=registry)
        for value in values:
            made.labels(value)
        return made

    return Row(make)


def gauge(name: str, text: str) -> Row[Gauge]:
    return Row(lambda registry: Gauge(name, text, registry=registry))


def counts(name: str, text: str, *labels: str) -> Row[Counts]:
    """Of what happens at every request."""
    return Row(lambda registry: Counts(registry, name, text, labels))


def histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Row[Distributions]:
    """Of what happens at every request."""
    return Row(lambda registry: Distributions(registry, name, text, bounds, labels))


@dataclass(frozen=True, slots=True)
class Reading(Generic[View]):
    """A metric that is read at each scrape."""

    name: str  # its end says what it is: `_total` a counter, `_info` an info, else a gauge
    text: str
    read: Callable[[View], float | Mapping[Labels, float]]  # the values by their labels, if it has labels
    labels: Labels = ()


class Scraped(Generic[View]):
    """The readings of one view. Until there is a view they have no samples."""

    view: View | None = None

    def __init__(self, registry: CollectorRegistry, readings: tuple[Reading[View], ...]) -> None:
        for reading in readings:
            registry.register(_ReadAtScrape(self, reading))


def readings(*rows: Reading[View]) -> Row[Scraped[View]]:
    return Row(lambda registry: Scraped(registry, rows))


class _ReadAtScrape(Collector, Generic[View]):
    def __init__(self, scraped: Scraped[View], reading: Reading[View]) -> None:
        self._scraped, self._reading = scraped, reading
        self._labelnames = reading.labels  # as the client library calls them
        self._name, ending = reading.name, ""
        for ending, kind in (("_total", "counter"), ("_info", "info"), ("", "gauge")):
            if reading.name.endswith(ending):
                self._name, self._kind = reading.name.removesuffix(ending), kind
                break
        self._created_s = time.time()

    def describe(self) -> Iterator[Metric]:
        yield Metric(self._name, self._reading.text, self._kind)

    def collect(self) -> Iterator[Metric]:
        (family,) = self.describe()
        if (view := self._scraped.view) is not None:
            found = self._reading.read(view)
            for values, number in found.items() if isinstance(found, Mapping) else [((), found)]:
                labels = dict(zip(self._labelnames, values, strict=True))
                family.add_sample(self._reading.name, labels, float(number))
                if self._kind == "counter":
                    family.add_sample(f"{self._name}_created", labels, self._created_s)
        yield family
