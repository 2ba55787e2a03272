"""The pages that Prometheus reads, in our names and in vLLM's. The only user of prometheus_client.

Both show the same cells at the same moment. There is one registry for each page and no multiprocess
mode: instances report to this process, which counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.telemetry.metric import PREFIX, VLLM_PREFIX, Alias, Metric
from serving.telemetry.store import Histogram, LabelValues, MetricStore, Number

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_VLLM_LABELS = {"model": "model_name", "instance": "engine"}


class Page:
    """Renders a table of metrics; the label `model` comes first."""

    def __init__(self, table: Sequence[Metric], store: MetricStore, model_name: str) -> None:
        self._native, self._vllm = CollectorRegistry(), CollectorRegistry()
        self._native.register(_Native(table, store, model_name))
        ProcessCollector(registry=self._native)
        self._vllm.register(_Vllm(table, store, model_name))

    def native(self) -> bytes:
        return generate_latest(self._native)

    def vllm(self) -> bytes:
        return generate_latest(self._vllm)


class _Native(Collector):
    def __init__(self, table: Sequence[Metric], store: MetricStore, model_name: str) -> None:
        self._table, self._store, self._model_name = table, store, model_name

    def collect(self) -> Iterator[Family]:
        for metric in self._table:
            family = _family(metric, f"{PREFIX}{metric.name}", ("model", *metric.labels))
            for labels, cell in self._store.cells(metric):
                _add(family, (self._model_name, *labels), cell)
            yield family


class _Vllm(Collector):
    def __init__(self, table: Sequence[Metric], store: MetricStore, model_name: str) -> None:
        self._table, self._store, self._model_name = table, store, model_name

    def collect(self) -> Iterator[Family]:
        for metric in self._table:
            if metric.vllm is not None:
                yield self._renamed(metric, metric.vllm)

    def _renamed(self, metric: Metric, alias: Alias) -> Family:
        rename = _VLLM_LABELS | dict(alias.labels)
        names = tuple(name for name in ("model", *metric.labels) if name not in alias.summed)
        family = _family(
            metric, f"{VLLM_PREFIX}{alias.name}", tuple(rename.get(name, name) for name in names)
        )
        for values, cell in self._cells(metric, alias):
            if alias.only is None or values[names.index(alias.only[0])] in alias.only[1]:
                _add(family, values, cell)
        return family

    def _cells(self, metric: Metric, alias: Alias) -> Iterator[tuple[LabelValues, object]]:
        """Yield the cells of a metric; of a counter or gauge summed over what is not shown."""
        if not alias.summed:
            for labels, cell in self._store.cells(metric):
                yield (self._model_name, *labels), cell
            return
        sums: dict[LabelValues, Number] = {}
        for labels, cell in self._store.cells(metric):
            assert isinstance(cell, Number)
            pairs = zip(metric.labels, labels, strict=True)
            shown = tuple(value for name, value in pairs if name not in alias.summed)
            sums.setdefault((self._model_name, *shown), Number()).add(cell.value)
        yield from sums.items()


def _family(metric: Metric, name: str, labels: tuple[str, ...]) -> Family:
    match metric.kind:
        case "counter":
            return CounterMetricFamily(name, metric.help, labels=labels)
        case "gauge":
            return GaugeMetricFamily(name, metric.help, labels=labels)
        case "histogram":
            return HistogramMetricFamily(name, metric.help, labels=labels)


def _add(family: Family, labels: tuple[str, ...], cell: object) -> None:
    if isinstance(family, HistogramMetricFamily):
        assert isinstance(cell, Histogram)
        bounds = [*map(floatToGoString, cell.bounds), "+Inf"]
        counts = zip(bounds, accumulate(cell.counts), strict=True)
        family.add_metric(labels, buckets=list(counts), sum_value=cell.sum)
    else:
        family.add_metric(labels, cell.value)  # type: ignore[attr-defined]
