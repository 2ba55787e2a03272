"""Shows on stderr how far a run is: a live line on a terminal, else a line every ten seconds."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadgen.runner import Progress

_REFRESH_S = 0.25  # often enough to feel live; drawing takes the loop about a millisecond
_LINE_EVERY_S = 10.0


async def show(progress: Progress, title: str) -> None:
    """Show until cancelled."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(Text(f"{title}  {describe(progress)}"), refresh=True)
                await asyncio.sleep(_REFRESH_S)
    while True:
        await asyncio.sleep(_LINE_EVERY_S)
        print(f"{title}  {describe(progress)}", file=sys.stderr, flush=True)  # noqa: T201


def describe(progress: Progress) -> str:
    """Return where the run is, in a line."""
    now_s = asyncio.get_running_loop().time() - progress.zero_s
    ttfts_s = sorted(progress.recent_ttfts_s)
    parts = [
        f"{now_s:.0f} s",
        f"{progress.num_begun} of {progress.num_sessions} begun",
        f"{progress.num_in_flight} in flight",
    ]
    if ttfts_s:
        parts.append(f"recent TTFT {1000 * ttfts_s[len(ttfts_s) // 2]:.0f} ms")
    parts += [f"{count} {error}" for error, count in progress.errors.most_common(3)]
    return ", ".join(parts)


async def hide(showing: asyncio.Task[None]) -> None:
    """End what `show` does."""
    showing.cancel()
    with suppress(asyncio.CancelledError):
        await showing
