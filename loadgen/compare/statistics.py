"""What pairs of runs show about the ratio of two arms, A and B; and the order of those runs.

Owns which runs are a pair, which measure decides, and what is said when nothing can be said. Never
sees a request: the requests of a run share its server, its cache and its hour, so they are not
repetitions, runs are. Never measures or runs anything.

The ratio is the centre of log ratios, so that swapping the arms inverts it and a run twice as slow
weighs as much as one twice as fast; `signed_rank.py` says which centre, and how sure it is.

Several measures: the *primary* one, named before the runs, has an error of alpha to itself. The
others are secondary and share one more alpha evenly (Bonferroni), so their intervals hold all
together. Holm's steps would find more, but the intervals that match them do not hold together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loadgen.compare import signed_rank
from loadgen.types import LoadError

ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class ScheduledRun:
    arm: Literal["A", "B"]
    seed: int
    pair: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number of each run. `a[i]` and `b[i]` are pair i; None: that run has no such number."""

    name: str
    unit: str  # "s" for times
    a: Sequence[float | None]
    b: Sequence[float | None]
    problem: str = ""  # why the arms cannot be compared by it, if that is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The ratio B / A of one measure, and its interval at level 1 - `alpha`.

    `median_a` and `median_b` are over runs; `ratio` is the centre of the pairs' ratios, which is
    not their quotient. What is None could not be had, and `problem` says why.
    """

    name: str
    unit: str
    num_pairs: int
    primary: bool
    alpha: float
    median_a: float | None = None
    median_b: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    problem: str = ""

    @property
    def differs(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 1.0 <= self.interval[1]

    @property
    def verdict(self) -> str:
        if self.ratio is None or self.interval is None:
            return self.problem
        if not self.differs:
            return "no difference shown"
        direction = "higher" if self.ratio > 1.0 else "lower"
        percent = abs(self.ratio - 1.0) * 100.0
        decimals = max(0, 1 - math.floor(math.log10(percent)))
        return f"B is {percent:.{decimals}f}% {direction}"


def schedule(num_pairs: int, seeds: Sequence[int]) -> tuple[ScheduledRun, ...]:
    """The order of runs: a pair is two neighbouring runs of one seed, two pairs are a block.

    A block is A-B-B-A or its mirror B-A-A-B, so a steady drift weighs equally on both arms in it.
    Pairs are neighbours and not whole blocks, which would halve their number (the slowdown of 4 %
    that 12 pairs find in nine of ten bursty comparisons, their 6 blocks find in a third). Half of
    the blocks are mirrored, and chance (a function of `seeds`) says which: A-B-B-A alone takes what
    recurs every fourth run, such as a job of each minute, for a difference.

    Raises LoadError for an odd number of pairs, or fewer different seeds than pairs.
    """
    if num_pairs < 2 or num_pairs % 2:
        raise LoadError(
            f"{num_pairs} pairs of runs cannot be put in A-B-B-A order",
            f"ask for an even number, such as {max(2, num_pairs + num_pairs % 2)}",
        )
    used = tuple(seeds[:num_pairs])
    if len(set(used)) < num_pairs:
        raise LoadError(
            f"{num_pairs} pairs of runs have {len(set(used))} different seeds",
            "give each pair a seed of its own",
        )
    rng = np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF for seed in used])
    mirrored = rng.permutation(np.arange(num_pairs // 2) % 2 == 1)
    runs = []
    for pair, seed in enumerate(used):
        first_is_b = bool(mirrored[pair // 2]) != (pair % 2 == 1)
        runs.append(ScheduledRun("B" if first_is_b else "A", seed, pair))
        runs.append(ScheduledRun("A" if first_is_b else "B", seed, pair))
    return tuple(runs)


def compare(
    measures: Sequence[Measure], primary: str, alpha: float = ALPHA
) -> tuple[Comparison, ...]:
    """All measures, the primary one first; the secondary ones share `alpha` among them.

    Raises LoadError if no measure is called `primary`.
    """
    first = [measure for measure in measures if measure.name == primary]
    others = [measure for measure in measures if measure.name != primary]
    if not first:
        raise LoadError(
            f"the primary measure {primary!r} was not measured",
            f"name one of: {', '.join(measure.name for measure in measures)}",
        )
    return tuple(
        [compare_pairs(measure, alpha=alpha, primary=True) for measure in first]
        + [compare_pairs(measure, alpha=alpha / len(others), primary=False) for measure in others]
    )


def compare_pairs(measure: Measure, *, alpha: float = ALPHA, primary: bool = True) -> Comparison:
    """One measure by itself. Raises ValueError if its arms have different numbers of runs.

    A pair with a missing value is not dropped: a run that has no TTFT is a run that went wrong, and
    leaving those out would favour the arm that fails.
    """
    num_pairs = len(measure.a)
    if num_pairs != len(measure.b):
        raise ValueError(f"{measure.name}: {num_pairs} runs of A, {len(measure.b)} of B")
    nothing = Comparison(
        name=measure.name, unit=measure.unit, num_pairs=num_pairs, primary=primary, alpha=alpha
    )
    problem = _why_not_comparable(measure)
    if problem:
        return replace(nothing, problem=f"not comparable: {problem}")

    a = np.array(measure.a, dtype=np.float64)
    b = np.array(measure.b, dtype=np.float64)
    log_ratios = np.log(b) - np.log(a)
    log_limits = signed_rank.interval(log_ratios, alpha)
    if log_limits is None:
        problem = f"no verdict: {num_pairs} pairs of runs, {signed_rank.fewest_pairs(alpha)} needed"
    return replace(
        nothing,
        median_a=float(np.median(a)),
        median_b=float(np.median(b)),
        ratio=math.exp(signed_rank.centre(log_ratios)),
        interval=None if log_limits is None else (math.exp(log_limits[0]), math.exp(log_limits[1])),
        p_value=signed_rank.p_value(log_ratios),
        problem=problem,
    )


def _why_not_comparable(measure: Measure) -> str:
    if measure.problem:
        return measure.problem
    if not measure.a:
        return "no pair of runs"
    for pair, values in enumerate(zip(measure.a, measure.b, strict=True), start=1):
        for arm, value in zip("AB", values, strict=True):
            if value is None or not math.isfinite(value):
                return f"{arm} has no value in pair {pair}"
            if value <= 0.0:
                return f"{arm} is {value:g} in pair {pair}"
    return ""
