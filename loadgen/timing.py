"""An event loop whose timers are exact to some tens of microseconds.

On Linux asyncio waits in `epoll_wait`, which counts in milliseconds and is given the next whole
one: what is due in 0.1 ms happens in 1 ms, and so requests are sent half a millisecond late.
`select` counts in microseconds, and an epoll descriptor can be waited for like any other.
"""

from __future__ import annotations

import asyncio
import select
import selectors


def precise_loop() -> asyncio.AbstractEventLoop:
    """Make one, for `asyncio.Runner(loop_factory=precise_loop)`."""
    selector = _PreciseSelector()
    if hasattr(selector, "fileno"):
        return asyncio.SelectorEventLoop(selector)
    selector.close()
    return asyncio.new_event_loop()


class _PreciseSelector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self], (), (), timeout)
            timeout = 0
        return super().select(timeout)
