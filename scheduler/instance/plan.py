"""The contract between scheduler and executor: a step plan goes in, a step result comes out.

A plan is a *delta* over the set of requests that compute. The executor keeps that set in persistent
arrays; a plan names only what changes in it: leaves first, then joins, appends and chunks. A
request that is in the set and has no chunk computes exactly one token, so a step in which 200
requests merely decode is an empty plan. Before anything is computed, blocks are cleared, then
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.kv.blocks import BlockGroup
from scheduler.types import Logprobs, PromptLogprobs, RequestId, SamplingParams


class Join(NamedTuple):
    """A request enters the set with all that an executor must know of it.

    `token_ids` are all known tokens: the prompt, and after a preemption the output so far too.
    The blocks of `groups` hold `num_computed_tokens` of them already.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    groups: tuple[BlockGroup, ...]
    params: SamplingParams


class Append(NamedTuple):
    """Blocks behind the last block of a request."""

    request_id: RequestId
    groups: tuple[BlockGroup, ...]


class BlockCopy(NamedTuple):
    """The first tokens of block `source` go to `target`: copy-on-write of what others hold.

    Not the whole block: behind those tokens its owner may be writing, and may be failing.
    """

    source: int
    target: int
    num_tokens: int


class Chunk(NamedTuple):
    """A request computes more than one token in this step."""

    request_id: RequestId
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. A request samples a token when its chunk reaches its last known token."""

    step_id: int
    leaves: tuple[RequestId, ...] = ()
    clears: tuple[BlockGroup, ...] = ()  # set to zero: a failed request wrote there
    copies: tuple[BlockCopy, ...] = ()
    joins: tuple[Join, ...] = ()
    appends: tuple[Append, ...] = ()
    chunks: tuple[Chunk, ...] = ()


class SampledToken(NamedTuple):
    request_id: RequestId
    token_id: int
    logprobs: Logprobs | None = None


class Failure(NamedTuple):
    """A request whose computation failed; the rest of the step did not."""

    request_id: RequestId
    cause: str  # one line, that quotes no request
    detail: str = ""  # for the log at debug: it may quote one


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced; `duration_s` is the executor's own time for it."""

    step_id: int
    sampled: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    failures: tuple[Failure, ...] = ()
    duration_s: float = 0.0
