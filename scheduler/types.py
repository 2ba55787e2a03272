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
    ERROR = "error"  # this request, or its instance, could not go on


class RejectReason(StrEnum):
    """Why a request was refused before it began."""

    NEVER_FITS = "never_fits"  # prompt + max_tokens exceed the window or the whole KV pool
    QUEUE_FULL = "queue_full"  # the waiting queue is at its bound
    DUPLICATE_ID = "duplicate_id"  # a live request has this id
    NO_INSTANCE = "no_instance"  # no instance is up, or the server drains
    QUARANTINED = "quarantined"  # instances died of the same request a moment ago


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens.

    In this order: `allowed_token_ids` (empty: all), `bad_token_ids` (sequences that must not be
    completed), `min_tokens` (before it no stop token), `logit_bias` ((token id, bias) pairs), the
    penalties (repetition over prompt and output, frequency and presence over the output), then
    `temperature` (0 is greedy), `min_p`, `top_k`, `top_p` (0, 0 and 1 switch the filter off).

    The drawn token depends only on (seed, choice, position) and the logits, so it is the same
    wherever and with whomever the request runs. `stop_token_ids` end the request and include the
    model's own end-of-sequence tokens unless the client asked to ignore them.

    `logprobs` asks for the log-probability of each output token and of so many of the likeliest,
    `prompt_logprobs` for the same of each prompt token but the first; both are of the model's own
    distribution, before any of the above.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One generation to make: n > 1 choices are n requests that differ in `params.choice`.

    Requests share computed prefixes only with those of the same `tenant` and `cache_salt`.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    tenant: str = "default"
    cache_salt: str = ""
    priority: int = 0  # smaller is earlier; used by the policy "priority" alone


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


class Logprobs(NamedTuple):
    """Of one position, natural logarithms: the token that is there, and the likeliest ones."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


class PromptLogprobs(NamedTuple):
    """Of prompt tokens `start`, `start` + 1, ...; the first token of a prompt has none."""

    request_id: RequestId
    start: int
    positions: tuple[Logprobs, ...]


class StartedEvent(NamedTuple):
    """A request's first step is complete; comes once, before its first token."""

    request_id: RequestId
    queue_s: float  # from arrival at the instance to its first step
    num_cached_tokens: int  # of the prompt, found computed already


class TokenEvent(NamedTuple):
    """A request produced one token; `output_index` counts its output tokens from 0."""

    request_id: RequestId
    output_index: int
    token_id: int
    logprobs: Logprobs | None = None


class FinishedEvent(NamedTuple):
    """A request ended; nothing follows for it."""

    request_id: RequestId
    reason: FinishReason
    num_preemptions: int = 0
    error: str = ""  # what went wrong, for FinishReason.ERROR; it quotes no request
    detail: str = ""  # more of it, which may


class RejectedEvent(NamedTuple):
    """A request was refused and never ran."""

    request_id: RequestId
    reason: RejectReason


RequestEvent = StartedEvent | PromptLogprobs | TokenEvent | FinishedEvent | RejectedEvent
