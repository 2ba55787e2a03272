"""Who waits and who runs, and every move between the two. The only place where states change.

It decides nothing: the planner says who is admitted and who gives way. Blocks of those who stop
running are let go here, at once or when the steps in flight that touch them have completed.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from scheduler.instance.batching import running_order, waiting_order
from scheduler.instance.prefixes import RequestPrefixes
from scheduler.kv.manager import KVManager
from scheduler.request import Request, RequestState, Transition
from scheduler.types import FinishReason, RequestId


class Queues:
    """The requests that are alive on one instance."""

    def __init__(self, kv: KVManager, prefixes: RequestPrefixes) -> None:
        self.requests: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []  # in waiting_order
        self.running: list[Request] = []  # in running_order
        self.leaves: list[RequestId] = []  # gone since the last plan, still in the executor's set
        # Planned steps that have not completed; of each, the requests whose chunk samples nothing
        # and how many of their tokens are computed after it.
        self.in_flight: dict[int, list[tuple[Request, int]]] = {}
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self._num_admissions = 0
        self._kv = kv
        self._prefixes = prefixes

    def enter(self, request: Request) -> None:
        """A new request waits."""
        self.requests[request.request_id] = request
        self._enqueue(request)

    def admit(self, request: Request) -> None:
        """A waiting request runs from now on; blocks are the planner's business."""
        self.waiting.remove(request)
        self.num_waiting_tokens -= request.num_tokens
        request.move(Transition.ADMIT)
        request.admission = self._num_admissions
        self._num_admissions += 1
        insort(self.running, request, key=running_order)

    def rest(self, request: Request) -> None:
        """Take a running request out of the executor's set; it keeps its blocks."""
        if request.in_batch:
            request.in_batch = False
            self.leaves.append(request.request_id)

    def preempt(self, request: Request) -> None:
        """Drop what a running request has computed; it keeps its tokens and waits."""
        request.move(Transition.PREEMPT)
        self._stop(request)
        # What steps in flight sample for it is dropped; it will be drawn again, and be the same.
        request.ignore_through_step = request.last_step_id
        request.num_scheduled = request.num_slots = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, in whatever state."""
        if request.state is RequestState.RUNNING:
            self._stop(request)
        else:
            self.waiting.remove(request)
            self.num_waiting_tokens -= request.num_tokens
        request.move(Transition.FINISH)
        request.finish_reason = reason
        del self.requests[request.request_id]

    def _enqueue(self, request: Request) -> None:
        insort(self.waiting, request, key=waiting_order)
        self.num_waiting_tokens += request.num_tokens

    def _stop(self, request: Request) -> None:
        """A running request computes no more; it lets go of what it has."""
        del self.running[bisect_left(self.running, running_order(request), key=running_order)]
        self.rest(request)
        self._prefixes.end(request)
        if request.last_step_id in self.in_flight:
            self._kv.retire(request.request_id, request.last_step_id)
        else:
            self._kv.release(request.request_id)
