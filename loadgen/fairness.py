"""Who was served how much: service of each tenant over time, Jain's index, the largest gap.

Service is W = w_in x prompt tokens + w_out x output tokens, as in "Fairness in serving large
language models" (VTC; Sheng et al., OSDI 2024), seen from the client: a prompt is served when its
first text comes, and output tokens come in equal parts with each event that brings text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadgen.types import Record

Floats = NDArray[np.float64]
Spans = list[tuple[float, float]]  # seconds; disjoint, ascending

INPUT_WEIGHT = 1.0  # of a token, as in the paper's experiments
OUTPUT_WEIGHT = 2.0
NUM_POINTS = 200  # of a time line


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str
    weight: float
    num_requests: int
    num_failed: int
    num_input_tokens: int
    num_output_tokens: int
    mean_ttft_s: float | None
    service: float  # weighted tokens, received; not divided by the tenant's weight
    service_over_time: tuple[float, ...]  # up to each of `Fairness.times_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceGap:
    """How far two tenants drew apart within one span in which both were backlogged."""

    tenants: tuple[str, str]
    service: float  # each tenant's divided by its weight
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """None: there is nothing to compare.

    Jain's index says how equal the totals are, 1/n to 1; it is no judgement of a server to which
    the tenants sent unequal loads. The gap is: it looks only at times when both wanted service.
    """

    tenants: tuple[Tenant, ...]  # by name
    times_s: tuple[float, ...]
    jain_index: float | None
    largest_gap: ServiceGap | None


@dataclass(frozen=True, slots=True)
class _Received:
    """The service that one tenant received, as steps, and when it was backlogged."""

    times_s: Floats
    amounts: Floats
    backlogged: Spans


def fairness(
    records: Sequence[Record], duration_s: float, weights: Mapping[str, float] | None = None
) -> Fairness:
    by_tenant: dict[str, list[Record]] = {}
    for record in records:
        by_tenant.setdefault(record.tenant, []).append(record)
    names = sorted(by_tenant)
    weight = {name: (weights or {}).get(name, 1.0) for name in names}
    received = {name: _received(by_tenant[name]) for name in names}
    times_s = np.linspace(0.0, max(duration_s, 0.0), NUM_POINTS)
    tenants = tuple(
        _tenant(name, by_tenant[name], weight[name], received[name], times_s) for name in names
    )
    return Fairness(
        tenants=tenants,
        times_s=tuple(times_s.tolist()),
        jain_index=jain_index([tenant.service / tenant.weight for tenant in tenants]),
        largest_gap=_largest_gap(received, weight),
    )


def jain_index(shares: Sequence[float]) -> float | None:
    """Return (sum x)^2 / (n sum x^2): Jain, Chiu, Hawe, DEC-TR-301, 1984. None: nobody has any."""
    x = np.asarray(shares, dtype=np.float64)
    if not x.any():
        return None
    x = x / x.max()  # the index has no unit; this keeps the squares in range
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def _tenant(
    name: str, records: list[Record], weight: float, received: _Received, times_s: Floats
) -> Tenant:
    ttfts_s = [record.ttft_s for record in records if record.received_at_s]
    totals = np.concatenate([[0.0], np.cumsum(received.amounts)])
    over_time = totals[np.searchsorted(received.times_s, times_s, side="right")]
    return Tenant(
        name=name,
        weight=weight,
        num_requests=len(records),
        num_failed=sum(not record.ok for record in records),
        num_input_tokens=sum(record.num_prompt_tokens for record in records),
        num_output_tokens=sum(record.num_output_tokens for record in records),
        mean_ttft_s=float(np.mean(ttfts_s)) if ttfts_s else None,
        service=float(totals[-1]),
        service_over_time=tuple(over_time.tolist()),
    )


def service_steps(record: Record) -> list[tuple[float, float, float]]:
    """Return when how many prompt tokens and output tokens of a request were served."""
    times_s = record.received_at_s
    if not times_s:
        served = (record.end_at_s, float(record.num_prompt_tokens), float(record.num_output_tokens))
        return [served] if record.ok else []
    each = record.num_output_tokens / len(times_s)
    first = (times_s[0], float(record.num_prompt_tokens), each)
    return [first] + [(time_s, 0.0, each) for time_s in times_s[1:]]


def _received(records: list[Record]) -> _Received:
    steps = [
        (time_s, INPUT_WEIGHT * prompt + OUTPUT_WEIGHT * output)
        for record in records
        for time_s, prompt, output in service_steps(record)
    ]
    table = np.array(steps, dtype=np.float64).reshape(-1, 2)
    table = table[np.argsort(table[:, 0], kind="stable")]
    spans = [(record.sent_at_s, record.end_at_s) for record in records]
    return _Received(table[:, 0], table[:, 1], _merged(spans))


def _merged(spans: Spans) -> Spans:
    merged: Spans = []
    for start_s, end_s in sorted(spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        elif start_s < end_s:
            merged.append((start_s, end_s))
    return merged


def _both(ours: Spans, theirs: Spans) -> Spans:
    """Return where two lists of spans overlap."""
    overlaps: Spans = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        start_s = max(ours[i][0], theirs[j][0])
        end_s = min(ours[i][1], theirs[j][1])
        if start_s < end_s:
            overlaps.append((start_s, end_s))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return overlaps


def _largest_gap(
    received: Mapping[str, _Received], weight: Mapping[str, float]
) -> ServiceGap | None:
    """Return the largest |W_a(t1, t2) - W_b(t1, t2)| over spans in which both are backlogged.

    A client cannot see the server's queue: backlogged is who has a request sent and not ended.
    """
    gaps = [
        gap
        for a, b in itertools.combinations(received, 2)
        if (gap := _widest(a, b, received, weight)) is not None
    ]
    return max(gaps, key=lambda gap: gap.service, default=None)


def _widest(
    a: str, b: str, received: Mapping[str, _Received], weight: Mapping[str, float]
) -> ServiceGap | None:
    overlaps = _both(received[a].backlogged, received[b].backlogged)
    if not overlaps:
        return None
    moments_s, place = np.unique(
        np.concatenate([received[a].times_s, received[b].times_s]), return_inverse=True
    )
    shares = [received[a].amounts / weight[a], -received[b].amounts / weight[b]]
    steps = np.bincount(place, weights=np.concatenate(shares), minlength=len(moments_s))
    ahead = np.concatenate([[0.0], np.cumsum(steps)])  # [k]: a's lead after k moments
    # Within a span, the largest lead gained or lost between two times is the lead's range there.
    before = np.searchsorted(moments_s, [start for start, _ in overlaps], side="left")
    after = np.searchsorted(moments_s, [end for _, end in overlaps], side="right")
    bounds = np.stack([before, after + 1], axis=1).ravel()  # reduceat: every other slice is ours
    padded = np.append(ahead, ahead[-1])
    ranges = (np.maximum.reduceat(padded, bounds) - np.minimum.reduceat(padded, bounds))[::2]
    widest = int(np.argmax(ranges))
    start_s, end_s = overlaps[widest]
    return ServiceGap(tenants=(a, b), service=float(ranges[widest]), start_s=start_s, end_s=end_s)
