"""Which instance gets a request: pure functions in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from scheduler.types import InstanceId

# Given the number of unfinished requests of each instance that is up (never empty), choose one.
DispatchPolicy = Callable[[Mapping[InstanceId, int]], InstanceId]


def least_requests(num_assigned: Mapping[InstanceId, int]) -> InstanceId:
    """The instance with the fewest unfinished requests; ties go to the lowest id."""
    return min(num_assigned, key=lambda instance_id: (num_assigned[instance_id], instance_id))


DISPATCH_POLICIES: dict[str, DispatchPolicy] = {"least_requests": least_requests}
