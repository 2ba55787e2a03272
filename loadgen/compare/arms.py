"""Runs two arms in turn, pair by pair, and hands their numbers to the statistics.

An arm is an endpoint, or a server that is started for each of its runs and stopped after it, so
that no run finds what another left in a cache.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from loadgen.compare.statistics import Comparison, Measure, ScheduledRun, compare
from loadgen.metrics import Summary
from loadgen.once import Asked, run_once
from loadgen.servers import running
from loadgen.types import LoadError, Plan, Run

# What of a run is compared. Percentiles that a run is too short for are not comparable.
MEASURES: dict[str, tuple[str, Callable[[Summary], float | None]]] = {
    "ttft_p50": ("s", lambda summary: summary.ttft.p50_s),
    "ttft_p99": ("s", lambda summary: summary.ttft.p99_s),
    "tpot_p50": ("s", lambda summary: summary.tpot.p50_s),
    "itl_p50": ("s", lambda summary: summary.itl.p50_s),
    "itl_p99": ("s", lambda summary: summary.itl.p99_s),
    "e2e_p50": ("s", lambda summary: summary.e2e.p50_s),
    "output_tokens_per_s": ("tokens/s", lambda summary: summary.throughput.output_tokens_per_s),
    "goodput": (
        "requests/s",
        lambda summary: summary.goodput.requests_per_s if summary.goodput else None,
    ),
}
Result = tuple[ScheduledRun, Run, Summary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An endpoint (`url`), or a server to be started (`command`)."""

    name: str
    url: str | None = None
    command: str | None = None

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        if self.url is not None:
            yield self.url
        else:
            assert self.command is not None
            async with running(self.command) as url:
                yield url


def arm(name: str, what: str, serve: str) -> Arm:
    """Read what the user typed: an address, or flags that are added to the command `serve`."""
    if what.startswith(("http://", "https://")):
        return Arm(name=name, url=what)
    return Arm(name=name, command=f"{serve} {what}".strip())


async def run_pairs(
    arms: Mapping[str, Arm],
    order: tuple[ScheduledRun, ...],
    plan_of: Callable[[int], Plan],
    asked: Asked,
    take: Callable[[ScheduledRun, Run], None],
) -> None:
    """Run all of `order`; `take` gets each run. Both runs of a pair play the same plan.

    Ends early, without an error, when a run was interrupted.
    """
    for number, scheduled in enumerate(order):
        chosen = arms[scheduled.arm]
        title = f"run {number + 1} of {len(order)}, {scheduled.arm}"
        async with chosen.served() as url:
            run = await run_once(
                replace(
                    asked, name=title, url=url, plan=plan_of(scheduled.seed), seed=scheduled.seed
                )
            )
        take(scheduled, replace(run, name=f"{scheduled.arm}: {chosen.name}"))
        if run.interrupted:
            return


def compared(
    results: list[Result], primary: str, names: tuple[str, ...] = tuple(MEASURES)
) -> tuple[Comparison, ...]:
    """Compare what whole pairs measured. Raises LoadError if there is no such measure or pair."""
    unknown = {primary, *names} - MEASURES.keys()
    if unknown:
        raise LoadError(
            f"there is no measure {', '.join(sorted(unknown))}",
            f"name one of {', '.join(MEASURES)}",
        )
    pairs: dict[int, dict[str, Summary]] = {}
    for scheduled, _, summary in results:
        pairs.setdefault(scheduled.pair, {})[scheduled.arm] = summary
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    if not whole:
        raise LoadError("no pair of runs is complete", "let it run for longer")
    measures = []
    for name in dict.fromkeys((primary, *names)):
        unit, read = MEASURES[name]
        a, b = ([read(pair[which]) for pair in whole] for which in ("A", "B"))
        if name == primary or any(value is not None for value in (*a, *b)):
            measures.append(Measure(name=name, unit=unit, a=a, b=b))
    return compare(measures, primary)
