"""Where the time of one request went: the marks as they pass, and the spans between them.

The only place that says what queue time, TTFT, prefill, decode and E2E of a request are; metrics,
`Server-Timing` and the `metrics` object of an answer all show these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """Spans of one request, seconds; None: it has not come so far.

    Arrival is when the head of its HTTP request was there: TTFT and E2E begin before its body is
    read, a place is found for it and its prompt becomes tokens, as its client sees it. What that
    takes is `intake_s`; `queue_s` is spent at the router and then in the instance.
    """

    intake_s: float = 0.0  # from arrival until it was queued
    queue_s: float | None = None  # from then to the first step
    ttft_s: float | None = None  # from arrival to the first token
    decode_s: float | None = None  # from the first token to the last so far
    e2e_s: float | None = None  # from arrival to the end
    num_tokens: int = 0  # delivered

    @property
    def prefill_s(self) -> float | None:
        """From the first step to the first token."""
        if self.ttft_s is None or self.queue_s is None:
            return None
        return max(0.0, self.ttft_s - self.intake_s - self.queue_s)

    @property
    def inference_s(self) -> float | None:
        """From the first step to the last token."""
        if self.prefill_s is None or self.decode_s is None:
            return None
        return self.prefill_s + self.decode_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None if there is none."""
        if self.decode_s is None or self.num_tokens < 2:
            return None
        return self.decode_s / (self.num_tokens - 1)


class RequestMarks:
    """When what happened to a request, on the driver's clock."""

    __slots__ = (
        "arrived_at_s",
        "dispatched_at_s",
        "ended_at_s",
        "first_at_s",
        "last_at_s",
        "num_tokens",
        "queue_s",
        "taken_at_s",
    )

    def __init__(self, arrived_at_s: float, taken_at_s: float) -> None:
        """It arrived at the server, and was then taken by the driver."""
        self.arrived_at_s = arrived_at_s
        self.taken_at_s = taken_at_s
        self.dispatched_at_s = taken_at_s
        self.queue_s: float | None = None
        self.first_at_s: float | None = None
        self.last_at_s: float | None = None
        self.ended_at_s: float | None = None
        self.num_tokens = 0

    def dispatched(self, now: float) -> None:
        """It was handed to an instance."""
        self.dispatched_at_s = now

    def started(self, queue_s: float) -> bool:
        """Its first step is complete, `queue_s` after the instance got it.

        False if it had been started before, elsewhere: the first time counts.
        """
        if self.queue_s is not None:
            return False
        self.queue_s = self.dispatched_at_s - self.taken_at_s + queue_s
        return True

    def token(self, now: float) -> float | None:
        """A token came; return the time since the last one, None for the first."""
        gap_s = None if self.last_at_s is None else now - self.last_at_s
        if self.first_at_s is None:
            self.first_at_s = now
        self.last_at_s = now
        self.num_tokens += 1
        return gap_s

    def ended(self, now: float) -> None:
        self.ended_at_s = now

    def times(self) -> RequestTimes:
        first_at_s, last_at_s, ended_at_s = self.first_at_s, self.last_at_s, self.ended_at_s
        return RequestTimes(
            intake_s=self.taken_at_s - self.arrived_at_s,
            queue_s=self.queue_s,
            ttft_s=None if first_at_s is None else first_at_s - self.arrived_at_s,
            decode_s=None if first_at_s is None or last_at_s is None else last_at_s - first_at_s,
            e2e_s=None if ended_at_s is None else ended_at_s - self.arrived_at_s,
            num_tokens=self.num_tokens,
        )
