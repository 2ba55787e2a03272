"""A run on a terminal: one screen of at most 40 lines by 100 columns."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loadgen.fairness import Floats
from loadgen.metrics import Summary
from loadgen.report import series, words
from loadgen.types import Run

MAX_WIDTH = 100
_MAX_TENANTS = 6
_MAX_ERRORS = 4
_BARS = "▁▂▃▄▅▆▇█"


def print_report(run: Run, summary: Summary, console: Console | None = None) -> None:
    """Print a run, to stdout if no console is given."""
    console = Console() if console is None else console
    console.print(render(run, summary), width=min(console.width, MAX_WIDTH))


def render(run: Run, summary: Summary) -> RenderableType:
    """Return a run as something that rich can print."""
    parts = [
        _title(run, summary),
        *(Text(words.plain(line, 2 * MAX_WIDTH), "dim") for line in words.workload_lines(run)),
        *_warnings(summary),
        _latencies(summary),
        _throughput(run, summary),
        *_errors(summary),
        *_tenants(summary),
    ]
    return Padding(Group(*parts), (0, 1))


def _title(run: Run, summary: Summary) -> Text:
    name, model, url = words.plain(run.name, 30), words.plain(run.model, 30), words.plain(run.url)
    title = Text.assemble((name, "bold cyan"), no_wrap=True, overflow="ellipsis")
    title.append(f"  {model}  {url}  seed {run.seed}\n", "dim")
    return title.append(words.answered(summary), "bold")


def _warnings(summary: Summary) -> list[Text]:
    return [Text(f"⚠ {warning}", "yellow") for warning in words.warnings(summary)]


def _table(*columns: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", show_edge=False
    )
    for column in columns:
        left = column == columns[0]
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _latencies(summary: Summary) -> RenderableType:
    table = _table(*words.LATENCY_COLUMNS)
    for name, latency in words.latencies(summary):
        label, *cells = words.latency_row(name, latency, words.unit(latency))
        table.add_row(Text(label, "bold"), *cells)
    table.columns[3].style = "cyan"  # the median
    note = words.refusals(summary)
    return Group(Text(), table, *([Text(note, "dim")] if note else []))


def _throughput(run: Run, summary: Summary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
    lines = dict(zip(("input tokens", "output tokens"), series.tokens_per_s(run, 30), strict=True))
    for what, amount, remark in words.throughput_rows(summary):
        spark = sparkline(lines[what][1]) if what in lines else ""
        gap = "  " if spark and remark else ""
        table.add_row(what, amount, Text.assemble((spark, "green"), gap, remark))
    return Group(Text(), table)


def sparkline(values: Floats) -> str:
    """Draw values from zero to their largest, a character each; empty if all are zero."""
    if not (values > 0).any():
        return ""
    levels = np.ceil(np.maximum(values, 0) / values.max() * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[level] for level in levels)


def _errors(summary: Summary) -> list[RenderableType]:
    if not summary.errors:
        return []
    rows = [
        (words.plain(error.name, 24), f"{error.num:,}", words.plain(error.example, 80))
        for error in summary.errors[:_MAX_ERRORS]
    ]
    names, nums, _ = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold red", no_wrap=True, min_width=max(names))
    table.add_column(justify="right", no_wrap=True, min_width=max(nums))
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis")  # what gives way
    for row in rows:
        table.add_row(*map(Text, row))
    rest = words.more(summary.errors, _MAX_ERRORS)
    return [Text(), table, *([Text(rest, "dim")] if rest else [])]


def _tenants(summary: Summary) -> list[RenderableType]:
    fair = summary.fairness
    if len(fair.tenants) < 2:
        return []
    table = _table(*words.TENANT_COLUMNS)
    for row in words.tenant_rows(fair, _MAX_TENANTS):
        table.add_row(*(Text(cell) for cell in row))
    notes = [words.more(fair.tenants, _MAX_TENANTS), words.fairness_line(fair)]
    return [Text(), table, *(Text(note, "dim") for note in notes if note)]
