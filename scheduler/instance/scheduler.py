"""Decides what one instance computes next. The only writer of its requests.

Called as `add` / `abort` / `plan_step` / `complete_step`, with `now` from the caller; it answers
with values and never waits. The invariants that the property tests name:

I1  running requests hold blocks for every token they have scheduled; all others hold none.
I2  every request that was added ends with exactly one FinishedEvent or RejectedEvent.
I3  the tokens of a step never exceed the token budget, nor its time what `budget` promises.
I4  a block is released only when no planned step that touches it is outstanding.

Steps may be planned ahead of results: `plan_step` may be called with steps in flight. A request
that is found to have ended while a later step computes it has one surplus token there, which is
dropped: it is neither shown nor counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from scheduler.config import InstanceConfig
from scheduler.costs import StepCosts
from scheduler.instance.batching import rank_policy
from scheduler.instance.inspect import describe_plan, describe_request
from scheduler.instance.plan import Failure, StepPlan, StepResult
from scheduler.instance.planner import Planner
from scheduler.instance.prefixes import RequestPrefixes
from scheduler.instance.queues import Queues
from scheduler.kv.manager import KVManager
from scheduler.load import InstanceView, StepSize
from scheduler.request import InvariantError, Request
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    KVGeometry,
    PromptLogprobs,
    RejectedEvent,
    RejectReason,
    RequestEvent,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)

_NUM_REMEMBERED_PLANS = 8


class InstanceScheduler:
    """Chunks under a token budget, by rank and admission; preempts by recomputation."""

    def __init__(
        self, config: InstanceConfig, geometry: KVGeometry, costs: StepCosts | None = None
    ) -> None:
        """Without costs, `max_step_s` bounds nothing."""
        self.config = config
        self._kv = KVManager(geometry)
        self._prefixes = RequestPrefixes(self._kv, config)
        self._queues = Queues(self._kv, self._prefixes)
        self._planner = Planner(config, costs, self._kv, self._prefixes, self._queues)
        self._rank = rank_policy(config.policy)
        self._last_plans: deque[StepPlan] = deque(maxlen=_NUM_REMEMBERED_PLANS)
        self._num_arrivals = 0
        self._num_given = 0
        self._num_steps = 0
        self._last_step = StepSize()
        self._num_failures = 0

    # --- requests come and go ---

    def add(
        self, spec: RequestSpec, now: float, output_token_ids: Sequence[int] = ()
    ) -> RejectedEvent | None:
        """Queue a request, or say at once why it cannot be served.

        One that ran elsewhere before brings the output tokens that it has, and goes on behind them
        as if it had been preempted: with the same counts, penalties and draws.
        """
        self._num_given += 1
        reason = self._refusal(spec, len(output_token_ids))
        if reason is not None:
            return RejectedEvent(spec.request_id, reason)
        request = Request(spec, self._num_arrivals, now)
        for token_id in output_token_ids:
            request.append(token_id)
        request.rank = self._rank(spec)
        request.born_step_id = self._planner.next_step_id
        request.ignore_through_step = self._planner.next_step_id - 1
        self._num_arrivals += 1
        self._queues.enter(request)
        return None

    def abort(
        self, request_id: RequestId, num_output_tokens: int | None = None
    ) -> FinishedEvent | None:
        """End a request now, in whatever state. None if it is not here (any more).

        What it computed beyond `num_output_tokens` is found by nobody afterwards.
        """
        request = self._queues.requests.get(request_id)
        if request is None:
            return None
        if num_output_tokens is not None:
            self._prefixes.forget_beyond(request, num_output_tokens)
        return self._finish(request, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether a request is alive here; when false, `plan_step` returns None."""
        return bool(self._queues.requests)

    # --- the step ---

    def plan_step(self, now: float) -> StepPlan | None:
        """Return the next step, or None when there is nothing to compute before a result comes."""
        plan = self._planner.plan(now)
        if plan is not None:
            self._last_plans.append(plan)
        return plan

    def complete_step(self, result: StepResult) -> list[RequestEvent]:
        """Take what a step produced and return what became of its requests."""
        progress = self._queues.in_flight.pop(result.step_id, None)
        if progress is None:
            raise InvariantError(f"step {result.step_id} is not in flight")
        self._num_steps += 1
        self._last_step = self._planner.completed(result.step_id, result.duration_s)
        events: list[RequestEvent] = []
        for failure in result.failures:
            self._fail(failure, result.step_id, events)
        for scores in result.prompt_logprobs:
            request = self._computed_by(result.step_id, scores.request_id)
            if request is not None:
                _take_scores(request, scores, events)
        self._take_tokens(result, events)
        for request, num_computed_tokens in progress:
            if self._computed_by(result.step_id, request.request_id) is request:
                _announce(request, events)
                self._prefixes.publish(request, num_computed_tokens)
        self._kv.step_completed(result.step_id)
        return events

    # --- what others may know ---

    @property
    def kv(self) -> KVManager:
        """The block tables, to be read by dumps and tests."""
        return self._kv

    def view(self) -> InstanceView:
        """Return the load as a frozen snapshot."""
        return InstanceView(
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting),
            num_waiting_tokens=self._queues.num_waiting_tokens,
            num_blocks=self._kv.geometry.num_blocks,
            num_free_blocks=self._kv.num_free_blocks,
            num_steps=self._num_steps,
            num_computed_tokens=self._planner.num_planned_tokens,
            num_preemptions=self._queues.num_preemptions,
            num_failures=self._num_failures,
            num_deferred=self._prefixes.num_deferred(self._queues.waiting),
            num_given=self._num_given,
            num_head_blocks=self._num_head_blocks(),
            last_step=self._last_step,
            kv=self._kv.counters(),
        )

    def state(self) -> dict[str, Any]:
        """Return queues, groups, leases and the last plans as plain data, without any token."""
        return {
            "running": [describe_request(request) for request in self._queues.running],
            "waiting": [describe_request(request) for request in self._queues.waiting],
            "steps_in_flight": list(self._queues.in_flight),
            "kv": self._kv.state(),
            "prefixes_computing": self._prefixes.num_computing,
            "pace": self._planner.pace.factor,
            "last_plans": [describe_plan(plan) for plan in self._last_plans],
        }

    def check_idle(self) -> None:
        """Raise InvariantError unless, with no request alive, nothing is held for one."""
        queues = self._queues
        if queues.requests or queues.waiting or queues.running or queues.in_flight:
            raise InvariantError("the scheduler is not idle")
        if self._prefixes.num_computing:
            raise InvariantError("a prefix is marked as being computed, by nobody")
        self._kv.check_idle()

    # --- how ---

    def _num_head_blocks(self) -> int:
        waiting = self._queues.waiting
        return self._kv.blocks_for(waiting[0].num_tokens) if waiting else 0

    def _refusal(self, spec: RequestSpec, num_output_tokens: int) -> RejectReason | None:
        if spec.request_id in self._queues.requests:
            return RejectReason.DUPLICATE_ID
        num_tokens = len(spec.prompt_token_ids) + spec.params.max_tokens
        # The last token is sampled and never computed, so it needs no slot.
        num_blocks = self._kv.blocks_for(num_tokens - 1)
        if (
            not spec.prompt_token_ids
            or spec.params.max_tokens <= num_output_tokens
            or num_tokens > self.config.max_model_len
            or num_blocks > self._kv.geometry.num_blocks
        ):
            return RejectReason.NEVER_FITS
        if len(self._queues.requests) >= self.config.max_num_running + self.config.max_num_waiting:
            return RejectReason.QUEUE_FULL
        return None

    def _computed_by(self, step_id: int, request_id: RequestId) -> Request | None:
        """Return the request that a step computed, None if it ended or was preempted meanwhile."""
        request = self._queues.requests.get(request_id)
        return request if request is not None and step_id > request.ignore_through_step else None

    def _take_tokens(self, result: StepResult, events: list[RequestEvent]) -> None:
        block_size = self._kv.geometry.block_size
        for request_id, token_id, logprobs in result.sampled:
            request = self._computed_by(result.step_id, request_id)
            if request is None:
                continue
            if request.num_scheduled < request.num_tokens:
                raise InvariantError(f"request {request_id} was to sample nothing")
            output_token_ids = request.output_token_ids
            # The first here: of a request, or of one that goes on from elsewhere.
            is_first = not output_token_ids or not request.is_announced
            if is_first or not request.num_tokens % block_size:
                self._prefixes.publish(request, request.num_tokens)
            if is_first:
                _announce(request, events)
            events.append(TokenEvent(request_id, len(output_token_ids), token_id, logprobs))
            request.append(token_id)
            params = request.spec.params
            if token_id in params.stop_token_ids and len(output_token_ids) > params.min_tokens:
                events.append(self._finish(request, FinishReason.STOP))
            elif request.num_tokens > request.max_num_tokens:
                events.append(self._finish(request, FinishReason.LENGTH))

    def _fail(self, failure: Failure, step_id: int, events: list[RequestEvent]) -> None:
        self._kv.taint(failure.request_id)
        request = self._queues.requests.get(failure.request_id)
        if request is not None and step_id >= request.born_step_id:
            self._num_failures += 1
            finished = self._finish(request, FinishReason.ERROR)
            events.append(finished._replace(error=failure.cause, detail=failure.detail))

    def _finish(self, request: Request, reason: FinishReason) -> FinishedEvent:
        self._queues.finish(request, reason)
        return FinishedEvent(request.request_id, reason, request.num_preemptions)


def _announce(request: Request, events: list[RequestEvent]) -> None:
    """Say once that the first step is complete, though it may have been a part of the prompt."""
    if not request.is_announced:
        request.is_announced = True
        assert request.queue_s is not None
        started = StartedEvent(request.request_id, request.queue_s, request.num_cached_tokens)
        events.append(started)


def _take_scores(request: Request, scores: PromptLogprobs, events: list[RequestEvent]) -> None:
    """Pass on what is new: after a preemption, prompt tokens are scored again."""
    num_known = max(0, request.num_scored_tokens + 1 - scores.start)
    if num_known < len(scores.positions):
        start = scores.start + num_known
        events.append(PromptLogprobs(request.request_id, start, scores.positions[num_known:]))
        request.num_scored_tokens = scores.start + len(scores.positions) - 1
