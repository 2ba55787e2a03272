"""What one metric is: its names, kind, meaning, labels and buckets. It holds no number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import product
from typing import Literal

PREFIX = "hocket_"
VLLM_PREFIX = "vllm:"

Kind = Literal["counter", "gauge", "histogram"]
Dashboard = Literal["overview", "engine"]


@dataclass(frozen=True, slots=True)
class Alias:
    """The same numbers under vLLM's name (without its prefix, and without a counter's `_total`).

    `labels` are renamed; of one label only some values are shown, if `only` names it; over the
    values of those that are `summed` the numbers are added up, and the label is not shown.
    """

    name: str
    _: KW_ONLY
    labels: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, tuple[str, ...]] | None = None
    summed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` has neither the prefix nor a counter's `_total`.

    `fact` says what feeds it. Every metric has the label `model`, which is not listed. `values` are
    those of its labels that are shown from the start, so that a rate sees the first event: of the
    server's metrics from its own start, of an instance's from the moment it is ready.

    What a gauge of an instance says when that is down is no longer true: it becomes 0, or vanishes
    if 0 would say something else.
    """

    kind: Kind
    name: str
    help: str
    fact: str
    _: KW_ONLY
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    vllm: Alias | None = None
    dashboard: Dashboard | None = None
    vanishes: bool = False

    def shown_first(self, **given: str) -> Iterator[tuple[str, ...]]:
        """Yield the label values shown from the start, where those of these labels are given.

        Nothing, if there is a label of which nobody knows the values before.
        """
        values = {name: (value,) for name, value in given.items()} | dict(self.values)
        if set(self.labels) <= set(values):
            yield from product(*(values[label] for label in self.labels))

    @property
    def exposed_name(self) -> str:
        """As it is queried; a histogram has `_bucket`, `_sum` or `_count` behind it."""
        return f"{PREFIX}{self.name}" + "_total" * (self.kind == "counter")
