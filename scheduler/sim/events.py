"""What happens to a simulated instance from outside, in order of time."""

from __future__ import annotations

import heapq
from typing import NamedTuple

from scheduler.types import RequestId, RequestSpec


class Arrival(NamedTuple):
    spec: RequestSpec


class Abort(NamedTuple):
    request_id: RequestId


Event = Arrival | Abort


class EventQueue:
    """Events by time; those of one time in the order in which they were put."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Event]] = []
        self._num_put = 0

    def put(self, at_s: float, event: Event) -> None:
        heapq.heappush(self._heap, (at_s, self._num_put, event))
        self._num_put += 1

    @property
    def next_s(self) -> float | None:
        """When the next event is; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def pop_until(self, now: float) -> list[Event]:
        """Take all events up to and including `now`."""
        events = []
        while self._heap and self._heap[0][0] <= now:
            events.append(heapq.heappop(self._heap)[2])
        return events
