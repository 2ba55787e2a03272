"""Start times: exact where they are fixed, mean and spread where they are drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadgen.types import LoadError
from loadgen.workload.arrivals import ARRIVALS, scaled, start_times


def rng():
    return np.random.default_rng(7)


def test_constant_arrivals_are_evenly_spaced_from_zero():
    assert start_times("constant", rng(), rate=4.0, num=4) == [0.0, 0.25, 0.5, 0.75]


def test_a_duration_takes_what_starts_before_its_end():
    assert start_times("constant", rng(), rate=4.0, duration_s=1.0) == [0.0, 0.25, 0.5, 0.75]
    assert len(start_times("constant", rng(), rate=2.0, duration_s=1000.0)) == 2000


def test_of_two_bounds_the_tighter_one_holds():
    assert len(start_times("constant", rng(), rate=4.0, num=3, duration_s=9.0)) == 3
    assert len(start_times("constant", rng(), rate=4.0, num=99, duration_s=1.0)) == 4


@pytest.mark.parametrize(("name", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 4.0)])
def test_drawn_gaps_have_the_mean_and_spread_that_were_asked_for(name, cv):
    times = start_times(name, rng(), rate=20.0, cv=cv, num=40_000)
    gaps = np.diff(times)
    # The mean of n gaps has a standard error of cv / sqrt(n), which is 2 % for cv 4.
    assert gaps.mean() == pytest.approx(1 / 20, rel=4 * cv / math.sqrt(len(gaps)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert times == sorted(times)


def test_poisson_gaps_are_exponential_and_gamma_ones_are_not():
    def share_above_mean(name):
        gaps = np.diff(start_times(name, rng(), rate=1.0, cv=4.0, num=20_000))
        return float((gaps > 1.0).mean())

    assert share_above_mean("poisson") == pytest.approx(math.exp(-1), abs=0.02)
    assert share_above_mean("gamma") < 0.2  # most of a burst comes at once


@pytest.mark.parametrize("name", ARRIVALS)
def test_the_seed_decides_and_a_longer_run_begins_as_the_shorter(name):
    short = start_times(name, rng(), rate=5.0, cv=2.0, num=100)
    long = start_times(name, rng(), rate=5.0, cv=2.0, num=5000)
    timed = start_times(name, rng(), rate=5.0, cv=2.0, duration_s=200.0)
    assert long[:100] == short
    assert timed == long[: len(timed)]


def test_an_infinite_rate_sends_all_at_once():
    assert start_times("poisson", rng(), rate=math.inf, num=3) == [0.0, 0.0, 0.0]


def test_times_are_scaled_from_their_first():
    assert scaled([10.0, 12.0, 20.0], 2.0) == [0.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("name", "bounds", "cause"),
    [
        ("bursty", {"rate": 1.0, "num": 1}, "unknown arrivals 'bursty'"),
        ("poisson", {"rate": 0.0, "num": 1}, "rate 0"),
        ("gamma", {"rate": 1.0, "cv": 0.0, "num": 1}, "cv 0"),
        ("poisson", {"rate": math.nan, "num": 1}, "rate nan"),
        ("poisson", {"rate": 1.0, "num": 0}, "no request"),
        ("poisson", {"rate": 1.0, "duration_s": 0.0}, "no request"),
        ("poisson", {"rate": 1.0}, "never end"),
        ("poisson", {"rate": math.inf, "duration_s": 5.0}, "never end"),
        ("poisson", {"rate": 1e-310, "num": 2}, "rate 1e-310"),
        ("gamma", {"rate": 1.0, "cv": 1e-200, "num": 2}, "cv 1e-200"),
        ("gamma", {"rate": 1.0, "cv": 1e200, "num": 2}, "cv 1e+200"),
        ("poisson", {"rate": 1e300, "duration_s": 5.0}, "more than 10,000,000 requests"),
        ("poisson", {"rate": 1.0, "num": 10**12}, "more than 10,000,000 requests"),
    ],
)
def test_mistakes_are_named(name, bounds, cause):
    with pytest.raises(LoadError) as caught:
        start_times(name, rng(), **bounds)
    assert cause in caught.value.cause
    assert caught.value.remedy
