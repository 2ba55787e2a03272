"""A request on one instance, and the one table of its states.

Only `InstanceScheduler` writes here. There is no prefill phase and no decode phase: computed
tokens chase known tokens, and the difference is what a step may schedule.
"""

from __future__ import annotations

from enum import StrEnum

from scheduler.types import FinishReason, RequestId, RequestSpec


class RequestState(StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks and computes in every step
    FINISHED = "finished"


class Transition(StrEnum):
    ADMIT = "admit"
    PREEMPT = "preempt"
    FINISH = "finish"


# Every legal change of state. What is not here is a broken invariant.
TRANSITIONS: dict[tuple[RequestState, Transition], RequestState] = {
    (RequestState.WAITING, Transition.ADMIT): RequestState.RUNNING,
    (RequestState.WAITING, Transition.FINISH): RequestState.FINISHED,
    (RequestState.RUNNING, Transition.PREEMPT): RequestState.WAITING,
    (RequestState.RUNNING, Transition.FINISH): RequestState.FINISHED,
}


class InvariantError(RuntimeError):
    """The core contradicts itself: the instance must end loudly, its requests go elsewhere."""


class Request:
    """One generation in progress.

    `num_scheduled` counts the tokens whose keys and values are computed or on their way in a
    planned step. Once it has passed the known tokens, the difference is what planned steps will
    sample and have not reported yet.

    A running request is in the executor's set (`in_batch`) unless it rests: its last token is on
    its way, or it waits for blocks that a step in flight still holds.
    """

    __slots__ = (
        "admission",
        "arrival_s",
        "block_keys",
        "born_step_id",
        "finish_reason",
        "ignore_through_step",
        "in_batch",
        "is_announced",
        "last_step_id",
        "max_num_tokens",
        "num_cached_tokens",
        "num_preemptions",
        "num_published_blocks",
        "num_scheduled",
        "num_scored_tokens",
        "num_slots",
        "num_tokens",
        "ordinal",
        "output_token_ids",
        "queue_s",
        "rank",
        "spec",
        "state",
        "tail_key",
        "waits_for",
    )

    def __init__(self, spec: RequestSpec, ordinal: int, arrival_s: float) -> None:
        self.spec = spec
        self.ordinal = ordinal  # counts arrivals at this instance
        self.arrival_s = arrival_s
        self.state = RequestState.WAITING
        self.output_token_ids: list[int] = []
        # Known tokens: the prompt and what was produced so far.
        self.num_tokens = len(spec.prompt_token_ids)
        # Tokens that it can have computed in the end: the last one is sampled only.
        self.max_num_tokens = len(spec.prompt_token_ids) + spec.params.max_tokens - 1
        self.num_slots = 0  # tokens that its blocks have room for, of those that it can compute
        self.rank = 0  # strictly before every larger one; given by the policy
        self.admission = -1  # counts admissions at this instance
        self.block_keys: list[bytes] = []  # of its full blocks, as far as they were asked for
        self.tail_key: bytes | None = None  # of the prompt's tokens behind its last full block
        self.waits_for: bytes | None = None  # a running request computes this prefix of it
        self.num_published_blocks = 0
        self.num_cached_tokens = 0  # of the prompt, when it was first admitted
        self.num_scored_tokens = 0  # of the prompt, whose logprobs were reported
        self.num_scheduled = 0
        self.num_preemptions = 0
        self.born_step_id = 0  # no earlier step knows it; another may have had its id
        self.last_step_id = -1  # the last planned step that computes some of it
        self.ignore_through_step = -1  # what steps up to this one report is of a past life
        self.in_batch = False
        self.is_announced = False  # its first step is complete, and was reported
        self.queue_s: float | None = None  # from arrival to the first step; None until then
        self.finish_reason: FinishReason | None = None

    @property
    def request_id(self) -> RequestId:
        return self.spec.request_id

    @property
    def num_pending(self) -> int:
        """Tokens that planned steps will sample but have not reported yet."""
        return max(0, self.num_scheduled + 1 - self.num_tokens)

    @property
    def num_to_compute(self) -> int:
        """Tokens that a next step could compute, those to be sampled by planned steps included."""
        return max(1, self.num_tokens - self.num_scheduled)

    def append(self, token_id: int) -> None:
        """A token that was sampled is known now."""
        self.output_token_ids.append(token_id)
        self.num_tokens += 1

    def tokens_between(self, start: int, end: int) -> tuple[int, ...]:
        """Return the known tokens [start, end)."""
        prompt = self.spec.prompt_token_ids
        behind = self.output_token_ids[max(0, start - len(prompt)) : max(0, end - len(prompt))]
        return (*prompt[start:end], *behind)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.spec.prompt_token_ids, *self.output_token_ids)

    def move(self, transition: Transition) -> None:
        """Change state by the table. Raises InvariantError for a change that is not in it."""
        target = TRANSITIONS.get((self.state, transition))
        if target is None:
            raise InvariantError(
                f"request {self.request_id}: cannot {transition} while {self.state}"
            )
        self.state = target
