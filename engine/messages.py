"""What an instance and its driver say to each other: frozen msgspec structs, no behaviour.

The same values travel in process and over a socket. All that one step caused is one message.
"""

from __future__ import annotations

import msgspec

from scheduler.load import InstanceView
from scheduler.types import (
    FinishedEvent,
    KVGeometry,
    RejectedEvent,
    RequestId,
    RequestSpec,
    TokenEvent,
)


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Submit(_Message, frozen=True):
    """Run this request."""

    spec: RequestSpec


class Abort(_Message, frozen=True):
    """Drop this request; it ends with a FinishedEvent unless it has ended already."""

    request_id: RequestId


class Stop(_Message, frozen=True):
    """End the loop now; requests that still run are not reported."""


Command = Submit | Abort | Stop


class StepEvents(_Message, frozen=True):
    """All that happened in one turn of the loop. Tokens come before the ends they lead to."""

    tokens: list[TokenEvent]
    finished: list[FinishedEvent]
    rejected: list[RejectedEvent]
    view: InstanceView
    step_s: float  # the executor's time for the step; 0 when none was completed


class Ready(_Message, frozen=True):
    """The instance can serve."""

    model_name: str
    dtype: str
    device: str
    max_model_len: int
    geometry: KVGeometry


class Failed(_Message, frozen=True):
    """The instance ended for a reason it cannot mend; all its requests are lost."""

    cause: str


Report = StepEvents | Ready | Failed
