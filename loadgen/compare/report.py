"""Comparisons as rows of text for people. Decides how numbers are rounded, never what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from loadgen.compare.arms import Health
from loadgen.compare.statistics import Comparison

HEADER = ("measure", "A", "B", "B / A", "interval", "verdict")
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_DIGITS = 3
_MOST_DECIMALS = 6


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """A row for each, with the cells of `HEADER`. What could not be had is a dash."""
    return [
        (
            comparison.name + (" (primary)" if comparison.primary else ""),
            *_values(comparison),
            *_ratios(comparison),
            comparison.verdict,
        )
        for comparison in comparisons
    ]


def comparison_table(
    comparisons: Sequence[Comparison], healths: Mapping[str, Health] = MappingProxyType({})
) -> str:
    """The rows in aligned columns below their header, and how to read them."""
    rows = [HEADER, *comparison_rows(comparisons)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *comparison_notes(comparisons, healths)])


def comparison_notes(comparisons: Sequence[Comparison], healths: Mapping[str, Health]) -> list[str]:
    """How to read the rows, and what to know of the runs before believing them."""
    num_pairs = max((comparison.num_pairs for comparison in comparisons), default=0)
    notes = [f"A, B: medians of {num_pairs} runs. B / A: over {num_pairs} pairs of runs."]
    if any(not comparison.primary for comparison in comparisons):
        notes.append(
            "The primary measure, named before the runs, decides. "
            "The others' intervals are wider, so that they hold all together."
        )
    for name, health in healths.items():
        if health.num_failed:
            of = f"{health.num_requests:,} requests failed"
            notes.append(f"{name}: {health.num_failed:,} of {of}.")
        if health.num_behind:
            of = f"in {health.num_behind} of {health.num_runs} runs"
            notes.append(f"{name}: the load generator fell behind its plan {of}; lower the rate.")
    return notes


def _values(comparison: Comparison) -> tuple[str, str]:
    """Both in the unit that suits the larger one."""
    if comparison.median_a is None or comparison.median_b is None:
        return "-", "-"
    scale, unit = 1.0, comparison.unit
    if unit == "s":
        larger = max(comparison.median_a, comparison.median_b)
        scale, unit = next((pair for pair in _TIME_UNITS if larger >= pair[0]), _TIME_UNITS[-1])
    values = (comparison.median_a / scale, comparison.median_b / scale)
    first, second = (f"{_rounded(value)} {unit}".rstrip() for value in values)
    return first, second


def _rounded(value: float) -> str:
    """Three digits, but none of a whole number lost: 0.0123, 1.23, 12.3, 1,234."""
    exponent = math.floor(math.log10(value))
    return f"{value:,.{max(0, _DIGITS - 1 - exponent)}f}"


def _ratios(comparison: Comparison) -> tuple[str, str]:
    """The ratio and its interval, with so many decimals that a limit beside 1 is not shown as 1."""
    if comparison.ratio is None:
        return "-", "-"
    if comparison.interval is None:
        return f"{comparison.ratio:.{_DIGITS}f}", "-"
    nearest = min(abs(limit - 1.0) for limit in comparison.interval)
    decimals = _DIGITS
    while decimals < _MOST_DECIMALS and round(nearest, decimals) == 0.0 < nearest:
        decimals += 1
    low, high = (f"{limit:.{decimals}f}" for limit in comparison.interval)
    level = f"{100.0 * (1.0 - comparison.alpha):.4g}"
    return f"{comparison.ratio:.{decimals}f}", f"{low} to {high} ({level}%)"
