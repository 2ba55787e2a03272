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

from collections.abc import Callable, Iterator
from typing import Any, assert_never

from scheduler.cluster.dispatch import Dispatcher
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
    Progressed,
    Reject,
    Reported,
)
from scheduler.cluster.ledger import Ledger
from scheduler.cluster.queue import Assignment, Queue, able, max_fit, owned, refusal
from scheduler.cluster.suspicion import Fingerprint
from scheduler.cluster.trials import Trials
from scheduler.config import ClusterConfig
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec


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
        self._dispatcher = Dispatcher(self.config)
        self._rank = rank
        self._instances: dict[InstanceId, Ledger] = {}
        self._requests: dict[RequestId, Assignment] = {}
        self._queue = Queue()
        self._trials = Trials(self._requests)
        self._draining = False
        self._num_arrivals = 0
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
        return len(self._queue) + len(self._trials.waiting)

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

    def state(self) -> dict[str, Any]:
        """Return what is decided so far as plain data for people, of no fixed form."""
        assigned = {key: one.instance_id for key, one in self._requests.items() if one.instance_id}
        doubtful = self._trials.waiting
        return {
            "draining": self._draining,
            "instances": {key: ledger.state() for key, ledger in self._instances.items()},
            "assigned": assigned,
            "queued": [request.request_id for request in (*self._queue.all(), *doubtful)],
            "doubtful": [request.request_id for request in doubtful],
            "num_quarantined": self._trials.num_quarantined,
        }

    # --- events ---

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:
        """Return what to do about the event, in order."""
        actions: list[ClusterAction] = []
        self._trials.expire(now)
        match event:
            case Reported(instance_id, view):
                if instance_id in self._instances:
                    self._instances[instance_id].report(view)
                return actions  # room is made by first tokens and ends
            case Progressed(request_id, instance_id, num_tokens):
                if not self._got_on(request_id, instance_id, num_tokens):
                    return actions
            case Arrived() | FirstToken() | Ended() | Cancelled():
                actions += self._take_request(event)
            case InstanceUp() | InstanceDown() | InstanceDraining() | MoveAway():
                actions += self._take_instance(event, now)
            case DrainStarted():
                self._draining = True
            case Elapsed():
                pass
            case _:
                assert_never(event)
        return [*actions, *self._give_up(now), *self._dispatches()]

    def _take_request(
        self, event: Arrived | FirstToken | Ended | Cancelled
    ) -> Iterator[ClusterAction]:
        match event:
            case Arrived(spec):
                if (reason := self._refusal(spec)) is None:
                    self._enter(spec)
                else:
                    yield Reject(spec.request_id, reason)
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
            case InstanceUp(instance_id, capacity, is_draining):
                # A new incarnation; should nobody have told of the end of the old one, it ended.
                yield from self._lose(instance_id, now, was_ours=True)
                self._instances[instance_id] = Ledger(
                    instance_id,
                    capacity,
                    is_draining=is_draining,
                    is_trusted=self.config.uses_ledger,
                    headroom_tokens=self.config.priority_headroom_tokens,
                )
            case InstanceDown(instance_id, was_ours):
                yield from self._lose(instance_id, now, was_ours=was_ours)
            case InstanceDraining(instance_id) if instance_id in self._instances:
                self._instances[instance_id].drain()
            case MoveAway(instance_id) if instance_id in self._instances:
                yield from self._move_away(self._instances[instance_id])
        if self.is_open:
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = now

    # --- requests come and go ---

    def _refusal(self, spec: RequestSpec) -> RejectReason | None:
        if not self.accepts:
            return RejectReason.NO_INSTANCE
        if spec.request_id in self._requests:
            return RejectReason.DUPLICATE_ID
        if self._trials.is_quarantined(spec):
            return RejectReason.QUARANTINED
        ledgers = self._instances.values()
        return refusal(spec, ledgers, len(self._requests), self.config.max_num_waiting)

    def _enter(self, spec: RequestSpec) -> None:
        request = Assignment(spec, self._rank(spec), self._num_arrivals)
        self._num_arrivals += 1
        self._requests[spec.request_id] = request
        self._queue.push(request)

    def _began(self, request_id: RequestId, instance_id: InstanceId) -> None:
        if self.owner(request_id) == instance_id:
            self._instances[instance_id].began(request_id)
            self._got_on(request_id, instance_id, 1)

    def _got_on(self, request_id: RequestId, instance_id: InstanceId, num_tokens: int) -> bool:
        """Return whether that may change what can be dispatched."""
        request = self._requests.get(request_id)
        if request is None or request.instance_id != instance_id:
            return False
        request.num_tokens = num_tokens
        return self._trials.got_on(request, self._instances[instance_id])

    def _ended(self, request_id: RequestId, instance_id: InstanceId) -> None:
        ledger, request = self._instances.get(instance_id), self._requests.get(request_id)
        if ledger is None:
            return
        if request is not None and request.instance_id == instance_id:
            if not request.is_cancelled:
                self._trials.ended(request, ledger)
            del self._requests[request_id]
        ledger.ended(request_id)

    def _cancel(self, event: Cancelled) -> Iterator[ClusterAction]:
        request = self._requests.get(event.request_id)
        if request is None or request.is_cancelled:
            return
        if request.instance_id is None:
            self._forget_queued(request)
        else:  # it stays assigned until the instance says that it ended
            if event.num_output_tokens is not None:  # it ended well
                self._trials.ended(request, self._instances[request.instance_id])
            request.is_cancelled = True
            yield Abort(event.request_id, request.instance_id, event.num_output_tokens)

    def _forget_queued(self, request: Assignment) -> None:
        self._queue.discard(request)
        self._trials.discard(request)
        del self._requests[request.request_id]

    # --- instances go ---

    def _lose(
        self, instance_id: InstanceId, now: float, *, was_ours: bool
    ) -> Iterator[ClusterAction]:
        """Have requests that lost their instance go on, but for what it died of."""
        ledger = self._instances.pop(instance_id, None)
        if ledger is None:
            return
        self._dispatcher.forget(instance_id)
        lost = owned(self._requests, ledger)
        for request in lost:
            request.num_losses += not was_ours
            if request.is_cancelled:  # nobody waits for it
                del self._requests[request.request_id]
            elif request.num_losses > self.config.max_num_losses:
                yield self._fail(request, FailReason.TOO_MANY_LOSSES)
            else:
                self._interrupt(request)
        # One that was moved away and is not let go of may be what it died of, too.
        if not was_ours and len(lost) == len(ledger.assigned):
            condemned = self._trials.died(ledger, lost, now)
            if condemned is not None:
                yield from self._condemn(condemned)
            for request, other in self._trials.untried(lost, self._instances.values()):
                yield self._take_back(request, other)

    def _condemn(self, key: Fingerprint) -> Iterator[ClusterAction]:
        """End all that runs, or would run, of what brought down its instance on trial."""
        alike = [one for one in self._requests.values() if one.is_like(key)]
        for request in (one for one in alike if not one.is_cancelled):
            yield Fail(request.request_id, FailReason.QUARANTINED)
            if request.instance_id is None:
                self._forget_queued(request)
            else:
                request.is_cancelled = True
                yield Abort(request.request_id, request.instance_id)

    def _move_away(self, ledger: Ledger) -> Iterator[ClusterAction]:
        for request in owned(self._requests, ledger):
            if not request.is_cancelled:
                yield self._take_back(request, ledger)

    def _take_back(self, request: Assignment, ledger: Ledger) -> Abort:
        """The instance has it until it says that it ended; nobody listens to what it says else."""
        self._interrupt(request)
        return Abort(request.request_id, ledger.instance_id)

    def _interrupt(self, request: Assignment) -> None:
        """Queue a request that was running, to go on from what its client has."""
        request.instance_id = None
        self._queue.push(request)

    def _fail(self, request: Assignment, reason: FailReason) -> Fail:
        del self._requests[request.request_id]
        return Fail(request.request_id, reason)

    def _give_up(self, now: float) -> Iterator[ClusterAction]:
        """End those who wait for an instance, when none came for too long."""
        since_s = self._alone_since_s
        if since_s is None or now - since_s < self.config.continuation_timeout_s:
            return
        for request in (*self._trials.waiting, *self._queue.all()):
            self._forget_queued(request)
            yield Fail(request.request_id, FailReason.NO_INSTANCE)

    # --- dispatch ---

    def _dispatches(self) -> Iterator[ClusterAction]:
        ledgers = self._instances.values()
        yield from self._try_doubtful()
        while (head := self._queue.head()) is not None:
            if self._trials.is_doubtful(head):
                self._trials.take_from(self._queue)
                yield from self._try_doubtful()
                continue
            candidates = [
                ledger
                for ledger in able(ledgers, head)
                if ledger.has_room(head.rank) and self._trials.may_go(head, ledger)
            ]
            if candidates:
                self._queue.discard(head)
                yield self._dispatch(head, candidates)
                continue
            fits = max_fit(ledgers)
            if fits is None or head.max_num_tokens <= fits:
                return
            self._queue.discard(head)  # it is not to hold up those behind it
            yield self._fail(head, FailReason.NO_INSTANCE)

    def _try_doubtful(self) -> Iterator[ClusterAction]:
        ledgers = self._instances.values()
        self._trials.release_to(self._queue)
        while (verdict := self._trials.next_verdict(ledgers)) is not None:
            request, candidates = verdict
            if candidates:
                dispatch = self._dispatch(request, candidates)
                self._instances[dispatch.instance_id].trial = request.request_id
                yield dispatch
            else:
                yield self._fail(request, FailReason.NO_INSTANCE)
        self._trials.reserve(ledgers)

    def _dispatch(self, request: Assignment, candidates: list[Ledger]) -> Dispatch:
        ledger, num_tokens = self._dispatcher.choose(request.spec, candidates)
        request.instance_id = ledger.instance_id
        request.num_tokens = 0
        ledger.send(request.request_id, request.rank, num_tokens)
        return Dispatch(request.spec, ledger.instance_id)
