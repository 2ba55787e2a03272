"""How values are written, for the terminal and the page alike: numbers, rows, warnings.

Whatever came from a server or a file passes through `plain` before it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from loadgen.distribution import PERCENTILES, Distribution, samples_needed
from loadgen.fairness import Fairness
from loadgen.metrics import Summary
from loadgen.shown import plain as plain
from loadgen.types import Run

REFUSED = "–"  # noqa: RUF001 (a dash that is as wide as a digit)
LATENCY_COLUMNS = ("", "mean", "sd", *PERCENTILES, "max", "samples")
WORKLOAD_FACTS = ("left out", "shortened", "reuse", "reuse, LRU")


def number(value: float) -> str:
    """Write three figures or all whole ones: 0.123, 1.23, 12.3, 1,234."""
    size = abs(float(f"{value:.3g}"))
    digits = 0 if size >= 100 or size < 0.0005 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "under 0.01 %"
    return f"{number(100 * share)} %"


def duration(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"


def bound(seconds: float) -> str:
    """Write a limit that somebody chose, as it was chosen: 1 s, 50 ms."""
    return f"{seconds:g} s" if seconds >= 1 else f"{1000 * seconds:g} ms"


def plural(num: int, noun: str) -> str:
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"


def latencies(summary: Summary) -> list[tuple[str, Distribution]]:
    return [
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("E2E", summary.e2e),
    ]


def unit(*latencies: Distribution) -> str:
    """Choose one unit for a measure, of one run or of several beside each other."""
    return "s" if any((latency.p50_s or 0.0) >= 10 for latency in latencies) else "ms"


def latency_row(name: str, latency: Distribution, unit: str) -> list[str]:
    """One row under `LATENCY_COLUMNS`."""
    scale = 1 if unit == "s" else 1000
    values = [latency.mean_s, latency.std_s, *map(latency.percentile_s, PERCENTILES), latency.max_s]
    cells = [REFUSED if v is None else number(scale * v) for v in values]
    return [f"{name} {unit}", *cells, f"{latency.num:,}"]


def refusals(summary: Summary) -> str:
    """Say why percentiles are missing; empty if none is."""
    missing = {name for _, latency in latencies(summary) for name in latency.refused}
    needs = [f"{name} {samples_needed(name):,}" for name in PERCENTILES if name in missing]
    return f"{REFUSED} too few samples; needed: {', '.join(needs)}" if needs else ""


def answered(summary: Summary) -> str:
    done = summary.throughput
    failed = done.num_requests - done.num_ok
    of = f"{done.num_ok:,} of {plural(done.num_requests, 'request')} answered"
    return f"{of} in {duration(done.duration_s)}" + (f", {failed:,} failed" if failed else "")


def workload_lines(run: Run) -> list[str]:
    """Say what was done to a trace, and what can be expected of it."""
    return [f"{name}: {run.facts[name]}" for name in WORKLOAD_FACTS if name in run.facts]


def throughput_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What, how much, remark."""
    done, good, stalls = summary.throughput, summary.goodput, summary.stalls
    cached = "" if done.hit_rate is None else f"{percent(done.hit_rate)} from the cache"
    event = done.tokens_per_event or 1.0
    pieces = f"ITL is per event of {number(event)} tokens" if event > 1.1 else ""
    rows = [
        ("requests", f"{number(done.requests_per_s)} /s", ""),
        ("input tokens", f"{number(done.input_tokens_per_s)} /s", cached),
        ("output tokens", f"{number(done.output_tokens_per_s)} /s", pieces),
    ]
    if good is not None:
        kept = f"{percent(good.share)} within {objectives(summary)}"
        rows.append(("goodput", f"{number(good.requests_per_s)} /s", kept))
    if stalls.num:
        longest = f"in {plural(stalls.num_requests, 'request')}, {_longest(summary)}"
        over = f"over {duration(stalls.threshold_s)}, {longest}"
        rows.append(("stalls", f"{stalls.num:,}", over))
    if summary.lag is not None:
        rows.append(("own lag", *_lag_cells(summary)))
    return rows


def _longest(summary: Summary) -> str:
    return f"the longest {duration(summary.stalls.longest_s or 0.0)}"


def _lag_cells(summary: Summary) -> tuple[str, str]:
    lag = summary.lag
    assert lag is not None
    tail = "" if lag.seconds.p99_s is None else f"p99 {duration(lag.seconds.p99_s)}, "
    share = "" if lag.share_of_ttft is None else f"; {percent(lag.share_of_ttft)} of the mean TTFT"
    return (
        duration(lag.seconds.p50_s or 0.0),
        f"the median; {tail}max {duration(lag.seconds.max_s or 0.0)}{share}",
    )


def objectives(summary: Summary) -> str:
    """Write the SLOs in one line."""
    if summary.goodput is None:
        return ""
    limits = asdict(summary.goodput.slo)
    given = [(name, limit_s) for name, limit_s in limits.items() if limit_s is not None]
    return ", ".join(f"{name[:-2].upper()} {bound(limit_s)}" for name, limit_s in given) or "no SLO"


def warnings(summary: Summary) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    if summary.interrupted:
        unsent = plural(summary.num_unsent, "request")
        said.append(f"Interrupted: {unsent} of the plan never sent; the numbers are of the rest.")
    if not summary.throughput.num_requests:
        said.append("No request was sent: there is nothing to measure.")
    elif not summary.throughput.num_ok:
        said.append("No request succeeded.")
    if summary.lag is not None and summary.lag.fell_behind:
        behind, share = summary.lag.behind, summary.lag.share_of_ttft or 0.0
        amount = f"{percent(behind)} of its plan's length" if behind else "its whole plan"
        said.append(
            f"The load generator fell behind by {amount}: the load was not the one intended, and "
            f"its own lag is {percent(share)} of the mean TTFT. Lower the rate."
        )
    return said


def fairness_line(fair: Fairness) -> str:
    """Jain's index and the largest gap; empty with fewer than two tenants."""
    if len(fair.tenants) < 2:
        return ""
    jain = "" if fair.jain_index is None else f"Jain's index {fair.jain_index:.3f}"
    gap = fair.largest_gap
    if gap is None:
        return f"{jain}; no two tenants were backlogged at once"
    a, b = (plain(name, 18) for name in gap.tenants)
    return (
        f"{jain}; largest service gap {number(gap.service)}, "
        f"of {a} and {b} at {gap.start_s:.1f}–{gap.end_s:.1f} s"  # noqa: RUF001 (a range)
    )


TENANT_COLUMNS = ("tenant", "weight", "requests", "failed", "input", "output", "TTFT ms", "service")


def tenant_rows(fair: Fairness, limit: int) -> list[list[str]]:
    """Rows under `TENANT_COLUMNS`, the most served first."""
    ordered = sorted(fair.tenants, key=lambda tenant: (-tenant.service, tenant.name))
    return [
        [
            plain(tenant.name, 24),
            number(tenant.weight),
            f"{tenant.num_requests:,}",
            f"{tenant.num_failed:,}",
            f"{tenant.num_input_tokens:,}",
            f"{tenant.num_output_tokens:,}",
            REFUSED if tenant.mean_ttft_s is None else number(1000 * tenant.mean_ttft_s),
            f"{tenant.service:,.0f}",
        ]
        for tenant in ordered[:limit]
    ]


def more(rows: Sequence[object], limit: int) -> str:
    """Say how many rows a table leaves out; empty if none."""
    return f"and {len(rows) - limit:,} more" if len(rows) > limit else ""
