"""Decides which instance runs which request. The only writer of assignments.

`handle(event, now)` returns actions; a driver performs them. An instance is a name here.
"""

from __future__ import annotations

from typing import Any, assert_never

from scheduler.cluster.dispatch import DISPATCH_POLICIES
from scheduler.cluster.events import (
    Abort,
    Arrived,
    Cancelled,
    ClusterAction,
    ClusterEvent,
    Dispatch,
    DrainStarted,
    Ended,
    Fail,
    InstanceDown,
    InstanceUp,
    Reject,
    Reported,
)
from scheduler.load import InstanceView
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec


class ClusterScheduler:
    """Each accepted request is assigned to exactly one instance until it ends."""

    def __init__(self, dispatch: str = "least_requests") -> None:
        self._dispatch = DISPATCH_POLICIES[dispatch]
        self._assigned: dict[RequestId, InstanceId] = {}
        self._num_assigned: dict[InstanceId, int] = {}
        self._max_requests: dict[InstanceId, int] = {}
        self._views: dict[InstanceId, InstanceView] = {}
        self._draining = False

    @property
    def accepts(self) -> bool:
        """Whether requests are taken at all: an instance is up, and the fleet does not drain."""
        return bool(self._num_assigned) and not self._draining

    @property
    def num_instances(self) -> int:
        return len(self._num_assigned)

    def is_up(self, instance_id: InstanceId) -> bool:
        return instance_id in self._num_assigned

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterAction]:  # noqa: ARG002
        """Return what to do about the event."""
        match event:
            case Arrived(spec):
                return [self._arrive(spec)]
            case Ended(request_id):
                self._unassign(request_id)
            case Cancelled():
                return self._cancel(event)
            case InstanceUp(instance_id, max_requests):
                self._num_assigned[instance_id] = 0
                self._max_requests[instance_id] = max_requests
            case InstanceDown(instance_id):
                return self._lose(instance_id)
            case Reported(instance_id, view):
                self._views[instance_id] = view
            case DrainStarted():
                self._draining = True
            case _:
                assert_never(event)
        return []

    def views(self) -> dict[InstanceId, InstanceView]:
        """Return the last report of each instance."""
        return dict(self._views)

    def state(self) -> dict[str, Any]:
        """Return what is decided so far as plain data for people, of no fixed form."""
        return {
            "draining": self._draining,
            "instances": {
                instance_id: {
                    "num_assigned": count,
                    "max_requests": self._max_requests[instance_id],
                }
                for instance_id, count in self._num_assigned.items()
            },
            "assigned": dict(self._assigned),
        }

    def _cancel(self, event: Cancelled) -> list[ClusterAction]:
        # The request stays assigned until the instance says that it ended.
        instance_id = self._assigned.get(event.request_id)
        if instance_id is None:
            return []
        return [Abort(event.request_id, instance_id, event.num_output_tokens)]

    def _arrive(self, spec: RequestSpec) -> ClusterAction:
        if not self.accepts:
            return Reject(spec.request_id, RejectReason.NO_INSTANCE)
        if spec.request_id in self._assigned:
            return Reject(spec.request_id, RejectReason.DUPLICATE_ID)
        open_instances = {
            key: count
            for key, count in self._num_assigned.items()
            if count < self._max_requests[key]
        }
        if not open_instances:
            return Reject(spec.request_id, RejectReason.QUEUE_FULL)
        instance_id = self._dispatch(open_instances)
        self._assigned[spec.request_id] = instance_id
        self._num_assigned[instance_id] += 1
        return Dispatch(spec, instance_id)

    def _unassign(self, request_id: RequestId) -> None:
        instance_id = self._assigned.pop(request_id, None)
        if instance_id in self._num_assigned:
            self._num_assigned[instance_id] -= 1

    def _lose(self, instance_id: InstanceId) -> list[ClusterAction]:
        self._num_assigned.pop(instance_id, None)
        self._max_requests.pop(instance_id, None)
        self._views.pop(instance_id, None)
        lost = [key for key, value in self._assigned.items() if value == instance_id]
        for request_id in lost:
            del self._assigned[request_id]
        return [Fail(request_id) for request_id in lost]
