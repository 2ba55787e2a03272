"""What a load generator knows of what the dashboards show, panel by panel. It judges nothing.

A panel is named by its title and the legend of one of its queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loadgen.distribution import samples_needed
from loadgen.types import Record, Run
from serving.telemetry.panels import INSTANCE_LEGEND

OUTCOMES = ("stop", "length", "abort", "error", "timeout", "rejected")
STATUS = ("200", "400", "429", "500", "503")
ROUTE = "/v1/completions"
# The way there and back, and the client's own reading: no server can count them.
ON_THE_WAY_S = 0.003


@dataclass(frozen=True, slots=True)
class Total:
    """A number of events in the run; the panel shows it per second.

    `labels` pick the series of a query with several, which are added up.
    """

    title: str
    legend: str
    count: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Value:
    """A mean or a share; the client's may be so much larger for a reason of its own."""

    title: str
    legend: str
    value: float
    slack: float = 0.0


@dataclass(frozen=True, slots=True)
class Quantile:
    """One sample of the client's; the panel's is made of the buckets of `metric`."""

    title: str
    legend: str
    value: float
    metric: str
    is_known: bool  # whether there were samples enough to speak of it, as the generator judges


Known = Total | Value | Quantile


def counts(run: Run) -> Iterator[Known]:
    """Yield what is true of any load, also of one that was refused in part."""
    statuses = Counter(
        "200" if record.ok else record.error.removeprefix("http_") for record in run.records
    )
    ends = Counter(record.finish_reason for record in run.records if record.ok)
    num_refused = statuses["429"] + statuses["503"]
    ends["rejected"] += num_refused
    for outcome in OUTCOMES:
        yield Total("Requests ended", "{{outcome}}", ends[outcome], {"outcome": outcome})
    for status in STATUS:
        labels = {"route": ROUTE, "status": status}
        yield Total("HTTP answers", "{{route}} {{status}}", statuses[status], labels)
    yield Total("Refused", "{{reason}}", num_refused)
    yield Total("Failures in the model", INSTANCE_LEGEND, 0)


def everything(run: Run) -> Iterator[Known]:
    """Yield what is true of a load that was served as a whole."""
    yield from counts(run)
    done = run.records
    num_prompt = sum(record.num_prompt_tokens for record in done)
    num_cached = sum(record.num_cached_tokens or 0 for record in done)
    yield Total("Tokens", "prompt tokens/s", num_prompt)
    yield Total("Tokens", "generated tokens/s", sum(record.num_output_tokens for record in done))
    yield Total("Prompt tokens", "cached/s", num_cached)
    yield Total("Prompt tokens", "computed/s", num_prompt - num_cached)
    yield Value("Prefix hits", "Prefix hits", num_cached / num_prompt)
    for (title, metric), samples in _samples(done).items():
        slack = ON_THE_WAY_S if title in ("Time to first token", "End to end") else 0.0
        yield Value(title, "mean", float(np.mean(samples)), slack)
        for percent in (50, 90, 99):
            # The sample in whose bucket Prometheus's quantile lies, if both saw the same.
            sample = np.percentile(samples, percent, method="inverted_cdf")
            is_known = len(samples) >= samples_needed(f"p{percent}")
            yield Quantile(title, f"p{percent}", float(sample), metric, is_known)


def _samples(done: Sequence[Record]) -> dict[tuple[str, str], list[float]]:
    """Return what was measured, by the panel and the metric behind it."""
    return {
        ("Time to first token", "time_to_first_token_seconds"): [
            record.ttft_s - _lag_s(record) for record in done
        ],
        ("Inter-token latency", "inter_token_latency_seconds"): [
            gap_s for record in done for gap_s in record.gaps_s
        ],
        ("Time per output token", "time_per_output_token_seconds"): [
            record.tpot_s for record in done if record.tpot_s is not None
        ],
        ("End to end", "e2e_latency_seconds"): [record.e2e_s - _lag_s(record) for record in done],
        ("Decode", "decode_time_seconds"): [math.fsum(record.gaps_s) for record in done],
        ("Prompt tokens of a request", "request_prompt_tokens"): [
            float(record.num_prompt_tokens) for record in done
        ],
        ("Generated tokens of a request", "request_generation_tokens"): [
            float(record.num_output_tokens) for record in done
        ],
    }


def _lag_s(record: Record) -> float:
    """Return how late it was sent: the generator counts that, and no server can see it."""
    return record.sent_at_s - record.intended_at_s
