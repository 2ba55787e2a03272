"""Says when an instance has brought nothing of what it owes for too long. No clock, no timer.

A process that answers may still compute nothing: of one with requests, steps are what counts. One
without is asked for a sign of life now and then, and owes that.
"""

from __future__ import annotations

from engine.messages import StepEvents
from scheduler.types import RequestId


class Watchdog:
    """Told of all that goes to an instance and comes back, and asked every `interval_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        # Often enough to be on time, seldom enough to cost nothing.
        self.interval_s = min(0.5, limit_s / 8)
        self._owed: set[RequestId] = set()
        self._owes_pong = False
        self._quiet_since_s = 0.0  # of one that owes something, else when it was last heard
        self._asked_at_s = 0.0

    def submitted(self, request_id: RequestId, now: float) -> None:
        if not (self._owed or self._owes_pong):
            self._quiet_since_s = now
        self._owed.add(request_id)

    def progressed(self, events: StepEvents, now: float) -> None:
        self._quiet_since_s = now
        self._owed.difference_update(event.request_id for event in events.finished)
        self._owed.difference_update(event.request_id for event in events.rejected)

    def wants_ping(self, now: float) -> bool:
        """Whether to ask now for a sign of life; if so, it is owed from now on."""
        if self._owed or self._owes_pong or now - self._quiet_since_s < self._limit_s / 2:
            return False
        self._quiet_since_s = now
        self._owes_pong = True
        return True

    def answered(self, now: float) -> None:
        self._quiet_since_s = now
        self._owes_pong = False

    def verdict(self, now: float) -> str | None:
        """Return what is wrong, None if nothing is."""
        held_up_s = now - self._asked_at_s - self.interval_s
        self._asked_at_s = now
        if held_up_s > self.interval_s:
            # We were stopped ourselves, or busy: what came meanwhile may not be read yet.
            self._quiet_since_s = min(now, self._quiet_since_s + held_up_s)
        owes = bool(self._owed) or self._owes_pong
        if not owes or now - self._quiet_since_s < self._limit_s:
            return None
        if not self._owed:
            return f"no sign of life for {self._limit_s:g} s"
        return f"no step for {self._limit_s:g} s with {count(len(self._owed), 'request')}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
