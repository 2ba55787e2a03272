"""The centre of paired differences: estimate, interval and p of a winsorised signed-rank test.

Owns the test and its exact level. Knows nothing of what the numbers are: the differences it is
given are log ratios of pairs of runs.

If nothing sets the two sides of a pair apart, each difference has either sign with the same chance
whatever the others have, so all 2^n patterns of signs are equally likely; the level needs no other
assumption. The statistic is the sum of the ranks on one side, each cut at a third of n. That lies
between Wilcoxon's test (no cut), nearly as sharp as Student's on normal noise, and the sign test
(all cut to 1), to which an outlier's distance is nothing. If a neighbour slows one run in ten, 12
pairs hold about two outliers: an interval around the mean then finds a slowdown of 5 % in a third
of comparisons or fewer, Wilcoxon's in two thirds, this in four fifths (noise of 2 % in each run).
Where the neighbour strikes the runs of one arm only, the arms do differ, and the more pairs there
are, the likelier that is said.

No assumption saves few pairs: the smallest two-sided p is 2 / 2^n, so 5 pairs cannot reach 5 %.

Winsorised scores: Policello, Hettmansperger, "Adaptive robust procedures for the one-sample
location problem", JASA 71, 1976. The interval of such a test: Bauer, "Constructing confidence sets
using rank statistics", JASA 67, 1972.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# With fewer ranks the sum takes so few values that its level falls far below alpha (8 pairs: 2.3 %
# with a cut at 3, 3.9 % at 4).
_LOWEST_CUT = 4


def fewest_pairs(alpha: float) -> int:
    """The fewest for which an interval at level 1 - alpha exists: 2 / 2^n <= alpha."""
    return math.ceil(1.0 - math.log2(alpha))


def interval(differences: Floats, alpha: float) -> tuple[float, float] | None:
    """Every centre that two-sided `alpha` does not reject; None if it can reject none."""
    doubled = 2.0 * _weight_chances(len(differences))
    rejected = int(np.searchsorted(doubled, alpha, side="right")) - 1
    if rejected < 0:
        return None
    return _lowest_centre(differences, rejected), -_lowest_centre(-differences, rejected)


def centre(differences: Floats) -> float:
    """Where the weights on both sides balance: a median at heart, so no outlier moves it far."""
    half = (int(_scores(len(differences)).sum()) - 1) // 2
    return (_lowest_centre(differences, half) - _lowest_centre(-differences, half)) / 2.0


def p_value(differences: Floats) -> float:
    """Two-sided, of a centre of 0; at most alpha just where the interval excludes 0."""
    weights = []
    for values in (differences, -differences):
        averages = _walsh_averages(values)
        last = int(np.searchsorted(averages, 0.0, side="right")) - 1
        weights.append(_weight_after(values, averages, last))
    return min(1.0, float(2.0 * _weight_chances(len(differences))[min(weights)]))


def _scores(num_pairs: int) -> Ints:
    """By ascending distance from the supposed centre: 1, 2, ... up to the cut."""
    cut = max(_LOWEST_CUT, math.ceil(num_pairs / 3))
    return np.minimum(np.arange(1, num_pairs + 1), cut)


def _weight_chances(num_pairs: int) -> Floats:
    """Chance of each weight or a smaller one, if each score counts or not by a fair coin."""
    chances = np.ones(1)
    for score in _scores(num_pairs):
        counted = np.concatenate([np.zeros(score), chances])
        chances = (counted + np.concatenate([chances, np.zeros(score)])) / 2.0
    return np.cumsum(chances)


def _weight_below(differences: Floats, supposed: float) -> int:
    """Sum of the scores of those below the supposed centre. It never falls as that rises."""
    order = np.argsort(np.abs(differences - supposed))
    return int(_scores(len(differences))[differences[order] < supposed].sum())


def _walsh_averages(differences: Floats) -> Floats:
    """Means of each two and of each with itself, ascending: where the weight below can change."""
    row, column = np.triu_indices(len(differences))
    return np.unique((differences[row] + differences[column]) / 2.0)


def _weight_after(differences: Floats, averages: Floats, index: int) -> int:
    """The weight below a centre between this Walsh average and the next.

    Asked between them, for at an average two distances tie. There the larger weight counts, which
    is the cautious one.
    """
    if index < 0:
        return 0
    if index + 1 == len(averages):
        return int(_scores(len(differences)).sum())
    return _weight_below(differences, float(averages[index] + averages[index + 1]) / 2.0)


def _lowest_centre(differences: Floats, rejected: int) -> float:
    """The lowest centre whose weight below is more than `rejected`."""
    averages = _walsh_averages(differences)
    index = bisect_right(
        range(len(averages)),
        rejected,
        key=lambda index: _weight_after(differences, averages, index),
    )
    return float(averages[index])
