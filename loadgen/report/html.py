"""One page about one run or several: a single file that loads nothing and runs no script.

Every text that is not this file's own is escaped. The same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from loadgen.distribution import Distribution
from loadgen.metrics import Summary
from loadgen.report import charts, series, words
from loadgen.report.elements import escaped, figure, key, legend, table
from loadgen.report.files import write_text
from loadgen.report.style import CSS
from loadgen.types import Run

Result = tuple[Run, Summary]

_RUN = '<span class="left">run</span>'
_MAX_TENANTS = 20
_MAX_LINES = charts.NUM_COLOURS - 1  # of tenants in a chart; the last colour is the others'


def write_html(
    path: Path,
    results: Sequence[Result],
    comparison: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write `page` to a file. Raises LoadError."""
    write_text(path, page(results, comparison, notes))


def page(
    results: Sequence[Result],
    comparison: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page. Several runs are laid over each other.

    Above them stand the rows of a comparison, the first its header, and notes on it.
    """
    title = " and ".join(dict.fromkeys(_name(run) for run, _ in results)) or "no run"
    measured = any(run.records for run, _ in results)
    parts = [
        f"<h1>{title}</h1>",
        _comparison(comparison, notes) if comparison else "",
        *(_head(run, summary, alone=len(results) == 1) for run, summary in results),
        *(_tiles(summary) for _, summary in results if len(results) == 1),
        _latencies(results),
        _distributions(results) if measured else "",
        _throughput(results),
        _time_lines(results) if measured else "",
        *(_errors(run, summary) for run, summary in results if summary.errors),
        *(_tenants(run, summary) for run, summary in results if len(summary.fairness.tenants) > 1),
        _facts(results),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Load test of {title}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _comparison(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    groups = [(name, [cells]) for name, *cells in map(escaped, rows[1:])]
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return "<h2>Comparison</h2>" + table(escaped(rows[0]), groups) + said


def _name(run: Run) -> str:
    return escape(words.plain(run.name))


def _head(run: Run, summary: Summary, *, alone: bool) -> str:
    name = "" if alone else f"<strong>{_name(run)}</strong> · "
    url = f"<code>{escape(words.plain(run.url, 200))}</code>"
    line = f"{name}{escape(words.plain(run.model))} at {url}"
    when = f"{words.answered(summary)}, from {_moment(run.start_unix_s)}"
    said = "".join(
        f'<p class="warning" role="note">{escape(warning)}</p>'
        for warning in words.warnings(summary)
    )
    return f'<p class="run">{line}</p><p class="muted">{when}</p>{said}'


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _tiles(summary: Summary) -> str:
    def latency(values: Distribution) -> str:
        return words.REFUSED if values.p50_s is None else words.duration(values.p50_s)

    done = summary.throughput
    shown = [
        ("TTFT, median", latency(summary.ttft)),
        ("TPOT, median", latency(summary.tpot)),
        ("E2E, median", latency(summary.e2e)),
        ("output tokens", f"{words.number(done.output_tokens_per_s)} /s"),
    ]
    if summary.goodput is not None:
        shown.append(("within the SLOs", words.percent(summary.goodput.share)))
    shown.append(("failed requests", f"{done.num_requests - done.num_ok:,}"))
    cells = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in shown)
    return f'<dl class="tiles">{cells}</dl>'


def _beside(results: Sequence[Result], place: int) -> list[str]:
    """Return the cell that names a run in a table of several; none in a table of one."""
    return [key(place, _name(results[place][0]))] if len(results) > 1 else []


def _latencies(results: Sequence[Result]) -> str:
    groups = []
    for measure in zip(*(words.latencies(summary) for _, summary in results), strict=True):
        unit = words.unit(*(latency for _, latency in measure))
        rows = [words.latency_row(name, latency, unit) for name, latency in measure]
        cells = [_beside(results, place) + escaped(row[1:]) for place, row in enumerate(rows)]
        groups.append((rows[0][0], cells))
    run_column = [_RUN] if len(results) > 1 else []
    columns = [words.LATENCY_COLUMNS[0], *run_column, *words.LATENCY_COLUMNS[1:]]
    notes = dict.fromkeys(filter(None, (words.refusals(summary) for _, summary in results)))
    return "<h2>Latencies</h2>" + table(columns, groups, "<br>".join(notes))


def _distributions(results: Sequence[Result]) -> str:
    measures: dict[str, tuple[str, Callable[[Run], Iterable[float]]]] = {
        "TTFT": ("time to the first token", _ttfts_s),
        "TPOT": ("time per output token after the first", _tpots_s),
        "ITL": ("each gap between events with text", _gaps_s),
        "E2E": ("time to the end of the answer", _e2es_s),
    }
    limits_s = _limits_s(results)
    figures = []
    for name, (meaning, values_s) in measures.items():
        lines = [series.cdf(values_s(run)) for run, _ in results]
        title = f"Distribution of {name}: share of samples up to each ms"
        limit_s = limits_s.get(name)
        if limit_s is not None:
            meaning += f"; dashed: the SLO, {words.bound(limit_s)}"
        drawing = charts.cdf_chart(lines, title, limit_s)
        figures.append(figure(name, meaning, drawing))
    keys = legend(_name(run) for run, _ in results)
    return f'<h2>Distributions</h2>{keys}<div class="charts">{"".join(figures)}</div>'


def _limits_s(results: Sequence[Result]) -> dict[str, float | None]:
    """Return the SLO of each measure; all runs of a page have the same."""
    goodput = results[0][1].goodput
    if goodput is None:
        return {}
    return {field.removesuffix("_s").upper(): it for field, it in asdict(goodput.slo).items()}


def _ttfts_s(run: Run) -> Iterable[float]:
    return (record.ttft_s for record in run.records if record.received_at_s)


def _tpots_s(run: Run) -> Iterable[float]:
    values_s = (record.tpot_s for record in run.records if record.ok)
    return (value for value in values_s if value is not None)


def _gaps_s(run: Run) -> Iterable[float]:
    return (gap for record in run.records for gap in record.gaps_s)


def _e2es_s(run: Run) -> Iterable[float]:
    return (record.e2e_s for record in run.records if record.ok)


def _throughput(results: Sequence[Result]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for place, (_, summary) in enumerate(results):
        for what, *cells in words.throughput_rows(summary):
            groups.setdefault(what, []).append(_beside(results, place) + escaped(cells))
    columns = ["", *([_RUN] if len(results) > 1 else []), "", ""]
    return "<h2>Throughput</h2>" + table(columns, list(groups.items()), kind="words")


def _time_lines(results: Sequence[Result]) -> str:
    runs = [run for run, _ in results]
    end_s = max(run.duration_s for run in runs)
    tokens = [series.tokens_per_s(run) for run in runs]
    drawn = [
        ("Requests in flight", "sent and not ended", [series.in_flight(run) for run in runs]),
        ("Output tokens per second", "", [output for _, output in tokens]),
        ("Input tokens per second", "prompts, when their first token came", [i for i, _ in tokens]),
    ]
    figures = [
        figure(name, remark, charts.time_chart(lines, f"{name}, over seconds", end_s), "wide")
        for name, remark, lines in drawn
    ]
    points = [(x, 1000 * y) for x, y in map(series.ttft_over_time, runs)]
    scatter = charts.time_chart(points, "TTFT in ms, over seconds", end_s, scattered=True)
    remark = "ms, by when a request was to be sent; of very many, a sample and the slowest"
    figures.append(figure("TTFT", remark, scatter, "wide"))
    return f"<h2>Over time</h2>{legend(_name(run) for run in runs)}{''.join(figures)}"


def _errors(run: Run, summary: Summary) -> str:
    groups = []
    for error in summary.errors:
        name = f'<span class="bad">{escape(words.plain(error.name))}</span>'
        said = f"<code>{escape(words.plain(error.example, 300))}</code>"
        groups.append((name, [[f"{error.num:,}", said]]))
    listed = table(("class", "requests", "one of them said"), groups, kind="words")
    return f"<h2>Errors of {_name(run)}</h2>{listed}"


def _tenants(run: Run, summary: Summary) -> str:
    fair = summary.fairness
    ordered = sorted(fair.tenants, key=lambda tenant: (-tenant.service, tenant.name))
    shown, others = ordered[:_MAX_LINES], ordered[_MAX_LINES:]
    names = [escape(words.plain(tenant.name, 24)) for tenant in shown]
    values = [np.array(tenant.service_over_time) for tenant in shown]
    if others:
        names.append(f"{len(others):,} others together")
        values.append(np.sum([tenant.service_over_time for tenant in others], axis=0))
    lines = [(np.array(fair.times_s), y) for y in values]
    drawing = charts.time_chart(lines, "Service received, over seconds", run.duration_s)
    remark = "prompt tokens + 2 x output tokens, summed up"
    chart = figure("Service received", remark, drawing, "wide")
    groups = [
        (name, [cells]) for name, *cells in map(escaped, words.tenant_rows(fair, _MAX_TENANTS))
    ]
    notes = filter(None, (words.more(ordered, _MAX_TENANTS), words.fairness_line(fair)))
    totals = table(words.TENANT_COLUMNS, groups, escape(" · ".join(notes)))
    return f"<h2>Tenants of {_name(run)}</h2>{legend(names)}{chart}{totals}"


def _facts(results: Sequence[Result]) -> str:
    known = [
        {"started": _moment(run.start_unix_s), "seed": str(run.seed), **run.facts}
        for run, _ in results
    ]
    groups = []
    for fact in dict.fromkeys(fact for facts in known for fact in facts):
        said = [escape(words.plain(facts.get(fact, ""), 2000)) for facts in known]
        groups.append((escape(words.plain(fact)), [[f"<code>{value}</code>" for value in said]]))
    columns = ["", *(_name(run) for run, _ in results)]
    return "<h2>Facts</h2>" + table(columns, groups, kind="words facts")
