"""The style of the page: light and dark, wide and narrow, on paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --muted: #62666e; --grid: #e4e3df;
  --warn: #8a5a00; --warn-page: #fdf3dc; --bad: #b3261e;
  --c0: #2a6fd6; --c1: #d1571b; --c2: #14865f; --c3: #8553c6;
  --c4: #a97900; --c5: #c03a7c; --c6: #0c869b; --c7: #6f747d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171b; --card: #1d2025; --ink: #e9e8e4; --muted: #a2a6ae; --grid: #33373e;
    --warn: #f0c674; --warn-page: #322a17; --bad: #ff8a80;
    --c0: #6ea8fe; --c1: #f58a54; --c2: #43bf91; --c3: #b592ee;
    --c4: #dcb03f; --c5: #ee7fb3; --c6: #4bc0d4; --c7: #9aa0aa;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 74rem;
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; }
p { margin: .3rem 0; }
code { font: .92em ui-monospace, "Liberation Mono", Menlo, monospace; overflow-wrap: anywhere; }
.muted, caption, figcaption small { color: var(--muted); }
.warning {
  margin: 1rem 0; padding: .6rem .9rem; border-left: 4px solid var(--warn); border-radius: 4px;
  background: var(--warn-page); color: var(--warn);
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0 0; padding: 0; }
.tiles div, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.tiles div { padding: .7rem .9rem; }
.tiles dt { color: var(--muted); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .4rem 0 .8rem; padding: 0;
  list-style: none; }
.key::before { content: ""; display: inline-block; width: 1.1em; height: .3em; margin-right: .5em;
  border-radius: 2px; background: var(--key); vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .8rem; }
figure { margin: 0 0 .8rem; padding: .7rem .9rem .4rem; }
.charts figure { margin: 0; }
figcaption { font-weight: 600; }
figcaption small { font-weight: 400; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.wide svg { min-width: 36rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; font-size: .88rem; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; }
.words th + td { white-space: nowrap; }
.facts th + td { white-space: normal; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--grid); }
td:has(.key), th:has(.left) { text-align: left; }
tbody th { font-weight: 600; vertical-align: top; }
tbody + tbody > tr:first-child > * { border-top: 1px solid var(--grid); }
tbody tr + tr > td { padding-top: 0; }
.run { margin-top: .8rem; }
.bad { color: var(--bad); }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""
