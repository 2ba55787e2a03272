"""Charts as SVG text that belongs inside a page: the page's style gives their colours and font.

Owns how a chart looks. matplotlib is told placeholder colours, which become variables of the page,
so that one drawing serves light and dark. Nothing that came from a server is drawn here: names are
the page's to write. The same lines give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from loadgen.fairness import Floats
from loadgen.report.series import Line

NUM_COLOURS = 8
_INK, _GRID = "#010101", "#020202"
_PAGE_COLOURS = {_INK: "var(--muted)", _GRID: "var(--grid)"} | {
    f"#0a000{i}": f"var(--c{i})" for i in range(NUM_COLOURS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": _GRID,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}
_SIZE_IN = (5.2, 2.5)
_MARGINS = {"left": 0.09, "right": 0.985, "top": 0.95, "bottom": 0.18}
_WIDE_IN = (10.8, 2.3)
_WIDE_MARGINS = {"left": 0.055, "right": 0.99, "top": 0.96, "bottom": 0.19}  # time lines align


def colour(place: int) -> str:
    """Name the colour of a line by its place, for matplotlib."""
    return f"#0a000{place % NUM_COLOURS}"


def cdf_chart(lines: Sequence[Line], title: str, limit_s: float | None = None) -> str:
    """Draw distribution functions: lines of (s, share), a run each; dashed, what was asked for."""
    positive = [(1000 * x[x > 0], 100 * y[x > 0]) for x, y in lines]

    def draw(axes: Axes) -> None:
        for place, (x_ms, percent) in enumerate(positive):
            axes.plot(x_ms, percent, color=colour(place), drawstyle="steps-post")
        drawn = [x_ms for x_ms, _ in positive if len(x_ms)]
        if limit_s is not None:
            axes.axvline(1000 * limit_s, color=_INK, linewidth=1, linestyle="--")
            drawn.append(np.array([1000 * limit_s]))
        _latency_axis(axes, np.concatenate(drawn) if drawn else np.array([]))
        axes.set_ylim(0, 101)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("ms")

    return _svg(draw, title, _SIZE_IN, _MARGINS)


def time_chart(lines: Sequence[Line], title: str, end_s: float, *, scattered: bool = False) -> str:
    """Draw lines of (s, value) from 0 to `end_s`, in the colours of their places."""

    def draw(axes: Axes) -> None:
        for place, (x, y) in enumerate(lines):
            if scattered:
                size = 10 if len(x) < 300 else 6
                axes.scatter(x, y, s=size, color=colour(place), alpha=0.55, linewidths=0)
            else:
                axes.plot(x, y, color=colour(place), linewidth=1.3)
        if len(lines) == 1 and not scattered:
            axes.fill_between(*lines[0], color=colour(0), alpha=0.12, linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, end_s)
        axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel("s")

    return _svg(draw, title, _WIDE_IN, _WIDE_MARGINS)


def _latency_axis(axes: Axes, drawn_ms: Floats) -> None:
    """Choose a logarithmic axis where values differ by more than a factor of five."""
    if not len(drawn_ms) or drawn_ms.max() <= 5 * drawn_ms.min():
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        axes.set_xscale("log")
        decades = np.log10(drawn_ms.max() / drawn_ms.min())
        digits = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _place: int | None = None) -> str:
    """Write a number of an axis: 0.5, 20, 15,000, 1.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _svg(
    draw: Callable[[Axes], None],
    title: str,
    size_in: tuple[float, float],
    margins: dict[str, float],
) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=size_in)
        figure.subplots_adjust(**margins)
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(visible=True, axis="both", linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _inlined(written.getvalue(), title)


def _inlined(svg: str, title: str) -> str:
    """Turn a file into an element: no declarations, no ids that others could have, our colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<(g|svg) id="[^"]*"', r"<\1", svg)
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?|font: [\d.]+px [^;\"]*; ?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for placeholder, variable in _PAGE_COLOURS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
