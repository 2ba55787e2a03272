"""When requests are meant to be sent: a renewal process, seconds from the start of the run.

The times are fixed before the run and know nothing of the server. The first is always 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loadgen.types import LoadError

FloatArray = npt.NDArray[np.float64]
Gaps = Callable[[np.random.Generator, float, float, int], FloatArray]  # rng, rate, cv, how many

MOST = 10_000_000  # requests of a run
_LEAST_RATE = 1e-9  # one in 32 years; an infinite one sends all at once
_LEAST_CV, _MOST_CV = 1e-3, 1e3

_CHUNK = 1024  # gaps drawn at once: a longer run with the same seed begins as the shorter one


def constant(_rng: np.random.Generator, rate: float, _cv: float, num: int) -> FloatArray:
    return np.full(num, 1.0 / rate)


def poisson(rng: np.random.Generator, rate: float, _cv: float, num: int) -> FloatArray:
    return rng.exponential(1.0 / rate, num)


def gamma(rng: np.random.Generator, rate: float, cv: float, num: int) -> FloatArray:
    """Gaps of mean 1 / rate and coefficient of variation `cv`; more than 1 comes in bursts."""
    return rng.gamma(1.0 / cv**2, cv**2 / rate, num)


ARRIVALS: dict[str, Gaps] = {"constant": constant, "poisson": poisson, "gamma": gamma}


def start_times(
    name: str,
    rng: np.random.Generator,
    *,
    rate: float,
    cv: float = 1.0,
    num: int | None = None,
    duration_s: float | None = None,
) -> list[float]:
    """Return `num` times, or all those before `duration_s`, or what both allow.

    `rate` is per second; infinite means all at 0. Raises LoadError for an unknown name, a rate or
    cv that is not positive, and bounds that leave no request or no end.
    """
    _check(name, rate, cv, num, duration_s)
    max_num = math.inf if num is None else num
    end_s = math.inf if duration_s is None else duration_s
    times = np.zeros(1)
    while len(times) < max_num and times[-1] < end_s:
        gaps = ARRIVALS[name](rng, rate, cv, _CHUNK)
        times = np.concatenate([times, times[-1] + np.cumsum(gaps)])
    kept: list[float] = times[times < end_s][:num].tolist()
    return kept


def scaled(times_s: list[float], speed: float) -> list[float]:
    """Replay `times_s`, ascending, from 0 and `speed` times as fast."""
    return [(time_s - times_s[0]) / speed for time_s in times_s]


def _check(name: str, rate: float, cv: float, num: int | None, duration_s: float | None) -> None:
    if name not in ARRIVALS:
        raise LoadError(f"unknown arrivals {name!r}", f"choose from {', '.join(ARRIVALS)}")
    if not (rate >= _LEAST_RATE and _LEAST_CV <= cv <= _MOST_CV):
        raise LoadError(
            f"rate {rate:g} with cv {cv:g} is no process",
            f"give a rate above 0, and a cv from {_LEAST_CV:g} to {_MOST_CV:g}",
        )
    if (num is not None and num < 1) or (duration_s is not None and not duration_s > 0):
        raise LoadError("the run would hold no request", "ask for at least one, or for some time")
    unbounded_s = duration_s is None or math.isinf(duration_s) or math.isinf(rate)
    if num is None and unbounded_s:
        raise LoadError("the run would never end", "give a number of requests or a duration")
    if min(math.inf if num is None else num, rate * (duration_s or math.inf)) > MOST:
        raise LoadError(f"the run would hold more than {MOST:,} requests", "ask for fewer")
