"""How many tokens: distributions, and the one-line specs a user writes for them.

    128                          always 128
    uniform:16-256               every length from 16 to 256 alike
    lognormal:200,cv=1.0         of mean 200; the standard deviation is cv times the mean
    lognormal:p50=74,p99=3388    by its median and 99th percentile
    file:PATH                    drawn from a file with one number a line
    file:PATH,column=NAME        drawn from a column of a CSV file with a header
    short, medium, long          Llumnix's power laws of mean 128, 256, 512

A lognormal takes `,max=N` too. Files may be .gz. Every length is at least 1.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loadgen.shown import plain
from loadgen.types import LoadError
from loadgen.workload.lines import read_lines

IntArray = npt.NDArray[np.int64]

_P99_Z = 2.3263478740408408  # of the standard normal distribution
MOST_TOKENS = 10_000_000  # of one length: more than any model reads, and still quick to make
_MOST_DIGITS = len(str(MOST_TOKENS))
_LEAST = 1e-9  # of the numbers of a lognormal
_POWER_LAWS = {"short": (128, 2.0), "medium": (256, 1.5), "long": (512, 1.15)}  # mean, alpha
_POWER_LAW_MAX = 6144
_REMEDY = (
    "write 128, uniform:16-256, lognormal:200,cv=1.0, lognormal:p50=74,p99=3388, "
    "file:PATH[,column=NAME], short, medium or long"
)


class Lengths(Protocol):
    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        """Return `num` independent lengths in tokens, each at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    length: int

    def sample(self, _rng: np.random.Generator, num: int) -> IntArray:
        return np.full(num, self.length, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    low: int
    high: int  # included

    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        return rng.integers(self.low, self.high, num, dtype=np.int64, endpoint=True)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """`exp` of a normal distribution, rounded, and held between 1 and `maximum`."""

    mu: float
    sigma: float
    maximum: int = MOST_TOKENS

    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        drawn = np.rint(rng.lognormal(self.mu, self.sigma, num))
        return np.clip(drawn, 1, self.maximum).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Drawn with replacement from lengths that were seen."""

    lengths: tuple[int, ...]

    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        return rng.choice(np.array(self.lengths, dtype=np.int64), num)


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Ranks 1 to 2 * mean - 1 drawn by a Zipf law, scaled up to the mean, cut at 6144.

    As the artifact of Llumnix (OSDI'24) draws them, but for one thing: that scales by the mean of
    the sample, this by the mean of the law, so that a length does not depend on the others. The
    cut comes last and takes a little off the mean.
    """

    mean: int
    alpha: float

    def sample(self, rng: np.random.Generator, num: int) -> IntArray:
        ranks, shares = self.law()
        scale = self.mean / float(ranks @ shares)
        drawn = np.ceil(rng.choice(ranks, num, p=shares) * scale)
        return np.minimum(drawn, _POWER_LAW_MAX).astype(np.int64)

    def law(self) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """Return the ranks and the probability of each."""
        ranks = np.arange(1, 2 * self.mean, dtype=np.int64)
        shares = ranks**-self.alpha
        return ranks, shares / shares.sum()


def parse_lengths(spec: str) -> Lengths:
    """Read a spec as the head of this file lists them. Raises LoadError for any other."""
    kind, _, rest = spec.strip().partition(":")
    if not rest and kind in _POWER_LAWS:
        return PowerLaw(*_POWER_LAWS[kind])
    if not rest and kind.isdecimal() and (length := _whole(spec, kind)) >= 1:
        return Fixed(length)
    if kind == "uniform":
        return _uniform(spec, rest)
    if kind == "lognormal":
        return _lognormal(spec, rest)
    if kind == "file" and rest:
        path, _, column = rest.partition(",column=")
        return Empirical(read_lengths(Path(path).expanduser(), column or None))
    raise _bad(spec, "no such form")


def fit_context(num_prompt: int, num_output: int, max_context: int | None) -> tuple[int, int]:
    """Shorten a prompt, and only then its answer, until both are `max_context` tokens together."""
    if max_context is None:
        return num_prompt, num_output
    num_output = min(num_output, max_context - 1)
    return min(num_prompt, max_context - num_output), num_output


def read_lengths(path: Path, column: str | None = None) -> tuple[int, ...]:
    """Read one length a line, or the named column of a CSV file. Raises LoadError."""
    lines = read_lines(path)
    place = 0
    if column is not None:
        number, line = next(lines, (1, ""))
        header = _cells(path, number, line)
        if column not in header:
            raise LoadError(
                f"{path}, line 1: no column {column!r}", f"its columns are {', '.join(header)}"
            )
        place = header.index(column)
    lengths = tuple(_length(path, number, line, place) for number, line in lines)
    if not lengths:
        raise LoadError(f"{path} holds no length", "give a file with one number a line")
    return lengths


def _length(path: Path, number: int, line: str, place: int) -> int:
    cells = _cells(path, number, line)
    text = cells[place].strip() if place < len(cells) else ""
    length = _decimal(text)
    if length is None or not 1 <= length <= MOST_TOKENS:
        raise LoadError(
            f"{path}, line {number}: {plain(repr(text))} is not a length in tokens",
            f"give whole numbers from 1 to {MOST_TOKENS:,}; for a table add ,column=NAME",
        )
    return length


def _cells(path: Path, number: int, line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error as error:  # a CR inside a line, a field of more than 128 KiB
        raise LoadError(f"{path}, line {number}: {error}", "mend or remove this line") from error


def _decimal(text: str) -> int | None:
    """Read a whole number; None for what is none, or is longer than any length."""
    return int(text) if text.isdecimal() and len(text.lstrip("0")) <= _MOST_DIGITS else None


def _whole(spec: str, text: str) -> int:
    length = _decimal(text)
    if length is None or length > MOST_TOKENS:
        raise _bad(spec, f"a length is at most {MOST_TOKENS:,}")
    return length


def _uniform(spec: str, rest: str) -> Uniform:
    match = re.fullmatch(r"(\d+)-(\d+)", rest)
    if not match:
        raise _bad(spec, "uniform takes LOW-HIGH")
    low, high = _whole(spec, match[1]), _whole(spec, match[2])
    if not 1 <= low <= high:
        raise _bad(spec, "it needs 1 <= LOW <= HIGH")
    return Uniform(low, high)


def _lognormal(spec: str, rest: str) -> Lognormal:
    fields = {}
    for part in rest.split(","):
        name, _, value = part.rpartition("=")
        try:
            fields[name.strip() or "mean"] = float(value)
        except ValueError:
            raise _bad(spec, f"{value!r} is not a number") from None
    maximum = fields.pop("max", float(MOST_TOKENS))
    numbers = (*fields.values(), maximum)
    if not all(_LEAST <= value <= MOST_TOKENS for value in numbers) or maximum < 1:
        raise _bad(spec, f"its numbers must be positive, and at most {MOST_TOKENS:,}")
    match sorted(fields):
        case ["cv", "mean"]:
            variance = math.log1p(fields["cv"] ** 2)
            mu = math.log(fields["mean"]) - variance / 2
            return Lognormal(mu, math.sqrt(variance), int(maximum))
        case ["p50", "p99"] if fields["p50"] < fields["p99"]:
            sigma = math.log(fields["p99"] / fields["p50"]) / _P99_Z
            return Lognormal(math.log(fields["p50"]), sigma, int(maximum))
    raise _bad(spec, "lognormal takes a mean and cv, or p50 below p99")


def _bad(spec: str, why: str) -> LoadError:
    return LoadError(f"{plain(repr(spec))} is not a length: {why}", _REMEDY)
