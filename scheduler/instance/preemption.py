"""Who gives way when the blocks run out."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.request import Request


def newest(running: Sequence[Request]) -> Request:
    """Return the request that was admitted last: it loses the least, and the oldest never waits.

    `running` is in order of admission and not empty. As steps are planned in that order too, the
    victim has no chunk in the plan that is being made, unless it is the request in need itself.
    """
    return running[-1]
