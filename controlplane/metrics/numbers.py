"""Measured values as plain numbers, which several processes can add up, and Prometheus' families made of them.

Every family is declared once; `Numbers` are the values of many families at one moment in one process, or the sum over
several. Counters and histograms only grow, so what a process that is gone has counted stays in the sum (`lasting`);
gauges tell of now, and go with their process. prometheus-client makes the text, and nothing of it is needed to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

FAST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SLOW_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[str, ...]
Value = float | list[float]
"""A number; of a histogram how many fell into each bucket, how many above the last, and the sum of all."""
Numbers = dict[str, dict[Labels, Value]]
"""Values by the family's name and the labels' values."""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name without Prometheus' suffixes, and which labels its values have."""

    kind: Kind
    name: str
    text: str
    labels: Sequence[str] = ()
    buckets: tuple[float, ...] = ()
    is_largest: bool = False  # a gauge of several processes is the largest of theirs; else their sum

    def empty(self) -> list[float]:
        """A histogram's value before anything was observed."""
        return [0] * (len(self.buckets) + 2)


def counter(name: str, text: str, labels: Sequence[str] = ()) -> Family:
    return Family(Kind.COUNTER, name, text, labels)


def gauge(name: str, text: str, labels: Sequence[str] = (), *, is_largest: bool = False) -> Family:
    return Family(Kind.GAUGE, name, text, labels, is_largest=is_largest)


def histogram(name: str, text: str, labels: Sequence[str] = (), *, buckets: tuple[float, ...]) -> Family:
    return Family(Kind.HISTOGRAM, name, text, labels, buckets)


def total(families: Iterable[Family], several: Sequence[Numbers]) -> Numbers:
    """What several processes tell together. None of them is changed."""
    found: Numbers = {}
    for family in families:
        values: dict[Labels, Value] = {}
        for numbers in several:
            for labels, value in numbers.get(family.name, {}).items():
                before = values.get(labels)
                values[labels] = value if before is None else _joined(family, before, value)
        found[family.name] = values
    return found


def lasting(families: Iterable[Family], numbers: Numbers) -> Numbers:
    """What stays true of a process that is gone: all but its gauges."""
    return {one.name: numbers.get(one.name, {}) for one in families if one.kind is not Kind.GAUGE}


def _joined(family: Family, one: Value, other: Value) -> Value:
    if isinstance(one, list) and isinstance(other, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    assert not isinstance(one, list)  # a family has values of one form
    assert not isinstance(other, list)
    return max(one, other) if family.is_largest else one + other


def metrics_of(families: Iterable[Family], numbers: Numbers) -> Iterator[Metric]:
    """As prometheus-client writes them."""
    for family in families:
        yield _metric(family, numbers.get(family.name, {}))


def _metric(family: Family, values: Mapping[Labels, Value]) -> Metric:
    if family.kind is Kind.HISTOGRAM:
        spread = HistogramMetricFamily(family.name, family.text, labels=family.labels)
        bounds = [*map(floatToGoString, family.buckets), "+Inf"]
        for labels, value in values.items():
            assert isinstance(value, list)  # a histogram's are
            reached, buckets = 0.0, []
            for bound, count in zip(bounds, value, strict=False):  # the sum has no bound
                reached += count
                buckets.append((bound, reached))
            spread.add_metric(labels, buckets, value[-1])
        return spread
    form = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    plain = form(family.name, family.text, labels=family.labels)
    for labels, value in values.items():
        assert not isinstance(value, list)  # only a histogram's are
        plain.add_metric(labels, value)
    return plain


def encoded(numbers: Numbers) -> object:
    """For JSON, which has no tuples as keys."""
    return {name: list(values.items()) for name, values in numbers.items()}


def decoded(found: Mapping[str, Iterable[tuple[Sequence[str], Value]]]) -> Numbers:
    """What `encoded` made, after JSON."""
    return {name: {tuple(labels): value for labels, value in values} for name, values in found.items()}
