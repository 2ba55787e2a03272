"""Decides who is let in: bounds on open streams, queued requests and queued prompt tokens.

A pure state machine: time is an argument, a refusal is a value. It waits for nothing, knows no
socket and no prompt, and decides nothing about who computes first: that is the scheduler's.

A request enters by an estimate of its prompt, before anybody has parsed it; the estimate gives way
to the real sizes once they are known. It is queued until its first step is complete, and open until
it has ended. Each bound holds for the server and, times a share, for each tenant.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from scheduler.types import RequestId

# Between text (4 bytes a token in English) and token ids in JSON (5 or 6 digits and a comma).
BYTES_PER_TOKEN = 4

# Below a tenth of a second nothing has changed; openai-python obeys waits of up to two minutes.
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 60.0
_UNKNOWN_RETRY_S = 1.0
_JITTER = 0.25  # of the wait, to either side: those refused together do not come back together
_WINDOW_S = 10
# What makes a rate: so many starts, or so long a queue.
_MIN_STARTS, _MIN_BUSY_S = 8, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Of the whole server; a tenant may take `tenant_share` of each, and run as many as it can."""

    max_num_running: int = 64
    max_num_waiting: int = 512
    max_num_waiting_tokens: int = 262_144
    max_num_streams: int = 1152
    max_queue_age_s: float = 60.0  # inf: they may wait for ever
    tenant_share: float = 1.0


class RefusalReason(StrEnum):
    """Which bound was reached."""

    STREAMS = "streams"
    REQUESTS = "requests"
    TOKENS = "tokens"
    AGE = "age"  # it would wait longer than it may
    TOO_MANY = "too_many"  # more generations than may ever be open: no wait would help


_TENANTS = "tenant_"
_LABELS = {
    (is_tenants, reason): (_TENANTS if is_tenants else "") + reason
    for is_tenants in (False, True)
    for reason in RefusalReason
}
REFUSAL_LABELS = tuple(_LABELS.values())


class Refusal(NamedTuple):
    """Why not now, and when to try again."""

    reason: RefusalReason
    is_tenants: bool  # its tenant's bound, not the server's
    retry_after_s: float
    limit: float  # that bound, in its own unit

    @property
    def label(self) -> str:
        """The word that it is counted by."""
        return _LABELS[self.is_tenants, self.reason]


class Ticket:
    """What one HTTP request holds. Only `Admission` writes here."""

    __slots__ = ("arrived_at_s", "has_begun", "queued", "request_id", "running", "tenant")

    def __init__(self, request_id: str, tenant: str, arrived_at_s: float) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.arrived_at_s = arrived_at_s
        self.has_begun = False  # for some of it was computed
        # The prompt tokens of each generation that has not started.
        self.queued: dict[RequestId, int] = {}
        self.running: set[RequestId] = set()


class DrainRate:
    """Requests and tokens that leave a queue per second in which it was not empty.

    Ten buckets of a second: seconds without a queue say nothing of how fast one would drain.
    """

    __slots__ = ("_buckets", "_last_s")

    def __init__(self, now: float) -> None:
        self._last_s = now
        # Each: the second, seconds of it with a queue, requests and tokens that started.
        self._buckets: deque[list[float]] = deque(maxlen=_WINDOW_S)

    def advance(self, now: float, *, is_busy: bool) -> None:
        """Time has passed since the last call, with a queue or without."""
        if is_busy:
            start_s = max(self._last_s, now - _WINDOW_S)
            while start_s < now:
                end_s = min(math.floor(start_s) + 1.0, now)
                self._bucket(start_s)[1] += end_s - start_s
                start_s = end_s
        self._last_s = max(now, self._last_s)

    def start(self, now: float, num_tokens: int) -> None:
        bucket = self._bucket(now)
        bucket[2] += 1
        bucket[3] += num_tokens

    def per_second(self, now: float) -> tuple[float, float] | None:
        """Return requests and tokens per second; None as long as little is known."""
        recent = [bucket for bucket in self._buckets if bucket[0] > now - _WINDOW_S - 1]
        busy_s, num_requests, num_tokens = (
            sum(bucket[index] for bucket in recent) for index in (1, 2, 3)
        )
        if busy_s <= 0 or (num_requests < _MIN_STARTS and busy_s < _MIN_BUSY_S):
            return None
        # Had one more started just now, it would be this: a rate is never nothing.
        return max(1, num_requests) / busy_s, num_tokens / busy_s or math.inf

    def _bucket(self, at_s: float) -> list[float]:
        second = math.floor(at_s)
        if not self._buckets or self._buckets[-1][0] < second:
            self._buckets.append([second, 0.0, 0.0, 0.0])
        return self._buckets[-1]


class _Tally:
    """What is open, of the server or of one tenant."""

    __slots__ = ("num_queued", "num_queued_tokens", "num_running", "num_streams", "rate")

    def __init__(self, now: float) -> None:
        self.num_streams = 0
        self.num_queued = 0
        self.num_queued_tokens = 0
        self.num_running = 0
        self.rate = DrainRate(now)

    @property
    def is_empty(self) -> bool:
        return not (self.num_streams or self.num_queued or self.num_running)

    def queue(self, num_tokens: int, now: float) -> None:
        self.rate.advance(now, is_busy=self.num_queued > 0)
        self.num_queued += 1
        self.num_queued_tokens += num_tokens

    def unqueue(self, num_tokens: int, now: float) -> None:
        self.rate.advance(now, is_busy=True)
        self.num_queued -= 1
        self.num_queued_tokens -= num_tokens

    def retry_s(self, now: float) -> float:
        """Return when what is queued now will have left: its turn would have come by then."""
        self.rate.advance(now, is_busy=self.num_queued > 0)
        rates = self.rate.per_second(now)
        if rates is None or not self.num_queued:
            return _UNKNOWN_RETRY_S
        requests_s, tokens_s = rates
        return max(self.num_queued / requests_s, self.num_queued_tokens / tokens_s)


class Admission:
    """Who is in, by tenant; refuses whom it cannot serve in time."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self.num_refused: Counter[str] = Counter()  # by reason
        self._server = _Tally(0.0)
        self._tenants: dict[str, _Tally] = {}  # of those that have something open

    def enter(self, request_id: str, tenant: str, num_tokens: int, now: float) -> Ticket | Refusal:
        """Take one HTTP request in, as one generation of so many prompt tokens, or say why not."""
        refusal = self._refusal(request_id, tenant, 1, num_tokens, now, num_streams=1)
        if refusal is not None:
            return refusal
        ticket = Ticket(request_id, tenant, now)
        for tally in self._tallies(tenant, now):
            tally.num_streams += 1
        self._queue(ticket, {RequestId(request_id): num_tokens}, now)
        return ticket

    def correct(self, ticket: Ticket, sizes: Mapping[RequestId, int], now: float) -> Refusal | None:
        """Replace the estimate: the prompt tokens of each generation, by the generation's id.

        Refused, the ticket holds its stream alone, until it leaves.
        """
        self._give_up_queue(ticket, now)
        refusal = self._refusal(
            ticket.request_id, ticket.tenant, len(sizes), sum(sizes.values()), now
        )
        if refusal is None:
            self._queue(ticket, sizes, now)
        return refusal

    def started(self, ticket: Ticket, generation_id: RequestId, now: float) -> None:
        """A generation's first step is complete: it is queued no more."""
        num_tokens = ticket.queued.pop(generation_id, None)
        if num_tokens is not None:
            ticket.has_begun = True
            ticket.running.add(generation_id)
            for tally in self._tallies(ticket.tenant, now):
                tally.unqueue(num_tokens, now)
                tally.rate.start(now, num_tokens)
                tally.num_running += 1

    def ended(self, ticket: Ticket, generation_id: RequestId, now: float) -> None:
        """A generation ended, whether it had started or not. Others of its request may go on."""
        num_tokens = ticket.queued.pop(generation_id, None)
        if num_tokens is not None:
            for tally in self._tallies(ticket.tenant, now):
                tally.unqueue(num_tokens, now)
        elif generation_id in ticket.running:
            ticket.running.remove(generation_id)
            for tally in self._tallies(ticket.tenant, now):
                tally.num_running -= 1

    def leave(self, ticket: Ticket, now: float) -> None:
        """The HTTP request is over."""
        self._give_up_queue(ticket, now)
        for tally in self._tallies(ticket.tenant, now):
            tally.num_running -= len(ticket.running)
            tally.num_streams -= 1
        ticket.running.clear()
        if self._tenants[ticket.tenant].is_empty:
            del self._tenants[ticket.tenant]

    def is_overdue(self, ticket: Ticket, now: float) -> bool:
        """Whether it has waited too long to be served at all; a request that began goes on."""
        waits = bool(ticket.queued) and not ticket.has_begun
        return waits and now - ticket.arrived_at_s >= self.limits.max_queue_age_s

    def retry_after_s(self, request_id: str, now: float) -> float:
        """Return when the queue will have drained, for one that is refused though it was in."""
        return jittered(self._server.retry_s(now), request_id)

    def state(self) -> dict[str, Any]:
        """Return what is open and what was refused as plain data for people."""
        return {
            "server": _shown(self._server),
            "tenants": {tenant: _shown(tally) for tenant, tally in self._tenants.items()},
            "refused": dict(self.num_refused),
        }

    # --- how ---

    def _refusal(
        self,
        request_id: str,
        tenant: str,
        num_requests: int,
        num_tokens: int,
        now: float,
        *,
        num_streams: int = 0,
    ) -> Refusal | None:
        """Return why so much more cannot be let in. The tenant's bounds come first."""
        share = self.limits.tenant_share
        scopes = [(self._server, 1.0, False)]
        if share < 1.0:
            own = self._tenants.get(tenant) or _Tally(now)
            scopes.insert(0, (own, share, True))
        for tally, part, is_tenants in scopes:
            reached = self._reached(tally, part, num_requests, num_tokens, num_streams, now)
            if reached is not None:
                reason, limit = reached
                self.num_refused[reason] += 1
                retry_s = jittered(tally.retry_s(now), request_id)
                return Refusal(reason, is_tenants, retry_s, limit)
        return None

    def _reached(
        self,
        tally: _Tally,
        part: float,
        num_requests: int,
        num_tokens: int,
        num_streams: int,
        now: float,
    ) -> tuple[RefusalReason, float] | None:
        """Return the bound that so much more would exceed, of which `part` is the tally's."""
        limits = self.limits
        max_num_streams = max(1, part * limits.max_num_streams)
        if tally.num_streams + num_streams > max_num_streams:
            return RefusalReason.STREAMS, max_num_streams
        max_num_open = max(1, limits.max_num_running + int(part * limits.max_num_waiting))
        if num_requests > max_num_open:
            return RefusalReason.TOO_MANY, max_num_open
        num_open = tally.num_queued + tally.num_running
        if num_open + num_requests > max_num_open:
            return RefusalReason.REQUESTS, max_num_open
        # One that is alone is let in whatever its size: no wait would make it smaller.
        max_num_tokens = part * limits.max_num_waiting_tokens
        if tally.num_queued and tally.num_queued_tokens + num_tokens > max_num_tokens:
            return RefusalReason.TOKENS, max_num_tokens
        # The server's rate also for a tenant: how fast its own start depends on all the others.
        num_before = num_open - limits.max_num_running
        rates = self._server.rate.per_second(now) if num_before > 0 else None
        if rates is not None and num_before > part * rates[0] * limits.max_queue_age_s:
            return RefusalReason.AGE, limits.max_queue_age_s
        return None

    def _queue(self, ticket: Ticket, sizes: Mapping[RequestId, int], now: float) -> None:
        ticket.queued.update(sizes)
        for tally in self._tallies(ticket.tenant, now):
            for num_tokens in sizes.values():
                tally.queue(num_tokens, now)

    def _give_up_queue(self, ticket: Ticket, now: float) -> None:
        for tally in self._tallies(ticket.tenant, now):
            for num_tokens in ticket.queued.values():
                tally.unqueue(num_tokens, now)
        ticket.queued.clear()

    def _tallies(self, tenant: str, now: float) -> tuple[_Tally, _Tally]:
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = _Tally(now)
        return self._server, own


def jittered(seconds: float, request_id: str) -> float:
    """Bound the wait, and spread it by a hash of the request's id: a function of it, no dice."""
    spread = zlib.crc32(request_id.encode()) / 2**32  # 0 to 1
    bounded = min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)
    return bounded * (1 + _JITTER * (2 * spread - 1))


def _shown(tally: _Tally) -> dict[str, int]:
    return {
        "num_streams": tally.num_streams,
        "num_queued": tally.num_queued,
        "num_queued_tokens": tally.num_queued_tokens,
        "num_running": tally.num_running,
    }
