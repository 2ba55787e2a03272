"""The pieces of a page: keys, legends, tables, figures. What they are given is escaped already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from loadgen.report.charts import NUM_COLOURS


def key(place: int, name: str) -> str:
    """A name with a swatch of its colour; the name is escaped already."""
    place %= NUM_COLOURS
    return f'<span class="key" style="--key: var(--c{place})">{name}</span>'


def legend(names: Iterable[str]) -> str:
    keys = [f"<li>{key(place, name)}</li>" for place, name in enumerate(names)]
    return f'<ul class="legend">{"".join(keys)}</ul>' if len(keys) > 1 else ""


def table(
    columns: Sequence[str],
    groups: Iterable[tuple[str, Sequence[Sequence[str]]]],
    caption: str = "",
    kind: str = "",
) -> str:
    """Write a table; each group has one header, beside its rows."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(_group(header, rows) for header, rows in groups)
    said = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}">{said}<thead><tr>{head}</tr></thead>'
        f"{body}</table></div>"
    )


def _group(header: str, rows: Sequence[Sequence[str]]) -> str:
    span = f' rowspan="{len(rows)}"' if len(rows) > 1 else ""
    heads = [f'<th scope="row"{span}>{header}</th>'] + [""] * (len(rows) - 1)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    pairs = zip(heads, lines, strict=True)
    return f"<tbody>{''.join(f'<tr>{head}{line}</tr>' for head, line in pairs)}</tbody>"


def escaped(cells: Iterable[str]) -> list[str]:
    return [escape(cell) for cell in cells]


def figure(caption: str, remark: str, drawing: str, kind: str = "") -> str:
    return (
        f'<figure class="{kind}"><figcaption>{caption} <small>{remark}</small></figcaption>'
        f'<div class="scroll">{drawing}</div></figure>'
    )
