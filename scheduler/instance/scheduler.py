"""Decides what one instance computes next. The only writer of its requests.

Called as `add` / `abort` / `plan_step` / `complete_step`, with `now` from the caller; it answers
with values and never waits. The invariants that the property tests name:

I1  running requests hold blocks for every token they have scheduled; all others hold none.
I2  every request that was added ends with exactly one FinishedEvent or RejectedEvent.
I3  the tokens of a step never exceed the token budget.
I4  a block is released only when no planned step that touches it is outstanding.

Steps may be planned ahead of results: `plan_step` may be called with steps in flight. A request
that is found to have ended while a later step computes it has one surplus token there, which is
dropped: it is neither shown nor counted.
"""

from __future__ import annotations

from bisect import insort

from scheduler.config import InstanceConfig
from scheduler.instance.batching import admission_policy
from scheduler.instance.plan import Append, Chunk, Join, StepPlan, StepResult
from scheduler.instance.preemption import newest
from scheduler.kv.blocks import BlockGroup
from scheduler.kv.manager import KVManager
from scheduler.load import InstanceView
from scheduler.request import InvariantError, Request, RequestState, Transition
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    KVGeometry,
    RejectedEvent,
    RejectReason,
    RequestEvent,
    RequestId,
    RequestSpec,
    TokenEvent,
)


class _Draft:
    """The plan that is being made: its lists and what is left of the token budget."""

    __slots__ = ("appends", "chunks", "joins", "num_tokens_left")

    def __init__(self, num_tokens_left: int) -> None:
        self.num_tokens_left = num_tokens_left
        self.joins: list[Join] = []
        self.appends: list[Append] = []
        self.chunks: list[Chunk] = []


class InstanceScheduler:
    """Chunks under a token budget, in order of admission; preempts by recomputation."""

    def __init__(self, config: InstanceConfig, geometry: KVGeometry) -> None:
        self.config = config
        self._kv = KVManager(geometry)
        self._key = admission_policy(config.policy)
        self._requests: dict[RequestId, Request] = {}
        self._waiting: list[Request] = []  # sorted by the policy's key
        self._running: list[Request] = []  # in order of admission
        self._leaves: list[RequestId] = []  # gone since the last plan, still in the executor's set
        self._in_flight: set[int] = set()  # ids of planned steps that have not completed
        self._num_arrivals = 0
        self._num_waiting_tokens = 0
        self._next_step_id = 0
        self._num_steps = 0
        self._num_computed_tokens = 0
        self._num_preemptions = 0

    # --- requests come and go ---

    def add(self, spec: RequestSpec, now: float) -> RejectedEvent | None:
        """Queue a request, or say at once why it cannot be served."""
        reason = self._refusal(spec)
        if reason is not None:
            return RejectedEvent(spec.request_id, reason)
        request = Request(spec, self._num_arrivals, now)
        request.ignore_through_step = self._next_step_id - 1  # another may have had this id
        self._num_arrivals += 1
        self._requests[spec.request_id] = request
        self._enqueue(request)
        return None

    def abort(self, request_id: RequestId) -> FinishedEvent | None:
        """End a request now, in whatever state. None if it is not here (any more)."""
        request = self._requests.get(request_id)
        return None if request is None else self._finish(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether a request is alive here; when false, `plan_step` returns None."""
        return bool(self._requests)

    # --- the step ---

    def plan_step(self, now: float) -> StepPlan | None:
        """Return the next step, or None when there is nothing to compute before a result comes."""
        draft = _Draft(self.config.max_num_batched_tokens)
        preempted = self._plan_running(draft)
        if not preempted:
            self._plan_waiting(draft, now)
        if draft.num_tokens_left == self.config.max_num_batched_tokens:
            return None
        plan = StepPlan(
            step_id=self._next_step_id,
            leaves=tuple(self._leaves),
            joins=tuple(draft.joins),
            appends=tuple(draft.appends),
            chunks=tuple(draft.chunks),
        )
        self._leaves.clear()
        self._in_flight.add(plan.step_id)
        self._next_step_id += 1
        self._num_computed_tokens += self.config.max_num_batched_tokens - draft.num_tokens_left
        return plan

    def complete_step(self, result: StepResult) -> list[RequestEvent]:
        """Take a step's tokens and return what became of its requests."""
        if result.step_id not in self._in_flight:
            raise InvariantError(f"step {result.step_id} is not in flight")
        self._in_flight.remove(result.step_id)
        self._num_steps += 1
        events: list[RequestEvent] = []
        for request_id, token_id in result.sampled:
            request = self._requests.get(request_id)
            # Else it ended, or was preempted, while the step ran.
            if request is not None and result.step_id > request.ignore_through_step:
                self._take_token(request, token_id, events)
        self._kv.step_completed(result.step_id)
        return events

    @property
    def kv(self) -> KVManager:
        """The block tables, to be read by dumps and tests."""
        return self._kv

    def view(self) -> InstanceView:
        """Return the load as a frozen snapshot."""
        return InstanceView(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_tokens=self._num_waiting_tokens,
            num_blocks=self._kv.geometry.num_blocks,
            num_free_blocks=self._kv.num_free_blocks,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_preemptions=self._num_preemptions,
        )

    # --- how ---

    def _refusal(self, spec: RequestSpec) -> RejectReason | None:
        if spec.request_id in self._requests:
            return RejectReason.DUPLICATE_ID
        num_tokens = len(spec.prompt_token_ids) + spec.params.max_tokens
        # The last token is sampled and never computed, so it needs no slot.
        num_blocks = self._kv.blocks_for(num_tokens - 1)
        if (
            not spec.prompt_token_ids
            or spec.params.max_tokens < 1
            or num_tokens > self.config.max_model_len
            or num_blocks > self._kv.geometry.num_blocks
        ):
            return RejectReason.NEVER_FITS
        if len(self._requests) >= self.config.max_num_running + self.config.max_num_waiting:
            return RejectReason.QUEUE_FULL
        return None

    def _plan_running(self, draft: _Draft) -> bool:
        """Schedule the running requests, oldest first. True if any had to be preempted."""
        preempted = False
        index = 0
        while index < len(self._running):
            request = self._running[index]
            num_tokens = min(request.num_to_compute, draft.num_tokens_left)
            if self._last_token_is_pending(request):
                self._rest(request)
                index += 1
                continue
            groups = self._kv.cover(request.request_id, request.num_scheduled + num_tokens)
            if groups is not None:
                self._join_or_append(request, groups, draft)
                self._schedule(request, num_tokens, draft)
                index += 1
            elif self._blocks_are_coming(request, num_tokens):
                self._rest(request)
                preempted = True  # a newcomer must not take what is coming
                index += 1
            else:
                self._preempt(newest(self._running))
                preempted = True  # and the same request again, unless it was the victim itself
        return preempted

    def _last_token_is_pending(self, request: Request) -> bool:
        """Whether the steps in flight produce all tokens that it may have."""
        num_output_tokens = len(request.output_token_ids) + request.num_pending
        return num_output_tokens >= request.spec.params.max_tokens

    def _blocks_are_coming(self, request: Request, num_tokens: int) -> bool:
        """Whether what retired requests still hold suffices, so that no more need to give way."""
        missing = self._kv.missing_blocks(request.request_id, request.num_scheduled + num_tokens)
        return missing <= self._kv.num_free_blocks + self._kv.num_retired_blocks

    def _join_or_append(
        self, request: Request, groups: tuple[BlockGroup, ...], draft: _Draft
    ) -> None:
        if not request.in_batch:
            if request.num_pending:
                raise InvariantError(f"{request.request_id} is to join before its tokens are known")
            self._join(request, draft)
        elif groups:
            draft.appends.append(Append(request.request_id, groups))

    def _join(self, request: Request, draft: _Draft) -> None:
        request.in_batch = True
        draft.joins.append(
            Join(
                request.request_id,
                request.token_ids,
                request.num_scheduled,
                self._kv.groups(request.request_id),
                request.spec.params,
            )
        )

    def _rest(self, request: Request) -> None:
        """Take a running request out of the executor's set; it keeps its blocks."""
        if request.in_batch:
            request.in_batch = False
            self._leaves.append(request.request_id)

    def _plan_waiting(self, draft: _Draft, now: float) -> None:
        """Admit waiting requests while tokens, places and blocks last."""
        while self._waiting and draft.num_tokens_left and self._has_place():
            request = self._waiting[0]
            if not self._admissible(request):
                return
            if self._kv.cover(request.request_id, request.num_tokens) is None:
                raise InvariantError(f"no blocks for {request.request_id}, which was admissible")
            del self._waiting[0]
            self._num_waiting_tokens -= request.num_tokens
            request.move(Transition.ADMIT)
            self._running.append(request)
            if request.queue_s is None:
                request.queue_s = now - request.arrival_s
            self._join(request, draft)
            self._schedule(request, min(request.num_tokens, draft.num_tokens_left), draft)

    def _has_place(self) -> bool:
        return len(self._running) < self.config.max_num_running

    def _admissible(self, request: Request) -> bool:
        """Whether all known tokens fit now, with room for those who run to go on growing.

        The watermark is a block for every running request: without it a newcomer takes the last
        blocks and is thrown out again within `block_size` steps.
        """
        num_blocks = self._kv.blocks_for(request.num_tokens) + len(self._running)
        return num_blocks <= self._kv.num_free_blocks

    def _schedule(self, request: Request, num_tokens: int, draft: _Draft) -> None:
        if num_tokens < 1:
            raise InvariantError(f"running request {request.request_id} has nothing to compute")
        if num_tokens > 1:
            draft.chunks.append(Chunk(request.request_id, num_tokens))
        if num_tokens == request.num_to_compute:
            request.num_pending += 1
        request.num_scheduled += num_tokens
        request.last_step_id = self._next_step_id
        draft.num_tokens_left -= num_tokens

    def _preempt(self, request: Request) -> None:
        """Drop what a running request has computed; it keeps its tokens and its place in line."""
        request.move(Transition.PREEMPT)
        self._running.remove(request)
        self._rest(request)
        self._release(request)
        # What steps in flight sample for it is dropped; it will be drawn again, and be the same.
        request.ignore_through_step = request.last_step_id
        request.num_scheduled = request.num_pending = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        insort(self._waiting, request, key=self._key)
        self._num_waiting_tokens += request.num_tokens

    def _take_token(self, request: Request, token_id: int, events: list[RequestEvent]) -> None:
        if request.num_pending < 1:
            raise InvariantError(f"request {request.request_id} was to sample nothing")
        params = request.spec.params
        request.num_pending -= 1
        request.output_token_ids.append(token_id)
        num_output_tokens = len(request.output_token_ids)
        events.append(TokenEvent(request.request_id, num_output_tokens - 1, token_id))
        if token_id in params.stop_token_ids:
            events.append(self._finish(request, FinishReason.STOP))
        elif num_output_tokens >= params.max_tokens:
            events.append(self._finish(request, FinishReason.LENGTH))

    def _finish(self, request: Request, reason: FinishReason) -> FinishedEvent:
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._rest(request)
        else:
            self._waiting.remove(request)
            self._num_waiting_tokens -= request.num_tokens
        request.move(Transition.FINISH)
        request.finish_reason = reason
        del self._requests[request.request_id]
        self._release(request)
        return FinishedEvent(
            request.request_id, reason, request.num_preemptions, request.queue_s or 0.0
        )

    def _release(self, request: Request) -> None:
        if request.last_step_id in self._in_flight:
            self._kv.retire(request.request_id, request.last_step_id)
        else:
            self._kv.release(request.request_id)
