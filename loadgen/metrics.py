"""What a run measured: latencies, throughput, goodput, errors, stalls, the generator's own lag.

Owns the definitions of the measures. It never draws and never reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from loadgen.distribution import Distribution, distribution
from loadgen.fairness import Fairness, fairness
from loadgen.types import LoadError, Record, Run

MAX_BEHIND = 0.01  # a run further behind than this share of its plan fell behind
MIN_BEHIND_S = 0.001  # and by at least this
MAX_LAG_SHARE = 0.1  # of the mean TTFT; or one whose own lag is more than this of what it measured
STALL_S = 1.0  # a gap is a stall above this and above so many medians of ITL
STALL_MEDIANS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What one request must keep to be good; None: nothing asked. `itl_s` bounds its longest gap.

    TPOT and ITL ask nothing of an answer of one token; an answer without text has the TTFT of its
    end.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, words: Iterable[str]) -> Slo:
        """Read `ttft:200 tpot:50`: milliseconds, as `vllm bench serve --goodput` takes them.

        Raises LoadError.
        """
        bounds_s: dict[str, float] = {}
        known = [field.name.removesuffix("_s") for field in fields(cls)]
        for word in words:
            name, _, value = word.partition(":")
            try:
                bounds_s[f"{name}_s"] = bound_s = float(value) / 1000
            except ValueError:
                bound_s = 0.0
            if name not in known or not 0 < bound_s < math.inf:
                remedy = f"give milliseconds, as in ttft:200, to one of {', '.join(known)}"
                raise LoadError(f"not an objective: {word!r}", remedy)
        return cls(**bounds_s)

    def met_by(self, record: Record) -> bool:
        if not record.ok:
            return False
        first_at_s = record.received_at_s[0] if record.received_at_s else record.end_at_s
        pairs = (
            (first_at_s - record.intended_at_s, self.ttft_s),
            (record.tpot_s, self.tpot_s),
            (max(record.gaps_s, default=None), self.itl_s),
            (record.e2e_s, self.e2e_s),
        )
        return all(value is None or bound is None or value <= bound for value, bound in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Of the requests that succeeded, over the whole run."""

    duration_s: float
    num_requests: int  # the failed ones too
    num_ok: int
    requests_per_s: float
    num_input_tokens: int
    num_output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    num_cached_tokens: int | None  # None: no answer told
    hit_rate: float | None  # cached, of the prompt tokens; None: one of the two is unknown
    tokens_per_event: float | None  # ITL is between events: above 1, it is not between tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    slo: Slo
    num_good: int
    requests_per_s: float
    share: float  # of all requests; a failed one is not good


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorClass:
    name: str
    num: int
    example: str  # what the server said to one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalls:
    """Gaps between events that are longer than the threshold."""

    threshold_s: float
    num: int
    num_requests: int
    longest_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How late the generator itself sent. Every latency includes it.

    `behind` is the p99 of the lag as a share of the time over which the plan sends. A generator
    that reaches (1 - x) of the intended rate trails by x of the time that has passed, so this is
    the shortfall of the rate; and a burst that it could not follow shows, though it caught up.
    """

    seconds: Distribution
    behind: float
    fell_behind: bool  # by `MAX_BEHIND` or `MAX_LAG_SHARE`
    share_of_ttft: float | None  # mean lag, of the mean TTFT


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """TTFT and ITL are of every request that brought text, TPOT and E2E of those that succeeded."""

    name: str
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    throughput: Throughput
    goodput: Goodput | None
    errors: tuple[ErrorClass, ...]  # the most frequent first
    stalls: Stalls
    lag: Lag | None  # None: a closed loop has none
    fairness: Fairness
    interrupted: bool
    num_unsent: int


def summarize(
    run: Run,
    slo: Slo | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    stall_s: float | None = None,
) -> Summary:
    """Measure a run. `weights` are of tenants (default 1), `stall_s` the least gap that stalls."""
    records = run.records
    itl = distribution(gap for record in records for gap in record.gaps_s)
    ttft = distribution(record.ttft_s for record in records if record.received_at_s)
    if stall_s is None:
        stall_s = max(STALL_S, STALL_MEDIANS * (itl.p50_s or 0.0))
    tpots_s = (record.tpot_s for record in records if record.ok)
    return Summary(
        name=run.name,
        ttft=ttft,
        tpot=distribution(tpot_s for tpot_s in tpots_s if tpot_s is not None),
        itl=itl,
        e2e=distribution(record.e2e_s for record in records if record.ok),
        throughput=_throughput(run),
        goodput=None if slo is None else _goodput(run, slo),
        errors=_errors(records),
        stalls=_stalls(records, stall_s),
        lag=_lag(run, ttft.mean_s),
        fairness=fairness(records, run.duration_s, weights),
        interrupted=run.interrupted,
        num_unsent=run.num_unsent,
    )


def _per_s(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _throughput(run: Run) -> Throughput:
    done = [record for record in run.records if record.ok]
    num_input = sum(record.num_prompt_tokens for record in done)
    num_output = sum(record.num_output_tokens for record in done)
    # A server may tell only of answers that hit: where it says nothing, none did.
    told = [it.num_cached_tokens for it in done if it.num_cached_tokens is not None]
    num_cached = sum(told) if told else None
    num_events = sum(len(record.received_at_s) for record in done)
    return Throughput(
        duration_s=run.duration_s,
        num_requests=len(run.records),
        num_ok=len(done),
        requests_per_s=_per_s(len(done), run.duration_s),
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        input_tokens_per_s=_per_s(num_input, run.duration_s),
        output_tokens_per_s=_per_s(num_output, run.duration_s),
        num_cached_tokens=num_cached,
        hit_rate=num_cached / num_input if num_input and num_cached is not None else None,
        tokens_per_event=num_output / num_events if num_events else None,
    )


def _goodput(run: Run, slo: Slo) -> Goodput:
    num_good = sum(slo.met_by(record) for record in run.records)
    return Goodput(
        slo=slo,
        num_good=num_good,
        requests_per_s=_per_s(num_good, run.duration_s),
        share=num_good / max(1, len(run.records)),
    )


def _errors(records: Sequence[Record]) -> tuple[ErrorClass, ...]:
    details: dict[str, list[str]] = {}
    for record in records:
        if not record.ok:
            details.setdefault(record.error, []).append(record.detail)
    classes = [
        ErrorClass(name=name, num=len(said), example=next(filter(None, said), ""))
        for name, said in details.items()
    ]
    return tuple(sorted(classes, key=lambda error: (-error.num, error.name)))


def _stalls(records: Sequence[Record], threshold_s: float) -> Stalls:
    found = [[gap for gap in record.gaps_s if gap > threshold_s] for record in records]
    gaps_s = [gap for gaps in found for gap in gaps]
    return Stalls(
        threshold_s=threshold_s,
        num=len(gaps_s),
        num_requests=sum(map(bool, found)),
        longest_s=max(gaps_s, default=None),
    )


def _lag(run: Run, mean_ttft_s: float | None) -> Lag | None:
    if not run.lags_s:
        return None
    arrivals_s = [record.intended_at_s for record in run.records if record.turn == 0]
    span_s = max(arrivals_s, default=0.0) - min(arrivals_s, default=0.0)
    seconds = distribution(run.lags_s)
    # Of few samples too: what is refused as a result may still be a reason for caution.
    late_s = max(0.0, float(np.percentile(run.lags_s, 99)))
    behind = late_s / span_s if span_s > 0 else 0.0
    share = float(np.mean(run.lags_s)) / mean_ttft_s if mean_ttft_s else None
    fell_behind = late_s > MIN_BEHIND_S and (behind > MAX_BEHIND or (share or 0.0) > MAX_LAG_SHARE)
    return Lag(seconds=seconds, behind=behind, fell_behind=fell_behind, share_of_ttft=share)
