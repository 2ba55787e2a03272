"""The numbers behind the page: plain cells by name and label values, written by one thread.

It knows the table and nothing of Prometheus; a cell costs an addition to write, as one is written
for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from serving.telemetry.metric import Metric

LabelValues = tuple[str, ...]


class Number:
    """A counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, increase: float = 1.0) -> None:
        self.value += increase

    def set(self, value: float) -> None:
        self.value = value


class Histogram:
    """Counts by bucket, not yet added up; the last is of what exceeds every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


class MetricStore:
    """Cells are made when they are first asked for. Raises KeyError for what the table lacks."""

    def __init__(self, table: Sequence[Metric]) -> None:
        self._metrics = {metric.name: metric for metric in table}
        self._numbers: dict[str, dict[LabelValues, Number]] = {}
        self._histograms: dict[str, dict[LabelValues, Histogram]] = {}
        for metric in table:
            if metric.kind == "histogram":
                self._histograms[metric.name] = {}
            else:
                self._numbers[metric.name] = {}
            if not metric.labels:
                self._make(metric)
            elif len(metric.labels) == 1:
                for value in metric.values:
                    self._make(metric, value)

    def number(self, name: str, *labels: str) -> Number:
        cells = self._numbers[name]
        cell = cells.get(labels)
        if cell is None:
            self._check(name, labels)
            cell = cells[labels] = Number()
        return cell

    def histogram(self, name: str, *labels: str) -> Histogram:
        cells = self._histograms[name]
        cell = cells.get(labels)
        if cell is None:
            self._check(name, labels)
            cell = cells[labels] = Histogram(self._metrics[name].buckets)
        return cell

    def cells(self, metric: Metric) -> Iterator[tuple[LabelValues, Number | Histogram]]:
        if metric.kind == "histogram":
            yield from self._histograms[metric.name].items()
        else:
            yield from self._numbers[metric.name].items()

    def total(self, name: str) -> float:
        """Return the sum of a counter or gauge over all its labels."""
        return sum(cell.value for cell in self._numbers[name].values())

    def _make(self, metric: Metric, *labels: str) -> None:
        make = self.histogram if metric.kind == "histogram" else self.number
        make(metric.name, *labels)

    def _check(self, name: str, labels: LabelValues) -> None:
        expected = self._metrics[name].labels
        if len(labels) != len(expected):
            raise KeyError(f"{name} has the labels {expected}, not {len(labels)} of them")
