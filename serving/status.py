"""What the server says of itself while it is busy, and how late its event loop is.

A line every ten seconds while there is work, one more when it is done, and then silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from serving.logs import event
from serving.metrics import Metrics, Totals

log = logging.getLogger(__name__)

STATUS_PERIOD_S = 10.0
_LAG_PERIOD_S = 0.25


def status_fields(before: Totals, after: Totals, seconds: float) -> dict[str, object] | None:
    """Return what the line shows of the time between; None if nothing happened."""
    num_prompt_tokens = after.num_prompt_tokens - before.num_prompt_tokens
    num_generation_tokens = after.num_generation_tokens - before.num_generation_tokens
    num_rejections = after.num_rejections - before.num_rejections
    num_preemptions = after.num_preemptions - before.num_preemptions
    num_queries = after.num_prefix_queries - before.num_prefix_queries
    num_hits = after.num_prefix_hits - before.num_prefix_hits
    is_busy = after.num_running or after.num_waiting
    if not (is_busy or num_prompt_tokens or num_generation_tokens or num_rejections):
        return None
    return {
        "prompt_tokens_per_s": round(num_prompt_tokens / seconds, 1),
        "generation_tokens_per_s": round(num_generation_tokens / seconds, 1),
        "running": after.num_running,
        "waiting": after.num_waiting,
        "kv_usage_percent": round(100 * after.kv_usage, 1),
        "prefix_hit_percent": round(100 * num_hits / num_queries, 1) if num_queries else None,
        "rejected": int(num_rejections) or None,
        "preempted": int(num_preemptions) or None,
    }


async def report_status(metrics: Metrics, *, period_s: float = STATUS_PERIOD_S) -> None:
    """Log the line for ever."""
    clock = asyncio.get_running_loop().time
    before, before_s = metrics.totals(), clock()
    while True:
        await asyncio.sleep(period_s)
        after, after_s = metrics.totals(), clock()
        fields = status_fields(before, after, after_s - before_s)
        if fields is not None:
            event(log, logging.INFO, "status", **fields)
        before, before_s = after, after_s


async def watch_event_loop(observe: Callable[[float], None]) -> None:
    """Measure for ever how much later than asked the loop wakes a sleeper."""
    clock = asyncio.get_running_loop().time
    while True:
        due_s = clock() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        observe(max(0.0, clock() - due_s))
