"""What a run's charts draw: distribution functions and time lines, few enough points for a page."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from loadgen.fairness import Floats, service_steps
from loadgen.types import Run

Line = tuple[Floats, Floats]  # x, y

# Evenly, and then ten times as dense beyond p99, where latencies spread.
_SHARES = np.unique(np.concatenate([np.linspace(0, 1, 251), np.linspace(0.99, 1, 51)]))
_MAX_POINTS = 1500  # of a scatter
_NUM_SLOWEST = 200  # of the largest values, which a scatter keeps


def cdf(values: Iterable[float]) -> Line:
    """Return (values, shares): which share of the samples is at most so large."""
    samples = np.fromiter(values, dtype=np.float64)
    if not len(samples):
        return samples, samples
    return np.quantile(samples, _SHARES, method="inverted_cdf"), _SHARES


def in_flight(run: Run, num_points: int = 240) -> Line:
    """Return (s, the most requests sent and not ended at any moment of each bin)."""
    sent_s = np.array([record.sent_at_s for record in run.records])
    ended_s = np.array([record.end_at_s for record in run.records])
    moments_s = np.concatenate([sent_s, ended_s])
    steps = np.concatenate([np.ones(len(sent_s)), -np.ones(len(ended_s))])
    order = np.lexsort((steps, moments_s))  # at one moment, ends before starts
    moments_s, level = moments_s[order], np.cumsum(steps[order])
    edges = _edges(run, num_points)
    held = np.concatenate([[0.0], level])[np.searchsorted(moments_s, edges[:-1], side="left")]
    bins = _bins(moments_s, edges)
    np.maximum.at(held, bins, level)
    return edges[:-1], held


def tokens_per_s(run: Run, num_bins: int = 60) -> tuple[Line, Line]:
    """Return the input and the output tokens served per second, over time (s, middles of bins)."""
    steps = [step for record in run.records for step in service_steps(record)]
    table = np.array(steps, dtype=np.float64).reshape(-1, 3)
    edges = _edges(run, num_bins)
    bins = _bins(table[:, 0], edges)
    width_s = edges[1] - edges[0]
    middles = edges[:-1] + width_s / 2
    sums = [np.bincount(bins, weights=table[:, i], minlength=num_bins) for i in (1, 2)]
    return (middles, sums[0] / width_s), (middles, sums[1] / width_s)


def ttft_over_time(run: Run) -> Line:
    """Return (s when it was to be sent, s to the first text): all, or a sample and the slowest."""
    points = sorted((r.intended_at_s, r.ttft_s) for r in run.records if r.received_at_s)
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    stride = -(-len(table) // _MAX_POINTS) or 1
    kept = np.arange(0, len(table), stride)
    if stride > 1:
        kept = np.union1d(kept, np.argsort(table[:, 1])[-_NUM_SLOWEST:])
    return table[kept, 0], table[kept, 1]


def _edges(run: Run, num_bins: int) -> Floats:
    last_s = max((record.end_at_s for record in run.records), default=0.0)
    return np.linspace(0.0, max(run.duration_s, last_s, 1e-6), num_bins + 1)


def _bins(times_s: Floats, edges: Floats) -> NDArray[np.intp]:
    """Return the number of the bin of each time; the last bin takes its end too."""
    return np.clip(np.searchsorted(edges, times_s, side="right") - 1, 0, len(edges) - 2)
