"""One timer for everything that is open: it looks at all of it, a few times a keep-alive.

A timer or a task for each of a thousand silent streams would cost more than the streams. It runs
while something is open, and decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

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
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, watched: Watched) -> None:
        self._watched[id(watched)] = watched
        if self._timer is None:
            self._arm()

    def remove(self, watched: Watched) -> None:
        """Look at it no more. May be called twice."""
        self._watched.pop(id(watched), None)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for watched in list(self._watched.values()):
            watched.look(now)
        if self._watched:
            self._arm()
