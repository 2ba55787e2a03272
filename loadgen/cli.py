"""The client verbs of `hocket bench`: run, compare, mock. Owns flags, defaults and exit codes."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, Group, Parameter

from loadgen.compare.arms import Arm, Result, arm, compared, run_pairs
from loadgen.compare.report import comparison_table
from loadgen.compare.statistics import ScheduledRun, schedule
from loadgen.metrics import Slo, summarize
from loadgen.mock import MockConfig, serve
from loadgen.once import Asked, TargetFlags, run_once, why_nothing_came
from loadgen.report.files import facts, write_comparison, write_json
from loadgen.report.html import write_html
from loadgen.report.terminal import print_report
from loadgen.timing import precise_loop
from loadgen.types import LoadError, Plan, Run
from loadgen.workload.build import WorkloadSpec, build
from loadgen.workload.plan_file import write_plan

INTERRUPTED = 130
_DEFAULT_SESSIONS = 100

app = App(name="loadgen", help="Measure an OpenAI-compatible server.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureFlags:
    """What is measured beside latencies, and where it goes.

    Parameters
    ----------
    concurrency
        Sessions at a time: a closed loop. By default requests are sent when the plan says.
    slo
        What a good request keeps, in milliseconds, such as ttft:200 tpot:50 (itl, e2e).
    json
        File for everything that was measured; a comparison adds one for each run.
    html
        File for the report as one page.
    """

    concurrency: int | None = None
    slo: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = ()
    json: Path | None = None
    html: Path | None = None


_WORKLOAD, _TARGET, _MEASURE = WorkloadSpec(), TargetFlags(), MeasureFlags()
_WORKLOAD_GROUP, _TARGET_GROUP, _MEASURE_GROUP, _COMPARE_GROUP = (
    Group(name, sort_key=place)
    for place, name in enumerate(("Workload", "Requests", "Measures", "Comparison"))
)
WorkloadOf = Annotated[WorkloadSpec, Parameter(name="*", group=_WORKLOAD_GROUP)]
TargetOf = Annotated[TargetFlags, Parameter(name="*", group=_TARGET_GROUP)]
MeasureOf = Annotated[MeasureFlags, Parameter(name="*", group=_MEASURE_GROUP)]


@app.command
def run(
    url: str = "http://127.0.0.1:8000",
    /,
    *,
    workload: WorkloadOf = _WORKLOAD,
    target: TargetOf = _TARGET,
    measure: MeasureOf = _MEASURE,
    record: Annotated[Path | None, Parameter(group=_MEASURE_GROUP)] = None,
) -> None:
    """Send a load to a server and report its latencies, throughput and errors.

    Parameters
    ----------
    url
        The server.
    record
        File for the plan, to be replayed with --trace.
    """
    _checked(lambda: _run(url, workload, target, measure, record))


async def _run(
    url: str,
    workload: WorkloadSpec,
    target: TargetFlags,
    measure: MeasureFlags,
    record: Path | None,
) -> int:
    built = build(_bounded(workload, measure))
    if record is not None:
        write_plan(record, built.plan)
    asked = Asked(
        name="run",
        url=url,
        plan=built.plan,
        seed=workload.seed,
        concurrency=measure.concurrency,
        flags=target,
        extra=_extra(target),
        facts=facts() | built.facts,
    )
    slo = Slo.parse(measure.slo) if measure.slo else None
    result = await run_once(asked)
    summary = summarize(result, slo)
    print_report(result, summary)
    if measure.json is not None:
        write_json(measure.json, result, summary)
    if measure.html is not None:
        write_html(measure.html, [(result, summary)])
    problem = why_nothing_came(result)
    if problem is not None:
        raise problem
    return INTERRUPTED if result.interrupted else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareFlags:
    """How the arms take turns, and what decides.

    Parameters
    ----------
    serve
        Command that starts a server, to which the flags of an arm are added.
    pairs
        Pairs of runs, an even number; each pair has a seed of its own.
    primary
        The measure that decides; the others share one error among them.
    """

    serve: str = "hocket serve --port {port}"
    pairs: int = 12
    primary: str = "ttft_p50"


_COMPARE = CompareFlags()


@app.command
def compare(
    a: str,
    b: str,
    /,
    *,
    turns: Annotated[CompareFlags, Parameter(name="*", group=_COMPARE_GROUP)] = _COMPARE,
    workload: WorkloadOf = _WORKLOAD,
    target: TargetOf = _TARGET,
    measure: MeasureOf = _MEASURE,
) -> None:
    """Run two servers, or one with two settings, in turn, and say what differs.

    Parameters
    ----------
    a
        An address, or flags for the server that is started.
    b
        What it is compared with.
    """
    arms = {"A": arm(a, a, turns.serve), "B": arm(b, b, turns.serve)}
    _checked(lambda: _compare(arms, turns, workload, target, measure))


async def _compare(
    arms: dict[str, Arm],
    turns: CompareFlags,
    workload: WorkloadSpec,
    target: TargetFlags,
    measure: MeasureFlags,
) -> int:
    order = schedule(turns.pairs, range(workload.seed, workload.seed + turns.pairs))
    slo = Slo.parse(measure.slo) if measure.slo else None
    bounded = _bounded(workload, measure)

    @cache
    def plan_of(seed: int) -> Plan:
        return build(replace(bounded, seed=seed)).plan

    results: list[Result] = []

    def take(scheduled: ScheduledRun, result: Run) -> None:
        problem = why_nothing_came(result)
        if problem is not None and not result.interrupted:
            raise problem
        results.append((scheduled, result, summarize(result, slo)))

    asked = Asked(
        name="",
        url="",
        plan=(),
        seed=0,
        concurrency=measure.concurrency,
        flags=target,
        extra=_extra(target),
        facts=facts(),
    )
    await run_pairs(arms, order, plan_of, asked, take)
    comparisons = compared(results, turns.primary)
    table = comparison_table(comparisons)
    print(table)  # noqa: T201 (the command's result)
    if measure.json is not None:
        names = {name: served.name for name, served in arms.items()}
        write_comparison(measure.json, names, comparisons, asked.facts)
        for scheduled, result, summary in results:
            name = f"{measure.json.stem}-{scheduled.pair}{scheduled.arm}{measure.json.suffix}"
            write_json(measure.json.with_name(name), result, summary)
    if measure.html is not None:
        last = {scheduled.arm: (result, summary) for scheduled, result, summary in results}
        write_html(measure.html, [last[name] for name in sorted(last)], table.splitlines())
    return INTERRUPTED if len(results) < len(order) else 0


_MOCK = MockConfig()


@app.command
def mock(*, port: int = 8000, config: Annotated[MockConfig, Parameter(name="*")] = _MOCK) -> None:
    """Serve answers of known latencies on loopback, to try a client against.

    Each chunk says in `sent_ns` when it was sent, by the monotonic clock of this machine, and
    /stamps what TTFT and ITL were by these stamps.

    Parameters
    ----------
    port
        On loopback.
    """
    try:
        serve(config, port)
    except OSError as error:
        _exit(LoadError(f"port {port}: {error.strerror}", "name another one with --port"))


def _bounded(workload: WorkloadSpec, measure: MeasureFlags) -> WorkloadSpec:
    """Give a load that nobody bounded a size, and a closed loop all its sessions at once."""
    if (workload.num_sessions, workload.duration_s, workload.trace) == (None, None, None):
        workload = replace(workload, num_sessions=_DEFAULT_SESSIONS)
    if measure.concurrency is not None and measure.concurrency < 1:
        raise LoadError("a concurrency below 1 sends nothing", "give at least 1")
    if measure.concurrency is not None and workload.trace is None:
        if workload.num_sessions is None:
            raise LoadError(
                "a closed loop sends as fast as it is answered, so a duration says nothing",
                "give --num-sessions",
            )
        workload = replace(workload, rate=math.inf)
    return workload


def _extra(target: TargetFlags) -> dict[str, Any]:
    try:
        extra = json.loads(target.extra)
    except ValueError as error:
        raise LoadError(f"--extra is no JSON: {error}", "give an object in quotes") from error
    if not isinstance(extra, dict):
        raise LoadError("--extra is no JSON object", "give one, such as '{\"top_p\": 0.9}'")
    return extra


def _checked(main: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run to the end and leave with its status; a mistake is one line of cause, one of remedy."""
    try:
        with asyncio.Runner(loop_factory=precise_loop) as runner:
            status = runner.run(main())
    except LoadError as error:
        _exit(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


def _exit(error: LoadError) -> NoReturn:
    print(f"hocket: {error.cause}\n        {error.remedy}", file=sys.stderr)  # noqa: T201
    sys.exit(1)
