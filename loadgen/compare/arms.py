"""Runs two arms in turn, pair by pair, and hands their numbers to the statistics.

An arm is an endpoint, or a server that is started for each of its runs and stopped after it, so
that no run finds what another left in a cache.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from loadgen.compare.statistics import Comparison, Measure, ScheduledRun, compare
from loadgen.metrics import Summary
from loadgen.once import Asked, run_once
from loadgen.servers import running
from loadgen.shown import without_user
from loadgen.types import LoadError, Run

# What of a run is compared. Percentiles that a run is too short for are not comparable.
LATENCIES: dict[str, Callable[[Summary], float | None]] = {
    "ttft_p50": lambda summary: summary.ttft.p50_s,
    "ttft_p99": lambda summary: summary.ttft.p99_s,
    "tpot_p50": lambda summary: summary.tpot.p50_s,
    "itl_p50": lambda summary: summary.itl.p50_s,
    "itl_p99": lambda summary: summary.itl.p99_s,
    "e2e_p50": lambda summary: summary.e2e.p50_s,
}
MEASURES: dict[str, tuple[str, Callable[[Summary], float | None]]] = {
    **{name: ("s", read) for name, read in LATENCIES.items()},
    "output_tokens_per_s": ("tokens/s", lambda summary: summary.throughput.output_tokens_per_s),
    "goodput": (
        "requests/s",
        lambda summary: summary.goodput.requests_per_s if summary.goodput else None,
    ),
}
Result = tuple[ScheduledRun, Run, Summary]
# Latencies are of the requests that were answered: an arm that fails more of them than this is not
# the quicker one for it.
MAX_FAILED = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An endpoint (`url`), or a server to be started (`command`)."""

    name: str
    url: str | None = None
    command: str | None = None

    @asynccontextmanager
    async def served(self, stop: asyncio.Event) -> AsyncIterator[str]:
        if self.url is not None:
            yield self.url
        else:
            assert self.command is not None
            async with running(self.command, stop) as url:
                yield url


def arm(name: str, what: str, serve: str) -> Arm:
    """Read what the user typed: an address, or flags that are added to the command `serve`."""
    if what.startswith(("http://", "https://")):
        return Arm(name=without_user(name), url=what)
    return Arm(name=name, command=f"{serve} {what}".strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a reader has to know of all runs of an arm before believing its latencies."""

    num_runs: int
    num_requests: int
    num_failed: int
    num_behind: int  # runs in which the load generator fell behind its plan

    @property
    def failed(self) -> float:
        return self.num_failed / max(1, self.num_requests)


async def run_pairs(
    arms: Mapping[str, Arm],
    order: tuple[ScheduledRun, ...],
    asked_of: Callable[[ScheduledRun], Asked],
    take: Callable[[ScheduledRun, Run], None],
    stop: asyncio.Event,
) -> None:
    """Run all of `order`, or until `stop` is set; `take` gets each run that came to its end.

    `asked_of` must plan the same for both runs of a pair. Raises LoadError when a server does not
    start or answer.
    """
    for number, scheduled in enumerate(order):
        chosen = arms[scheduled.arm]
        title = f"run {number + 1} of {len(order)}, {scheduled.arm}"
        asked = asked_of(scheduled)
        try:
            async with chosen.served(stop) as url:
                run = await run_once(replace(asked, name=title, url=url), stop)
        except LoadError:
            if stop.is_set():
                return
            raise
        if run.interrupted:
            return
        take(scheduled, replace(run, name=f"{scheduled.arm}: {chosen.name}"))


def check_primary(primary: str, *, has_slo: bool) -> None:
    """Raise LoadError for a measure that no run could have."""
    if primary not in MEASURES:
        raise LoadError(f"there is no measure {primary}", f"name one of {', '.join(MEASURES)}")
    if primary == "goodput" and not has_slo:
        raise LoadError("goodput needs objectives", "give them, as in --slo ttft:200 tpot:50")


def check_measured(primary: str, summary: Summary) -> None:
    """Raise LoadError if a run is too short for the measure: the others are no longer."""
    if MEASURES[primary][1](summary) is None:
        raise LoadError(
            f"a run of {summary.throughput.num_requests:,} requests has no {primary}",
            "send more of them, or compare another measure with --primary",
        )


def whole_pairs(results: Sequence[Result]) -> list[Result]:
    """Return the results of which both runs of a pair are there."""
    seen = Counter(scheduled.pair for scheduled, _, _ in results)
    return [result for result in results if seen[result[0].pair] == 2]


def healths(results: Sequence[Result]) -> dict[str, Health]:
    """Return how the runs of each arm went."""
    found = {}
    for name in ("A", "B"):
        summaries = [summary for scheduled, _, summary in results if scheduled.arm == name]
        done = [summary.throughput for summary in summaries]
        found[name] = Health(
            num_runs=len(summaries),
            num_requests=sum(it.num_requests for it in done),
            num_failed=sum(it.num_requests - it.num_ok for it in done),
            num_behind=sum(bool(it.lag and it.lag.fell_behind) for it in summaries),
        )
    return found


def compared(results: Sequence[Result], primary: str) -> tuple[Comparison, ...]:
    """Compare what whole pairs measured. Raises LoadError if there is none."""
    if not results:
        raise LoadError("no pair of runs is complete", "let it run for longer")
    pairs: dict[int, dict[str, Summary]] = {}
    for scheduled, _, summary in results:
        pairs.setdefault(scheduled.pair, {})[scheduled.arm] = summary
    failing = ", ".join(
        f"{name} failed {health.num_failed:,} of {health.num_requests:,} requests"
        for name, health in healths(results).items()
        if health.failed > MAX_FAILED
    )
    measures = []
    for name in dict.fromkeys((primary, *MEASURES)):
        unit, read = MEASURES[name]
        a, b = ([read(pair[which]) for pair in pairs.values()] for which in ("A", "B"))
        if name == primary or any(value is not None for value in (*a, *b)):
            problem = failing if name in LATENCIES else ""
            measures.append(Measure(name=name, unit=unit, a=a, b=b, problem=problem))
    return compare(measures, primary)
