"""Decides which instance runs which request. The only writer of assignments.

`handle(event, now)` returns actions; a driver performs them. An instance is a name here. Requests
wait here and not deep in instances, so that they stay movable: an instance has what it computes and
the next step's worth. The invariants that the property tests name:

C1  an accepted request is queued or assigned to exactly one instance, until it ends.
C2  a request that one instance is still to let go of is not sent there again.
C3  an instance that drains, or is not up, is sent nothing.
C4  every accepted request ends: by its instance, its client, or one Fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, assert_never

from scheduler.cluster.affinity import PrefixAffinity, preferred
from scheduler.cluster.dispatch import Choice, dispatch_policy
from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    ClusterAction,
    ClusterEvent,
    Dispatch,
    DrainStarted,
    Elapsed,
    Ended,
    Fail,
    FailReason,
    FirstToken,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    MoveAway,
    Reject,
    Reported,
)
from scheduler.cluster.ledger import InstanceLoad, Ledger
from scheduler.cluster.queue import Assignment, Queue, max_num_tokens
from scheduler.cluster.suspicion import MAX_STRIKES, Quarantine, culprit
from scheduler.config import ClusterConfig
from scheduler.load import InstanceView
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec

_MASK = (1 << 64) - 1


class ClusterScheduler:
    """Each accepted request is queued here or assigned to one instance until it ends."""

    def __init__(
        self,
        config: ClusterConfig | None = None,
        *,
        rank: Callable[[RequestSpec], int] = lambda _: 0,
    ) -> None:
        """`rank` says who comes first, as in the instances: a smaller one is earlier."""
        self.config = config or ClusterConfig()
        self._policy = dispatch_policy(self.config.dispatch)
        self._rank = rank
        self._affinity = PrefixAffinity() if self.config.prefix_affinity else None
        self._instances: dict[InstanceId, Ledger] = {}
        self._requests: dict[RequestId, Assignment] = {}
        self._queue = Queue()
        self._doubtful: dict[RequestId, Assignment] = {}  # queued too, to be tried one at a time
        self._quarantine = Quarantine()
        self._draining = False
        self._num_arrivals = 0
        self._num_dispatches = 0
        self._last: InstanceId | None = None
        self._alone_since_s: float | None = None  # no instance takes requests

    # --- what others may know ---

    @property
    def accepts(self) -> bool:
        """Whether requests are taken: an instance takes them, and the fleet does not drain."""
        return self.is_open and not self._draining

    @property
    def is_open(self) -> bool:
        """Whether an instance takes requests."""
        return any(not ledger.is_draining for ledger in self._instances.values())

    @property
    def num_instances(self) -> int:
        """Instances that are up."""
        return len(self._instances)

    @property
    def num_queued(self) -> int:
        """Requests that wait here."""
        return len(self._queue) + len(self._doubtful)

    def is_up(self, instance_id: InstanceId) -> bool:
        return instance_id in self._instances

    def num_assigned(self, instance_id: InstanceId) -> int:
        """Return how many requests the instance owes an end; 0 if it is not up."""
        ledger = self._instances.get(instance_id)
        return 0 if ledger is None else len(ledger.assigned)

    def owner(self, request_id: RequestId) -> InstanceId | None:
        """Return the instance that runs the request; what others say of it is out of date."""
        request = self._requests.get(request_id)
        return None if request is None else request.instance_id

    def ledgers(self) -> dict[InstanceId, Ledger]:
        """Return what is known of each instance that is up, to be read only."""
        return dict(self._instances)

    def views(self) -> dict[InstanceId, InstanceView]:
        """Return the last report of each instance."""
        return {
            key: ledger.view for key, ledger in self._instances.items() if ledger.view is not None
        }

    def state(self) -> dict[str, Any]:
        """Return what is decided so far as plain data for people, of no fixed form."""
        return {
            "draining": self._draining,
            "instances": {
                instance_id: {
                    "num_assigned": len(ledger.assigned),
                    "num_waiting_tokens": ledger.load().num_waiting_tokens,
                    "freeness": ledger.freeness(),
                    "draining": ledger.is_draining,
                }
                for instance_id, ledger in self._instances.items()
            },
            "assigned": {
                key: request.instance_id
                for key, request in self._requests.items()
                if request.instance_id is not None
            },
            "queued": [request.request_id for request in self._queue.all()],
            "doubtful": list(self._doubtful),
            "num_quarantined": len(self._quarantine),
        }

    # --- events ---

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        """Return what to do about the event, in order."""
        actions: list[ClusterAction] = []
        match event:
            case Reported(instance_id, view):
                if instance_id in self._instances:
                    self._instances[instance_id].report(view)
                return actions  # room is made by first tokens and ends
            case Arrived() | FirstToken() | Ended() | Cancelled():
                actions += self._take_request(event, now)
            case InstanceUp() | InstanceDown() | InstanceDraining() | MoveAway():
                actions += self._take_instance(event, now)
            case DrainStarted():
                self._draining = True
            case Elapsed():
                pass
            case _:
                assert_never(event)
        actions += self._give_up(now)
        actions += self._dispatches()
        return actions

    def _take_request(
        self, event: Arrived | FirstToken | Ended | Cancelled, now: float
    ) -> Iterator[ClusterAction]:
        match event:
            case Arrived(spec):
                refusal = self._refusal(spec, now)
                if refusal is None:
                    self._enter(spec)
                else:
                    yield Reject(spec.request_id, refusal)
            case FirstToken(request_id, instance_id):
                self._began(request_id, instance_id)
            case Ended(request_id, instance_id):
                self._ended(request_id, instance_id)
            case Cancelled():
                yield from self._cancel(event)

    def _take_instance(
        self, event: InstanceUp | InstanceDown | InstanceDraining | MoveAway, now: float
    ) -> Iterator[ClusterAction]:
        match event:
            case InstanceUp(instance_id, capacity):
                # A new incarnation; should nobody have told of the end of the old one, it ended.
                yield from self._lose(instance_id, now, was_ours=True)
                trusted = self.config.uses_ledger
                self._instances[instance_id] = Ledger(instance_id, capacity, is_trusted=trusted)
            case InstanceDown(instance_id, was_ours):
                yield from self._lose(instance_id, now, was_ours=was_ours)
            case InstanceDraining(instance_id) if instance_id in self._instances:
                self._instances[instance_id].is_draining = True
            case MoveAway(instance_id) if instance_id in self._instances:
                yield from self._move_away(self._instances[instance_id])
        if self.is_open:
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = now

    # --- requests come and go ---

    def _refusal(self, spec: RequestSpec, now: float) -> RejectReason | None:
        if not self.accepts:
            return RejectReason.NO_INSTANCE
        if spec.request_id in self._requests:
            return RejectReason.DUPLICATE_ID
        if self._quarantine.holds(spec, now):
            return RejectReason.QUARANTINED
        num_tokens = max_num_tokens(spec)
        ledgers = self._instances.values()
        fitting = [ledger for ledger in ledgers if ledger.capacity.fits(num_tokens)]
        if not fitting:
            return RejectReason.NEVER_FITS
        if all(ledger.is_draining for ledger in fitting):
            return RejectReason.NO_INSTANCE
        num_running = sum(ledger.capacity.max_num_running for ledger in ledgers)
        if len(self._requests) >= num_running + self.config.max_num_waiting:
            return RejectReason.QUEUE_FULL
        return None

    def _enter(self, spec: RequestSpec) -> None:
        request = Assignment(spec, self._rank(spec), self._num_arrivals)
        self._num_arrivals += 1
        self._requests[spec.request_id] = request
        self._queue.push(request)

    def _began(self, request_id: RequestId, instance_id: InstanceId) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.instance_id == instance_id:
            request.strikes = 0
            self._instances[instance_id].began(request_id)

    def _ended(self, request_id: RequestId, instance_id: InstanceId) -> None:
        if instance_id in self._instances:
            self._instances[instance_id].ended(request_id)
        request = self._requests.get(request_id)
        if request is not None and request.instance_id == instance_id:
            del self._requests[request_id]

    def _cancel(self, event: Cancelled) -> Iterator[ClusterAction]:
        request = self._requests.get(event.request_id)
        if request is None or request.is_cancelled:
            return
        if request.instance_id is None:
            self._forget_queued(request)
        else:  # it stays assigned until the instance says that it ended
            request.is_cancelled = True
            yield Abort(event.request_id, request.instance_id, event.num_output_tokens)

    def _forget_queued(self, request: Assignment) -> None:
        self._queue.discard(request)
        self._doubtful.pop(request.request_id, None)
        del self._requests[request.request_id]

    # --- instances go ---

    def _lose(
        self, instance_id: InstanceId, now: float, *, was_ours: bool
    ) -> Iterator[ClusterAction]:
        ledger = self._instances.pop(instance_id, None)
        if ledger is None:
            return
        if self._affinity is not None:
            self._affinity.forget(instance_id)
        yield from self._bereave(ledger, now, was_ours=was_ours)

    def _bereave(self, ledger: Ledger, now: float, *, was_ours: bool) -> Iterator[ClusterAction]:
        """Have requests that lost their instance go on, but for those that it may have died of."""
        lost, blamed = self._owned(ledger), None
        if not was_ours:
            for request in lost:
                request.num_losses += 1
            if len(lost) == len(ledger.assigned):  # else it may be one that was moved away
                blamed = self._suspect(lost, now)
        for request in lost:
            if request.is_cancelled:  # nobody waits for it, but it may have been the one
                del self._requests[request.request_id]
            elif request is blamed:
                yield self._fail(request, FailReason.QUARANTINED)
            elif request.num_losses > self.config.max_num_losses:
                yield self._fail(request, FailReason.TOO_MANY_LOSSES)
            else:
                self._interrupt(request)

    def _suspect(self, lost: list[Assignment], now: float) -> Assignment | None:
        for request in lost:
            request.strikes += 1
        blamed = culprit((request, request.strikes) for request in lost)
        if blamed is not None:
            self._quarantine.add(blamed.spec, now)
        return blamed

    def _move_away(self, ledger: Ledger) -> Iterator[ClusterAction]:
        for request in self._owned(ledger):
            # The instance has it until it says that it ended; nobody listens to what it says else.
            if not request.is_cancelled:
                yield Abort(request.request_id, ledger.instance_id)
                self._interrupt(request)

    def _owned(self, ledger: Ledger) -> list[Assignment]:
        """Return the requests there that did not go on elsewhere."""
        requests = (self._requests.get(request_id) for request_id in ledger.assigned)
        return [
            request
            for request in requests
            if request is not None and request.instance_id == ledger.instance_id
        ]

    def _interrupt(self, request: Assignment) -> None:
        """Queue a request that was running, to go on from what its client has."""
        request.instance_id = None
        if request.strikes >= MAX_STRIKES:
            self._doubtful[request.request_id] = request
        else:
            self._queue.push(request)

    def _fail(self, request: Assignment, reason: FailReason) -> Fail:
        del self._requests[request.request_id]
        return Fail(request.request_id, reason)

    def _give_up(self, now: float) -> Iterator[ClusterAction]:
        """End those who wait for an instance, when none came for too long."""
        since_s = self._alone_since_s
        if since_s is None or now - since_s < self.config.continuation_timeout_s:
            return
        for request in (*self._doubtful.values(), *self._queue.all()):
            self._forget_queued(request)
            yield Fail(request.request_id, FailReason.NO_INSTANCE)

    # --- dispatch ---

    def _dispatches(self) -> Iterator[ClusterAction]:
        for request in list(self._doubtful.values()):
            candidates = self._candidates(request)
            if candidates:
                del self._doubtful[request.request_id]
                yield self._dispatch(request, candidates)
            elif self._fits_nowhere(request):
                del self._doubtful[request.request_id]
                yield self._fail(request, FailReason.NO_INSTANCE)
        while (head := self._queue.head()) is not None:
            candidates = self._candidates(head)
            if candidates:
                self._queue.discard(head)
                yield self._dispatch(head, candidates)
            elif self._fits_nowhere(head):  # it is not to hold up those behind it
                self._queue.discard(head)
                yield self._fail(head, FailReason.NO_INSTANCE)
            else:
                return

    def _candidates(self, request: Assignment) -> list[Ledger]:
        """Return the instances that may get it now."""
        is_doubtful = request.strikes >= MAX_STRIKES
        return [
            ledger
            for ledger in self._instances.values()
            if ledger.has_room(request.rank)
            and request.request_id not in ledger.assigned
            and not (is_doubtful and ledger.doubtful is not None)
            and ledger.capacity.fits(request.max_num_tokens)
        ]

    def _fits_nowhere(self, request: Assignment) -> bool:
        """Whether those instances that it would fit are gone."""
        ledgers = [ledger for ledger in self._instances.values() if not ledger.is_draining]
        fitting = (ledger.capacity.fits(request.max_num_tokens) for ledger in ledgers)
        return bool(ledgers) and not any(fitting)

    def _dispatch(self, request: Assignment, candidates: list[Ledger]) -> Dispatch:
        loads: Sequence[InstanceLoad] = [ledger.load() for ledger in candidates]
        spec = request.spec
        keys: list[int] = []
        if self._affinity is not None and len(self._instances) > 1:
            keys = self._affinity.keys(spec)
            loads = preferred(loads, self._affinity.found(keys))
        self._num_dispatches += 1
        draw = _mixed(self.config.seed + self._num_dispatches)
        instance_id = self._policy(Choice(loads, self._last, draw))
        self._last = instance_id
        if self._affinity is not None:
            self._affinity.sent(keys, instance_id)
        request.instance_id = instance_id
        ledger = self._instances[instance_id]
        ledger.send(spec.request_id, request.rank, len(spec.prompt_token_ids))
        if request.strikes >= MAX_STRIKES:
            ledger.doubtful = spec.request_id
        return Dispatch(spec, instance_id)


def _mixed(number: int) -> int:
    """Return 64 bits that look random: splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (number * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
