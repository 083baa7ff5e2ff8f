"""Counters and histograms that cost a tenth of a microsecond a value, for Prometheus and for OTLP.

The SDK's instruments take several microseconds for each value: a gateway that answers thousands of
requests a second would be busy with little else. Here a series is looked up once, kept, and added
to; nothing is sampled or estimated. Cumulative, as both receivers want it.

One thread's property: whoever adds also reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

Labels: TypeAlias = tuple[str, ...]
Reading: TypeAlias = Iterable[tuple[Mapping[str, str], float]]
"""A gauge's values, each with its labels."""

_SUFFIXES = {"s": "_seconds"}
"""Of units, as OpenTelemetry's own Prometheus exporter names them."""


class Distribution:
    """One series of a histogram.

    Attributes:
        counts: of values up to each bound, not cumulative; the last: of those beyond all.
    """

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class Family:
    """What all series of a metric share. Names as in `telemetry.names`."""

    name: str
    unit: str
    text: str
    labels: Labels = ()

    @property
    def prometheus_name(self) -> str:
        return self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "")

    @property
    def prometheus_labels(self) -> list[str]:
        return [label.replace(".", "_") for label in self.labels]


class Histogram:
    """A metric of values spread over buckets."""

    def __init__(self, family: Family, bounds: Sequence[float]) -> None:
        self.family = family
        self.bounds = bounds
        self.series: dict[Labels, Distribution] = {}

    def at(self, *labels: str) -> Distribution:
        """The series with these labels, in the family's order: to be kept by whoever adds."""
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = Distribution(self.bounds)
        return series


class Counter:
    """A metric that only grows."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.series: dict[Labels, int] = {}

    def add(self, amount: int, *labels: str) -> None:
        self.series[labels] = self.series.get(labels, 0) + amount


@dataclass(frozen=True, slots=True)
class Gauge:
    """A metric of the moment: read when somebody collects. `grows`: it is a total that only does,
    counted elsewhere."""

    family: Family
    read: Callable[[], Reading]
    grows: bool = False


class Metrics:
    """All metrics of a process."""

    def __init__(self) -> None:
        self.histograms: list[Histogram] = []
        self.counters: list[Counter] = []
        self.gauges: list[Gauge] = []
        self._registry = CollectorRegistry()
        self._registry.register(_Page(self))

    def histogram(
        self, name: str, text: str, labels: Labels, bounds: Sequence[float], *, unit: str = "s"
    ) -> Histogram:
        made = Histogram(Family(name, unit, text, labels), bounds)
        self.histograms.append(made)
        return made

    def counter(self, name: str, text: str, labels: Labels = ()) -> Counter:
        made = Counter(Family(name, "", text, labels))
        self.counters.append(made)
        return made

    def gauge(
        self,
        name: str,
        text: str,
        read: Callable[[], Reading],
        labels: Labels = (),
        *,
        unit: str = "",
        grows: bool = False,
    ) -> None:
        """Show what `read` returns, at each collection. It runs on the thread that collects."""
        self.gauges.append(Gauge(Family(name, unit, text, labels), read, grows))

    def prometheus_page(self) -> bytes:
        """All of it as Prometheus text."""
        return generate_latest(self._registry)


class _Page(Collector):
    """The metrics as prometheus_client knows them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[HistogramMetricFamily]:
        return []  # else registering would collect, before anything is there to be read

    def collect(
        self,
    ) -> Iterator[HistogramMetricFamily | CounterMetricFamily | GaugeMetricFamily]:
        for histogram in self._metrics.histograms:
            yield _histogram(histogram)
        for counter in self._metrics.counters:
            family = counter.family
            shown = CounterMetricFamily(
                family.prometheus_name, family.text, labels=family.prometheus_labels
            )
            for labels, count in counter.series.items():
                shown.add_metric(labels, count)
            yield shown
        for gauge in self._metrics.gauges:
            family = gauge.family
            kind = CounterMetricFamily if gauge.grows else GaugeMetricFamily
            now = kind(family.prometheus_name, family.text, labels=family.prometheus_labels)
            for about, value in gauge.read():
                now.add_metric([about.get(label, "") for label in family.labels], value)
            yield now


def _histogram(histogram: Histogram) -> HistogramMetricFamily:
    family = histogram.family
    shown = HistogramMetricFamily(
        family.prometheus_name, family.text, labels=family.prometheus_labels
    )
    for labels, series in histogram.series.items():
        below, buckets = 0, []
        for bound, count in zip((*histogram.bounds, None), series.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound is None else str(float(bound)), below))
        shown.add_metric(labels, buckets, series.total)
    return shown
