"""What is said of a set of samples, and the rule by which a percentile of too few is refused.

Percentiles interpolate linearly between samples (numpy's default, as in `vllm bench serve`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# A percentile above the median is given only where this many samples are expected beyond it. The
# number beyond is binomial: with 10 its standard deviation is sqrt(10), so what is called p99 lies
# with 95 % confidence between p98.4 and p99.6. Intervals of quantiles rest on that binomial
# (Le Boudec, Performance Evaluation of Computer and Communication Systems, 2010, chapter 2), and
# n(1-p) >= 10 is the usual condition for it to be near normal.
MIN_SAMPLES_BEYOND = 10
PERCENTILES = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99.9": 999}  # in thousandths


def samples_needed(percentile: str) -> int:
    """Return how many samples a percentile needs: p99 a thousand, p50 one."""
    beyond = 1000 - PERCENTILES[percentile]
    return 1 if beyond >= 500 else -(-1000 * MIN_SAMPLES_BEYOND // beyond)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Seconds. None: no samples, or too few for this percentile (`samples_needed`)."""

    num: int
    mean_s: float | None = None
    std_s: float | None = None  # of these samples: divided by n
    p50_s: float | None = None
    p90_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    p999_s: float | None = None
    max_s: float | None = None

    def percentile_s(self, name: str) -> float | None:
        """Look up one of `PERCENTILES` by its name."""
        values = (self.p50_s, self.p90_s, self.p95_s, self.p99_s, self.p999_s)
        return dict(zip(PERCENTILES, values, strict=True))[name]

    @property
    def refused(self) -> tuple[str, ...]:
        """The percentiles that have some samples, but too few."""
        return tuple(name for name in PERCENTILES if 0 < self.num < samples_needed(name))


def distribution(values_s: Iterable[float]) -> Distribution:
    values = np.fromiter(values_s, dtype=np.float64)
    if not len(values):
        return Distribution(num=0)
    at: dict[str, float | None] = {
        name: float(np.percentile(values, thousandths / 10))
        if len(values) >= samples_needed(name)
        else None
        for name, thousandths in PERCENTILES.items()
    }
    return Distribution(
        num=len(values),
        mean_s=float(values.mean()),
        std_s=float(values.std()),
        p50_s=at["p50"],
        p90_s=at["p90"],
        p95_s=at["p95"],
        p99_s=at["p99"],
        p999_s=at["p99.9"],
        max_s=float(values.max()),
    )
