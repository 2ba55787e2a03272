"""What a client is told when its request is refused, or cannot go on."""

from __future__ import annotations

from typing import NamedTuple, assert_never

from scheduler.cluster.events import FailReason
from scheduler.types import RejectReason
from serving.errors import InstanceLost, InvalidRequest, Quarantined, RequestError, Unavailable


class Waits(NamedTuple):
    """When to try again, seconds."""

    queue_s: float  # the queue will have drained
    instance_s: float  # an instance should be up


def error_of(reason: RejectReason, waits: Waits, *, draining: bool) -> RequestError:
    match reason:
        case RejectReason.NEVER_FITS:
            return InvalidRequest("prompt and max_tokens can never fit into the KV memory")
        case RejectReason.QUEUE_FULL:
            return Unavailable(
                "the server is full; try again shortly",
                code="queue_full",
                retry_after_s=waits.queue_s,
            )
        case RejectReason.NO_INSTANCE if draining:
            return Unavailable(
                "the server is shutting down", code="draining", retry_after_s=waits.queue_s
            )
        case RejectReason.NO_INSTANCE:
            return Unavailable(
                "no instance is up", code="no_instance", retry_after_s=waits.instance_s
            )
        case RejectReason.DUPLICATE_ID:
            return InvalidRequest("a request with this id is running", param="request_id")
        case RejectReason.QUARANTINED:
            return Quarantined()
        case _:
            assert_never(reason)


def failure_of(reason: FailReason, waits: Waits, *, had_instance: bool) -> RequestError:
    """`had_instance`: it was begun, and is not merely to be asked again."""
    match reason:
        case FailReason.NO_INSTANCE if not had_instance:
            return error_of(RejectReason.NO_INSTANCE, waits, draining=False)
        case FailReason.NO_INSTANCE:
            return InstanceLost("the instance that ran this failed, and no other was up in time")
        case FailReason.TOO_MANY_LOSSES:
            return InstanceLost("one instance after another that ran this failed")
        case FailReason.QUARANTINED:
            return Quarantined()
        case _:
            assert_never(reason)
