"""Requests that wait at the router: by rank, then in the order in which they arrived.

One that lost its instance keeps its place in that order, which is before all that came later.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping

from scheduler.cluster.ledger import Ledger
from scheduler.cluster.suspicion import Fingerprint, fingerprint
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec


class Assignment:
    """One accepted request, from arrival to end: where it is, and what befell it."""

    __slots__ = (
        "_fingerprint",
        "instance_id",
        "is_cancelled",
        "num_losses",
        "num_tokens",
        "ordinal",
        "rank",
        "spec",
    )

    def __init__(self, spec: RequestSpec, rank: int, ordinal: int) -> None:
        self.spec = spec
        self.rank = rank
        self.ordinal = ordinal
        self.instance_id: InstanceId | None = None  # None: it is queued here
        self.is_cancelled = False  # its instance was told to drop it
        self.num_losses = 0  # instances that died under it
        self.num_tokens = 0  # it had on its instance at the last of the `PROGRESS_MARKS`
        self._fingerprint: Fingerprint | None = None  # once it was asked for

    @property
    def request_id(self) -> RequestId:
        return self.spec.request_id

    @property
    def fingerprint(self) -> Fingerprint:
        if self._fingerprint is None:  # to hash a long prompt takes a while: once, if at all
            self._fingerprint = fingerprint(self.spec)
        return self._fingerprint

    def is_like(self, key: Fingerprint) -> bool:
        """Whether it is known by this; most are not, and need not be hashed to tell."""
        return (self.spec.tenant, len(self.spec.prompt_token_ids)) == key[:2] and (
            self.fingerprint == key
        )

    @property
    def max_num_tokens(self) -> int:
        return max_num_tokens(self.spec)


def max_num_tokens(spec: RequestSpec) -> int:
    """Return what a request may become: prompt and answer."""
    return len(spec.prompt_token_ids) + spec.params.max_tokens


def refusal(
    spec: RequestSpec, ledgers: Collection[Ledger], num_requests: int, max_num_waiting: int
) -> RejectReason | None:
    """Return why there is no place for one more, beside so many that were accepted."""
    num_tokens = max_num_tokens(spec)
    fitting = [ledger for ledger in ledgers if ledger.capacity.fits(num_tokens)]
    if not fitting:
        return RejectReason.NEVER_FITS
    if all(ledger.is_draining for ledger in fitting):
        return RejectReason.NO_INSTANCE
    num_running = sum(ledger.capacity.max_num_running for ledger in ledgers)
    return RejectReason.QUEUE_FULL if num_requests >= num_running + max_num_waiting else None


def owned(requests: Mapping[RequestId, Assignment], ledger: Ledger) -> list[Assignment]:
    """Return the requests there that did not go on elsewhere."""
    there = (requests.get(request_id) for request_id in ledger.assigned)
    return [one for one in there if one and one.instance_id == ledger.instance_id]


def able(ledgers: Iterable[Ledger], request: Assignment) -> list[Ledger]:
    """Return the instances where it can be, room or no room."""
    return [
        ledger
        for ledger in ledgers
        if ledger.capacity.fits(request.max_num_tokens)
        and request.request_id not in ledger.assigned
    ]


def max_fit(ledgers: Iterable[Ledger]) -> int | None:
    """Return how many tokens a request may have somewhere; None while no instance takes any."""
    takers = (ledger.capacity for ledger in ledgers if not ledger.is_draining)
    return max((capacity.max_num_tokens for capacity in takers), default=None)


class Queue:
    """A heap; what is taken out from the middle is skipped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Assignment]] = []
        self._members: dict[RequestId, Assignment] = {}

    def __len__(self) -> int:
        return len(self._members)

    def push(self, request: Assignment) -> None:
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (request.rank, request.ordinal, request))

    def head(self) -> Assignment | None:
        """Return the one whose turn it is."""
        while self._heap:
            request = self._heap[0][2]
            if self._members.get(request.request_id) is request:
                return request
            heapq.heappop(self._heap)
        return None

    def discard(self, request: Assignment) -> None:
        """Take it out, wherever it is."""
        if self._members.get(request.request_id) is request:
            del self._members[request.request_id]
            if len(self._heap) > 64 and len(self._heap) > 4 * len(self._members):
                members = self._members.values()
                self._heap = [(request.rank, request.ordinal, request) for request in members]
                heapq.heapify(self._heap)

    def all(self) -> list[Assignment]:
        return list(self._members.values())
