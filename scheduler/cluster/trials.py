"""Puts doubtful requests on trial, and tells what the death of an instance proves.

The rules, and what they cost, are in `suspicion`. The doubtful wait here for an instance that is
free for them. Decides nothing by itself: `ClusterScheduler` asks, and acts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from scheduler.cluster.ledger import Ledger
from scheduler.cluster.queue import Assignment, Queue, able, fits_nowhere, owned
from scheduler.cluster.suspicion import Fingerprint, Suspicion, fingerprint
from scheduler.types import RequestId, RequestSpec


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
        self._waiting: dict[RequestId, Assignment] = {}
        # Nobody of this rank or behind it may go where a trial could be, or none would ever begin.
        self.reserved_rank: int | None = None

    @property
    def waiting(self) -> Collection[Assignment]:
        """The doubtful that are on no instance."""
        return self._waiting.values()

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

    def got_token(self, request: Assignment, ledger: Ledger) -> None:
        """Its first one there."""
        if not self._suspicion.is_empty():
            self._suspicion.got_token(request.fingerprint)
            if ledger.trial == request.request_id and not self.is_doubtful(request):
                ledger.trial = None

    def settled(self, request: Assignment, ledger: Ledger) -> None:
        """It is suspected no more, and on trial neither."""
        if not self._suspicion.is_empty():
            self._suspicion.settled(request.fingerprint)
        if ledger.trial == request.request_id:
            ledger.trial = None

    def died(self, ledger: Ledger, there: Collection[Assignment], now: float) -> Fingerprint | None:
        """An instance died with all that were there; return who is condemned for it."""
        suspicion = self._suspicion
        keys = dict.fromkeys(request.fingerprint for request in there)
        tried = [one.fingerprint for one in there if one.request_id == ledger.trial]
        doubtful = [key for key in keys if suspicion.is_doubtful(key)]
        is_proof = bool(tried) and doubtful == tried  # else it may have been another
        suspicion.died(keys, now, is_explained=is_proof)
        return tried[0] if is_proof and suspicion.died_on_trial(tried[0], now) else None

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
            self._waiting[request.request_id] = request

    def discard(self, request: Assignment) -> None:
        self._waiting.pop(request.request_id, None)

    def verdicts(self, queue: Queue, ledgers: Collection[Ledger]) -> Iterator[Verdict]:
        """Return whom to try next; each is to be acted upon before the next is asked for.

        Those that are doubtful no more go back to the queue. `reserved_rank` holds from then on.
        """
        self.reserved_rank = None
        if not self._waiting:
            return
        on_trial = (self._requests.get(one.trial) for one in ledgers if one.trial is not None)
        tried = {request.fingerprint for request in on_trial if request is not None}
        free: dict[int, list[Ledger]] = {}  # by rank, as there may be many of few ranks
        for request in sorted(self._waiting.values(), key=lambda one: (one.rank, one.ordinal)):
            if not self.is_doubtful(request):
                self.discard(request)
                queue.push(request)
            elif request.fingerprint not in tried:
                rank = request.rank
                if rank not in free:
                    free[rank] = [
                        one for one in ledgers if one.is_free(rank) and self._is_clean(one)
                    ]
                num_tokens = len(request.spec.prompt_token_ids)
                fitting = able(free[rank], request)
                candidates = [one for one in fitting if one.has_memory(num_tokens)]
                if candidates:
                    free.clear()
                    tried.add(request.fingerprint)
                if candidates or fits_nowhere(ledgers, request):
                    self.discard(request)
                    yield Verdict(request, candidates)
                elif self.reserved_rank is None:  # they come by rank
                    self.reserved_rank = rank

    def _is_clean(self, ledger: Ledger) -> bool:
        """Whether nobody there was at two deaths, as a death there shall tell of one alone."""
        there = owned(self._requests, ledger)
        return self._suspicion.is_empty() or not any(
            self._suspicion.is_repeated(one.fingerprint) for one in there
        )
