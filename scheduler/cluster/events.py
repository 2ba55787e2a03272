"""What happens to the fleet, and what it decides to do: two unions of frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.load import InstanceView
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec


@dataclass(frozen=True, slots=True)
class Arrived:
    """A client asks for a generation."""

    spec: RequestSpec


@dataclass(frozen=True, slots=True)
class Ended:
    """An instance reported the end of a request, of whatever kind."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A request is to end early.

    Its client gave up; or, with `num_output_tokens`, its text was found complete after so many
    output tokens.
    """

    request_id: RequestId
    num_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """An instance can serve `max_requests` requests at a time, running and queued."""

    instance_id: InstanceId
    max_requests: int


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """An instance died or was taken out; what it ran is lost there."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Reported:
    """An instance told its load."""

    instance_id: InstanceId
    view: InstanceView


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """No new requests from now on; those accepted run to their end."""


ClusterEvent = Arrived | Ended | Cancelled | InstanceUp | InstanceDown | Reported | DrainStarted


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the request to the instance."""

    spec: RequestSpec
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Reject:
    request_id: RequestId
    reason: RejectReason


@dataclass(frozen=True, slots=True)
class Abort:
    """Tell the instance to drop the request; `num_output_tokens` as in `Cancelled`."""

    request_id: RequestId
    instance_id: InstanceId
    num_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Fail:
    """End the request with an error: it was lost and cannot be run elsewhere."""

    request_id: RequestId


ClusterAction = Dispatch | Reject | Abort | Fail
