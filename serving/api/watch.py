"""One timer for everything that is open: it looks at all of it, a few times a keep-alive, and when
something of it is due.

A timer or a task for each of a thousand silent streams would cost more than the streams. It runs
while something is open, and decides nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

# However many deadlines there are, and however close together.
_SHORTEST_INTERVAL_S = 0.005

Clock = Callable[[], float]


class Watched(Protocol):
    def look(self, now: float) -> None:
        """Do what is due at this time of the event loop; never waits."""
        ...


class Watch:
    """Belongs to the event loop's thread."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._watched: dict[int, Watched] = {}
        self._due_s: dict[int, float] = {}  # of those that have a time of their own to come
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, watched: Watched, due_s: float = math.inf) -> None:
        """Look at it every interval, and at `due_s` of the event loop's time."""
        self._watched[id(watched)] = watched
        if due_s < math.inf:
            self._due_s[id(watched)] = due_s
        if self._timer is None or due_s < self._timer.when():
            self._arm()

    def remove(self, watched: Watched) -> None:
        """Look at it no more. May be called twice."""
        self._watched.pop(id(watched), None)
        self._due_s.pop(id(watched), None)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        now = loop.time()
        next_s = min((now + self._interval_s, *self._due_s.values()))
        self._timer = loop.call_at(max(next_s, now + _SHORTEST_INTERVAL_S), self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for key, watched in list(self._watched.items()):
            if self._due_s.get(key, math.inf) <= now:
                del self._due_s[key]
            watched.look(now)
        if self._watched:
            self._arm()
