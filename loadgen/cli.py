"""The client verbs of `hocket bench`: run, compare, mock. Owns flags, defaults and exit codes."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, Group, Parameter

from loadgen.compare.arms import (
    Arm,
    Result,
    arm,
    check_measured,
    check_primary,
    compared,
    healths,
    run_pairs,
    whole_pairs,
)
from loadgen.compare.report import HEADER, comparison_notes, comparison_rows, comparison_table
from loadgen.compare.statistics import ScheduledRun, schedule
from loadgen.flags import Whole, WholeOrNone
from loadgen.metrics import Slo, summarize
from loadgen.mock import MockConfig, serve
from loadgen.once import Asked, TargetFlags, run_once, why_it_ended, why_nothing_came
from loadgen.report.files import facts, write_comparison, write_json
from loadgen.report.html import write_html
from loadgen.report.outputs import check_outputs, to_stdout, write_all
from loadgen.report.terminal import print_report
from loadgen.signals import stopped_by_signals
from loadgen.timing import precise_loop
from loadgen.types import LoadError, Run
from loadgen.workload.build import Workload, WorkloadSpec, build
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

    concurrency: WholeOrNone = None
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
    check_outputs(measure.json, measure.html, record)
    slo = Slo.parse(measure.slo) if measure.slo else None
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
    with stopped_by_signals() as stop:
        result = await run_once(asked, stop)
        summary = summarize(result, slo, weights=built.weights)
        write_all(
            lambda: _given(measure.json, lambda path: write_json(path, result, summary)),
            lambda: _given(measure.html, lambda path: write_html(path, [(result, summary)])),
            to_stdout(lambda: print_report(result, summary)),
        )
        problem = why_nothing_came(result) or await why_it_ended(result)
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
    pairs: Whole = 12
    primary: str = "ttft_p50"


_COMPARE = CompareFlags()
ArmOf = Annotated[str, Parameter(allow_leading_hyphen=True)]


@app.command
def compare(
    a: ArmOf,
    b: ArmOf,
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
    slo = Slo.parse(measure.slo) if measure.slo else None
    check_primary(turns.primary, has_slo=slo is not None)
    check_outputs(measure.json, measure.html)
    order = schedule(turns.pairs, range(workload.seed, workload.seed + turns.pairs))
    bounded, extra, about = _bounded(workload, measure), _extra(target), facts()

    @cache
    def workload_of(seed: int) -> Workload:
        return build(replace(bounded, seed=seed))

    def asked_of(scheduled: ScheduledRun) -> Asked:
        built = workload_of(scheduled.seed)
        return Asked(
            name="",
            url="",
            plan=built.plan,
            seed=scheduled.seed,
            concurrency=measure.concurrency,
            flags=target,
            extra=extra,
            facts=about | built.facts,
        )

    results: list[Result] = []

    def take(scheduled: ScheduledRun, result: Run) -> None:
        problem = why_nothing_came(result)
        if problem is not None:
            raise problem
        weights = workload_of(scheduled.seed).weights
        summary = summarize(result, slo, weights=weights)
        check_measured(turns.primary, summary)
        results.append((scheduled, result, summary))

    problem = None
    with stopped_by_signals() as stop:
        try:
            await run_pairs(arms, order, asked_of, take, stop)
        except LoadError as error:  # told below what the pairs before it showed
            problem = error
        if whole_pairs(results):
            _show_comparison(arms, whole_pairs(results), turns.primary, measure, about)
    if problem is None and not whole_pairs(results):
        problem = LoadError("no pair of runs is complete", "let it run for longer")
    if problem is not None:
        raise problem
    return INTERRUPTED if stop.is_set() else 0


def _show_comparison(
    arms: dict[str, Arm],
    results: Sequence[Result],
    primary: str,
    measure: MeasureFlags,
    about: dict[str, str],
) -> None:
    comparisons, health = compared(results, primary), healths(results)

    def write_jsons(path: Path) -> None:
        names = {name: served.name for name, served in arms.items()}
        write_comparison(path, names, comparisons, health, about)
        for scheduled, result, summary in results:
            name = f"{path.stem}-{scheduled.pair}{scheduled.arm}{path.suffix}"
            write_json(path.with_name(name), result, summary)

    def write_page(path: Path) -> None:
        last = {scheduled.arm: (result, summary) for scheduled, result, summary in results}
        notes = [*comparison_notes(comparisons, health), "What follows is of the last pair."]
        rows = [HEADER, *comparison_rows(comparisons)]
        write_html(path, [last[name] for name in sorted(last)], rows, notes)

    write_all(
        lambda: _given(measure.json, write_jsons),
        lambda: _given(measure.html, write_page),
        to_stdout(lambda: print(comparison_table(comparisons, health))),  # noqa: T201
    )


def _given(path: Path | None, write: Callable[[Path], None]) -> None:
    if path is not None:
        write(path)


_MOCK = MockConfig()


@app.command
def mock(*, port: Whole = 8000, config: Annotated[MockConfig, Parameter(name="*")] = _MOCK) -> None:
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
    except LoadError as error:
        _exit(error)


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
    except (ValueError, RecursionError) as error:
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
