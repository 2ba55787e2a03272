"""What one metric is: its names, kind, meaning, labels and buckets. It holds no number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

PREFIX = "hocket_"
VLLM_PREFIX = "vllm:"

Kind = Literal["counter", "gauge", "histogram"]
Dashboard = Literal["overview", "engine"]


@dataclass(frozen=True, slots=True)
class Alias:
    """The same numbers under vLLM's name (without its prefix, and without a counter's `_total`).

    `labels` are renamed; of one label only some values are shown, if `only` names it.
    """

    name: str
    _: KW_ONLY
    labels: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` has neither the prefix nor a counter's `_total`.

    `fact` says what feeds it. Every metric has the label `model`, which is not listed. `values` are
    those of its last label that are shown from the start, so that a rate sees the first event; a
    metric without labels of its own is shown from the start too.
    """

    kind: Kind
    name: str
    help: str
    fact: str
    _: KW_ONLY
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: Alias | None = None
    dashboard: Dashboard | None = None

    @property
    def exposed_name(self) -> str:
        """As it is queried; a histogram has `_bucket`, `_sum` or `_count` behind it."""
        return f"{PREFIX}{self.name}" + "_total" * (self.kind == "counter")
