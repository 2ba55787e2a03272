"""Puts doubtful requests on trial, and tells what the death of an instance proves.

The rules, and what they cost, are in `suspicion`. The doubtful wait here for an instance that is
free for them. Decides nothing by itself: `ClusterScheduler` asks, and acts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from scheduler.cluster.ledger import Ledger
from scheduler.cluster.queue import Assignment, Queue, able, max_fit, owned
from scheduler.cluster.suspicion import Fingerprint, Suspicion, fingerprint
from scheduler.types import InstanceId, RequestId, RequestSpec


class Verdict(NamedTuple):
    """What is to be done with one that waits for its trial, and is not held any more."""

    request: Assignment
    candidates: list[Ledger]  # where it is to be tried; none: what it would fit is gone


class Trials:
    """Of the fleet."""

    def __init__(self, requests: Mapping[RequestId, Assignment]) -> None:
        """`requests` are all that live; they are read here only."""
        self._requests = requests
        self._suspicion = Suspicion()
        self._waiting: list[Assignment] = []  # by rank and arrival
        self._most_tokens = 0  # that one of them needs, or one that was among them
        self._num_seen_changes = 0  # of what is suspected
        self._reserved: InstanceId | None = None
        self._reserved_rank = 0

    @property
    def waiting(self) -> Sequence[Assignment]:
        """The doubtful that are on no instance, first those that are tried first."""
        return tuple(self._waiting)

    @property
    def num_quarantined(self) -> int:
        return self._suspicion.num_quarantined

    def is_doubtful(self, request: Assignment) -> bool:
        return not self._suspicion.is_empty() and self._suspicion.is_doubtful(request.fingerprint)

    def is_quarantined(self, spec: RequestSpec) -> bool:
        suspicion = self._suspicion
        return bool(suspicion.num_quarantined) and suspicion.is_quarantined(fingerprint(spec))

    # --- what happens ---

    def expire(self, now: float) -> None:
        """Forget what is too long ago."""
        self._suspicion.expire(now)

    def got_on(self, request: Assignment, ledger: Ledger) -> bool:
        """It has got more tokens there. Return whether that means anything."""
        is_concerned = self._is_concerned(request, ledger)
        if is_concerned:
            self._suspicion.got_on(request.fingerprint, request.num_tokens)
        if ledger.trial == request.request_id and not self.is_doubtful(request):
            ledger.trial = None
        return is_concerned

    def ended(self, request: Assignment, ledger: Ledger) -> None:
        """It ended well: it is suspected no more, and on trial neither."""
        if self._is_concerned(request, ledger):
            self._suspicion.ended(request.fingerprint)
        if ledger.trial == request.request_id:
            ledger.trial = None

    def died(self, ledger: Ledger, there: Collection[Assignment], now: float) -> Fingerprint | None:
        """An instance died with all that were there; return who is condemned for it."""
        num_tokens: dict[Fingerprint, int] = {}
        for request in there:
            key = request.fingerprint
            num_tokens[key] = max(request.num_tokens, num_tokens.get(key, 0))
        tried = [one.fingerprint for one in there if one.request_id == ledger.trial]
        doubtful = [key for key in num_tokens if self._suspicion.is_doubtful(key)]
        # Else it may have been another.
        proven = tried[0] if tried and doubtful == tried else None
        return proven if self._suspicion.died(num_tokens, now, proven) else None

    def untried(
        self, there: Collection[Assignment], ledgers: Collection[Ledger]
    ) -> list[tuple[Assignment, Ledger]]:
        """Return those like these that run without a trial though they may be about to kill."""
        keys = {request.fingerprint for request in there if self.is_doubtful(request)}
        return [
            (request, ledger)
            for ledger in (ledgers if keys else ())
            for request in owned(self._requests, ledger)
            if request.request_id != ledger.trial
            and not request.is_cancelled
            and ledger.awaits_token(request.request_id)
            and request.fingerprint in keys
        ]

    # --- who is tried where ---

    def take_from(self, queue: Queue) -> None:
        """Have all that are doubtful wait here instead."""
        for request in filter(self.is_doubtful, queue.all()):
            queue.discard(request)
            insort(self._waiting, request, key=_order)
            self._most_tokens = max(self._most_tokens, request.max_num_tokens)

    def release_to(self, queue: Queue) -> None:
        """Have those that are doubtful no more wait there again."""
        if self._num_seen_changes == self._suspicion.num_changes:
            return
        self._num_seen_changes = self._suspicion.num_changes
        for request in self.waiting:
            if not self.is_doubtful(request):
                self.discard(request)
                queue.push(request)

    def discard(self, request: Assignment) -> None:
        index = bisect_left(self._waiting, _order(request), key=_order)
        if index < len(self._waiting) and self._waiting[index] is request:
            del self._waiting[index]
        if not self._waiting:
            self._most_tokens = 0

    def next_verdict(self, ledgers: Collection[Ledger]) -> Verdict | None:
        """Return whom to try now, or to give up; it does not wait any more. None: nobody."""
        if not self._waiting:
            return None
        fits = max_fit(ledgers)
        # Mostly nobody can be tried now, and then it is known without looking at each.
        may_be_free = [ledger for ledger in ledgers if ledger.is_free(self._waiting[0].rank)]
        if not may_be_free and (fits is None or self._most_tokens <= fits):
            return None
        for request in self._untried(ledgers):
            num_tokens = len(request.spec.prompt_token_ids)
            candidates = [
                ledger
                for ledger in able(may_be_free, request)
                if ledger.is_free(request.rank)
                and ledger.has_memory(num_tokens)
                and self._is_clean(ledger)
            ]
            if candidates or (fits is not None and request.max_num_tokens > fits):
                self.discard(request)
                return Verdict(request, candidates)
        return None

    def reserve(self, ledgers: Collection[Ledger]) -> None:
        """Keep one instance for whom is next, or in a busy fleet its trial would never begin.

        Until then nobody of that rank or behind it goes there.
        """
        request = next(self._untried(ledgers), None) if self._waiting else None
        possible: list[Ledger] = []
        if request is not None:
            possible = [
                ledger
                for ledger in able(ledgers, request)
                if ledger.trial is None and not ledger.is_draining
            ]
        if request is None or not possible:
            self._reserved = None
            return
        self._reserved_rank = request.rank
        # The same as long as it is possible, as another may be nearer to free for a moment only.
        if self._reserved not in {ledger.instance_id for ledger in possible}:
            nearest = min(possible, key=lambda one: (one.num_waiting_tokens, len(one.assigned)))
            self._reserved = nearest.instance_id

    def may_go(self, request: Assignment, ledger: Ledger) -> bool:
        """Whether one that is not doubtful spoils no trial there: neither now nor to come."""
        if ledger.instance_id == self._reserved and self._reserved_rank <= request.rank:
            return False
        return ledger.trial is None or not self._suspicion.is_repeated(request.fingerprint)

    def _untried(self, ledgers: Collection[Ledger]) -> Iterator[Assignment]:
        """Yield those of whom none alike is on trial, in the order in which they wait."""
        on_trial = (self._requests.get(one.trial) for one in ledgers if one.trial is not None)
        tried = {request.fingerprint for request in on_trial if request is not None}
        return (request for request in self._waiting if request.fingerprint not in tried)

    def _is_concerned(self, request: Assignment, ledger: Ledger) -> bool:
        """Whether what it does tells of a suspect: one alike that was at no death may do well."""
        if self._suspicion.is_empty():
            return False
        return request.num_losses > 0 or ledger.trial == request.request_id

    def _is_clean(self, ledger: Ledger) -> bool:
        """Whether nobody there has two deaths to outlive, as one there shall tell of one alone."""
        there = owned(self._requests, ledger)
        return not any(self._suspicion.is_repeated(one.fingerprint) for one in there)


def _order(request: Assignment) -> tuple[int, int]:
    return request.rank, request.ordinal
