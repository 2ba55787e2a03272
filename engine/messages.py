"""What an instance and its driver say to each other: frozen msgspec structs, no behaviour.

The same values travel in process and over a socket. All that one step caused is one message.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.config import EngineConfig
from scheduler.load import InstanceView
from scheduler.types import (
    FinishedEvent,
    KVGeometry,
    PromptLogprobs,
    RejectedEvent,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Submit(_Message, frozen=True):
    """Run this request; one that was begun elsewhere goes on behind the output tokens given."""

    spec: RequestSpec
    output_token_ids: tuple[int, ...] = ()


class Abort(_Message, frozen=True):
    """Drop this request; it ends with a FinishedEvent unless it has ended already.

    With `num_output_tokens`, what it computed beyond so many output tokens was for nobody (a stop
    string was found in the text) and is not kept as a prefix for others.
    """

    request_id: RequestId
    num_output_tokens: int | None = None


class Inspect(_Message, frozen=True):
    """Report the state of the scheduler, as `Inspected` with the same number."""

    number: int


class Ping(_Message, frozen=True):
    """Say `Pong`: who owes nothing shows by it alone that it is there."""


class Stop(_Message, frozen=True):
    """End the loop now; requests that still run are not reported."""


Command = Submit | Abort | Inspect | Ping | Stop


class StepEvents(_Message, frozen=True):
    """All that happened in one turn of the loop, in the order in which it is to be handled."""

    started: list[StartedEvent]
    prompt_logprobs: list[PromptLogprobs]
    tokens: list[TokenEvent]
    finished: list[FinishedEvent]
    rejected: list[RejectedEvent]
    view: InstanceView
    step_s: float  # the executor's time for the step; 0 when none was completed
    plans_s: list[float] = []  # the scheduler's time for each step that was planned


class Ready(_Message, frozen=True):
    """The instance can serve."""

    model_name: str
    dtype: str
    device: str
    max_model_len: int
    geometry: KVGeometry
    startup_s: dict[str, float] = {}  # by phase
    max_num_running: int = 64
    max_num_waiting_tokens: int = 1024  # that keep it busy beside what runs
    kernels: str = ""  # what computes: a level of instructions, or torch and why


class Inspected(_Message, frozen=True):
    """What the scheduler holds: plain data for people, of no fixed form. No token of a request."""

    number: int
    state: dict[str, Any]


class Pong(_Message, frozen=True):
    """The loop goes round."""


class Failed(_Message, frozen=True):
    """The instance ended for a reason it cannot mend; all its requests are lost."""

    cause: str  # one line, that quotes no request
    trace: str = ""  # all that is known, for the log at debug: it may quote one


Report = StepEvents | Inspected | Pong | Ready | Failed


# --- how an instance in a process of its own begins; nothing of this comes after Ready ---


class Begin(_Message, frozen=True):
    """The first message to the process: be this instance."""

    config: EngineConfig


class PhaseBegun(_Message, frozen=True):
    """A phase of the start; it ends the one before. `total` is in bytes or items, if known."""

    title: str
    total: int | None


class PhaseAdvanced(_Message, frozen=True):
    """`done` of the phase's total are done by now."""

    done: int


class CannotStart(_Message, frozen=True):
    """The user can mend this, the instance cannot; `cause` and `remedy` are a line each."""

    cause: str
    remedy: str


StartReport = PhaseBegun | PhaseAdvanced | CannotStart
