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
            for labels in metric.shown_first():
                self._make(metric, *labels)

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

    def appear(self, instance_id: str) -> None:
        """Show the cells of an instance that are known before anything happens."""
        for metric in self._metrics.values():
            if "instance" in metric.labels and not metric.vanishes:
                for labels in metric.shown_first(instance=instance_id):
                    self._make(metric, *labels)

    def expire(self, instance_id: str) -> None:
        """What an instance's gauges say is true no more; what was counted stays counted."""
        for metric in self._metrics.values():
            if metric.kind != "gauge" or "instance" not in metric.labels:
                continue
            place, cells = metric.labels.index("instance"), self._numbers[metric.name]
            for labels in [labels for labels in cells if labels[place] == instance_id]:
                if metric.vanishes:
                    del cells[labels]
                else:
                    cells[labels].set(0)

    def forget(self, instance_id: str) -> None:
        """An instance is not to come back: it has no gauges; what was counted stays counted."""
        for metric in self._metrics.values():
            if metric.kind == "gauge" and "instance" in metric.labels:
                place, cells = metric.labels.index("instance"), self._numbers[metric.name]
                for labels in [labels for labels in cells if labels[place] == instance_id]:
                    del cells[labels]

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
