"""What happens to the fleet, and what it decides to do: two unions of frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.load import InstanceView
from scheduler.types import InstanceId, RejectReason, RequestId, RequestSpec

# Tokens on one instance of which the scheduler is told, after the first; see `suspicion`.
PROGRESS_MARKS = frozenset((2, 4, 8, 16, 32, 64))


@dataclass(frozen=True, slots=True)
class Arrived:
    """A client asks for a generation."""

    spec: RequestSpec


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token since the request was dispatched came, so its known tokens are computed."""

    request_id: RequestId
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Progressed:
    """So many tokens, one of `PROGRESS_MARKS`, came since the request was dispatched."""

    request_id: RequestId
    instance_id: InstanceId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """An instance reported the end of a request, of whatever kind."""

    request_id: RequestId
    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A request is to end early.

    Its client gave up; or, with `num_output_tokens`, its text was found complete after so many
    output tokens.
    """

    request_id: RequestId
    num_output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceCapacity:
    """What an instance takes: facts and limits, known when it is up."""

    max_num_running: int
    max_num_waiting_tokens: int  # that it shall have to compute beside what runs
    max_model_len: int
    num_blocks: int
    block_size: int

    @property
    def max_num_tokens(self) -> int:
        """That a request may have there, prompt and answer."""
        # The last token is sampled and never computed, so it needs no slot.
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and answer, can ever run there."""
        return num_tokens <= self.max_num_tokens

    def num_blocks_of(self, num_tokens: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class InstanceUp:
    """An instance takes requests from now on, unless it drains; nothing is assigned to it."""

    instance_id: InstanceId
    capacity: InstanceCapacity
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class InstanceDown:
    """An instance died, or was taken out; what it ran is lost there."""

    instance_id: InstanceId
    was_ours: bool = False  # its end was asked for: nobody who was there is to blame


@dataclass(frozen=True, slots=True)
class InstanceDraining:
    """An instance gets no new requests from now on."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class MoveAway:
    """What an instance still runs shall go on elsewhere."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Reported:
    """An instance told its load."""

    instance_id: InstanceId
    view: InstanceView


@dataclass(frozen=True, slots=True)
class Elapsed:
    """Time has passed; comes now and then while requests are queued."""


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """No new requests from now on; those accepted run to their end."""


ClusterEvent = (
    Arrived
    | FirstToken
    | Progressed
    | Ended
    | Cancelled
    | InstanceUp
    | InstanceDown
    | InstanceDraining
    | MoveAway
    | Reported
    | Elapsed
    | DrainStarted
)


class FailReason(StrEnum):
    """Why a request that had been accepted cannot go on."""

    NO_INSTANCE = "no_instance"  # the one that ran it was lost, and for too long no other came
    QUARANTINED = "quarantined"  # instances died of it
    TOO_MANY_LOSSES = "too_many_losses"  # it was lost with one instance after another


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand the request to the instance, with the tokens that its client has been given so far."""

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
    """End the request with an error."""

    request_id: RequestId
    reason: FailReason


ClusterAction = Dispatch | Reject | Abort | Fail
