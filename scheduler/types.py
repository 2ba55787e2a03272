"""The vocabulary that every part of Hocket shares: plain frozen data, no behaviour.

Everything here may cross a thread or a process; nothing here is ever mutated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a request ended. Each accepted request ends with exactly one."""

    STOP = "stop"  # an end-of-sequence or stop token was produced
    LENGTH = "length"  # max_tokens were produced
    ABORT = "abort"  # the client gave up
    ERROR = "error"  # the instance could not go on


class RejectReason(StrEnum):
    """Why a request was refused before it began."""

    NEVER_FITS = "never_fits"  # prompt + max_tokens exceed the window or the whole KV pool
    QUEUE_FULL = "queue_full"  # the waiting queue is at its bound
    DUPLICATE_ID = "duplicate_id"  # a live request has this id
    NO_INSTANCE = "no_instance"  # no instance is up, or the server drains


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, in the order they apply: temperature, top_k, top_p, min_p.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. The drawn
    token depends only on (seed, choice, position) and the logits, so it is the same wherever and
    with whomever the request runs. `stop_token_ids` end the request and include the model's own
    end-of-sequence tokens unless the client asked to ignore them.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One generation to make: n > 1 choices are n requests that differ in `params.choice`."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    tenant: str = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """The KV memory of an instance: measured at start, a fact and not a setting."""

    block_size: int  # slots (tokens) per block
    num_blocks: int
    block_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that fit when every slot is used."""
        return self.num_blocks * self.block_size


class TokenEvent(NamedTuple):
    """A request produced one token; `output_index` counts its output tokens from 0."""

    request_id: RequestId
    output_index: int
    token_id: int


class FinishedEvent(NamedTuple):
    """A request ended; nothing follows for it."""

    request_id: RequestId
    reason: FinishReason
    num_preemptions: int = 0
    queue_s: float = 0.0  # from arrival at the instance to its first step


class RejectedEvent(NamedTuple):
    """A request was refused and never ran."""

    request_id: RequestId
    reason: RejectReason


RequestEvent = TokenEvent | FinishedEvent | RejectedEvent
