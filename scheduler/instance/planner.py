"""Makes the next step plan: who computes how many tokens, who is admitted, who gives way.

Running and waiting requests are walked merged by rank. Whoever runs gets a token at least; what is
left of the step's tokens and of its time goes to chunks in that order; who waits is admitted while
tokens, time, places and blocks last, and takes places and blocks from running requests of a lower
rank if it must.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

from scheduler.config import InstanceConfig
from scheduler.costs import StepCosts, StepShape
from scheduler.instance.budget import Pace, StepBudget
from scheduler.instance.plan import Append, BlockCopy, Chunk, Join, StepPlan
from scheduler.instance.preemption import newest, outranked
from scheduler.instance.prefixes import RequestPrefixes
from scheduler.instance.queues import Queues
from scheduler.kv.blocks import BlockGroup
from scheduler.kv.manager import Hit, KVManager
from scheduler.load import StepSize
from scheduler.request import InvariantError, Request


class _Draft:
    """The plan that is being made: its lists and what is left of the token budget."""

    __slots__ = (
        "appends",
        "chunks",
        "closed",
        "copies",
        "joins",
        "now",
        "num_requests",
        "num_tokens_left",
        "progress",
        "time",
    )

    def __init__(self, num_tokens_left: int, now: float) -> None:
        self.num_tokens_left = num_tokens_left
        self.num_requests = 0
        self.now = now
        self.closed = False  # nobody is admitted any more
        self.time: StepBudget | None = None  # until a prompt asks
        self.copies: list[BlockCopy] = []
        self.joins: list[Join] = []
        self.appends: list[Append] = []
        self.chunks: list[Chunk] = []
        self.progress: list[tuple[Request, int]] = []  # see `Queues.in_flight`


class Planner:
    """Makes one plan after another; it knows no result but through the requests."""

    def __init__(
        self,
        config: InstanceConfig,
        costs: StepCosts | None,
        kv: KVManager,
        prefixes: RequestPrefixes,
        queues: Queues,
    ) -> None:
        self._config = config
        self._costs = costs
        self._kv = kv
        self._prefixes = prefixes
        self._queues = queues
        self._clears: list[BlockGroup] = []  # for the next plan
        self._sizes: dict[int, StepSize] = {}  # of the steps in flight
        self._predicted_s: dict[int, float] = {}  # of those in flight that compute prompts
        self.pace = Pace()
        self.next_step_id = 0
        self.num_planned_tokens = 0

    def plan(self, now: float) -> StepPlan | None:
        """Return the next step, which is in flight from now on, or None if there is none."""
        queues, budget = self._queues, self._config.max_num_batched_tokens
        self._clears.extend(self._kv.take_clears())
        draft = _Draft(budget, now)
        self._fill(draft)
        if draft.num_tokens_left == budget:
            return None
        plan = StepPlan(
            step_id=self.next_step_id,
            leaves=tuple(queues.leaves),
            clears=tuple(self._clears),
            copies=tuple(draft.copies),
            joins=tuple(draft.joins),
            appends=tuple(draft.appends),
            chunks=tuple(draft.chunks),
        )
        queues.leaves.clear()
        self._clears.clear()
        queues.in_flight[plan.step_id] = draft.progress
        self.next_step_id += 1
        num_tokens = budget - draft.num_tokens_left
        self.num_planned_tokens += num_tokens
        self._sizes[plan.step_id] = StepSize(num_tokens, draft.num_requests)
        if draft.time is not None:
            self._predicted_s[plan.step_id] = draft.time.step_s
        return plan

    def completed(self, step_id: int, duration_s: float) -> StepSize:
        """Learn how long a step took; return what it computed, once."""
        self.pace.took(self._predicted_s.pop(step_id, 0.0), duration_s)
        return self._sizes.pop(step_id)

    def _fill(self, draft: _Draft) -> None:
        running, waiting = self._queues.running, self._queues.waiting
        index = passed = 0  # running requests that are planned; waiting ones that are passed over
        while True:
            while passed < len(waiting) and self._prefixes.is_coming(waiting[passed]):
                passed += 1
            head = None if draft.closed or passed == len(waiting) else waiting[passed]
            index = self._plan_decodes(index, head, draft)
            if index < len(running) and not _outranks(head, running[index]):
                index += self._plan_running(index, draft)
            elif head is None:
                return
            elif self._admit(head, index, draft):
                index += 1
            elif head.waits_for is None:
                draft.closed = True

    def _share(self, draft: _Draft, index: int) -> int:
        """Return the tokens to be given now, if those who run from `index` on get one each."""
        return draft.num_tokens_left - (len(self._queues.running) - index)

    # --- the step's time ---

    def _time(self, draft: _Draft) -> StepBudget | None:
        """Return what the step's time leaves for prompts; None if it has no limit at all."""
        max_step_s = self._config.max_step_s
        if draft.time is None and self._costs is not None and max_step_s is not None:
            shape, someone_decodes = self._least()
            limit_s = max_step_s / self.pace.factor if someone_decodes else inf
            num_sure = self._config.min_prompt_tokens
            draft.time = StepBudget(self._costs, shape, limit_s, num_sure)
        return draft.time

    def _least(self) -> tuple[StepShape, bool]:
        """Return the step of one token for each who runs, and whether any of them decodes.

        Called before the plan has any chunk.
        """
        num_requests = num_context_tokens = 0
        someone_decodes = False
        for request in self._queues.running:
            is_planned = request.last_step_id == self.next_step_id
            if is_planned or not _rests(request):
                num_requests += 1
                num_context_tokens += request.num_scheduled + (not is_planned)
                someone_decodes |= is_planned or request.num_to_compute == 1
        return StepShape(
            num_tokens=num_requests,
            num_requests=num_requests,
            num_context_tokens=num_context_tokens,
            num_visits=num_context_tokens,
        ), someone_decodes

    # --- who runs ---

    def _plan_decodes(self, index: int, head: Request | None, draft: _Draft) -> int:
        """Give one token to each of those who run from `index` on, until one needs more thought.

        Nearly every request of nearly every step passes here, and the plan says nothing of it.
        """
        running, step_id = self._queues.running, self.next_step_id
        end = len(running) if head is None else bisect_right(running, head.rank, index, key=_rank)
        start = index
        while index < end:
            request = running[index]
            num_scheduled = request.num_scheduled
            if not request.num_tokens <= num_scheduled + 1 <= request.num_slots:
                break  # also one that rests: it has no slot left
            request.num_scheduled = num_scheduled + 1
            request.last_step_id = step_id
            index += 1
        draft.num_tokens_left -= index - start
        draft.num_requests += index - start
        return index

    def _plan_running(self, index: int, draft: _Draft) -> int:
        """Schedule a running request. Returns 1, or 0 if one had to go: the index is to do."""
        request = self._queues.running[index]
        if _rests(request):
            self._queues.rest(request)
            return 1
        num_tokens = min(request.num_to_compute, self._share(draft, index + 1))
        time = self._time(draft) if num_tokens > 1 else None
        if time is not None:  # which has counted one in
            num_tokens = 1 + time.room(request.num_scheduled + 1, num_tokens - 1)
        num_covered_tokens = request.num_scheduled + num_tokens
        groups = self._cover(request, num_covered_tokens)
        if groups is not None:
            if not request.in_batch:
                self._join(request, draft)
            elif groups:
                draft.appends.append(Append(request.request_id, groups))
            if time is not None:
                time.take(request.num_scheduled + 1, num_tokens - 1)
            self._schedule(request, num_tokens, draft)
            return 1
        draft.closed = True  # a newcomer must not take what is coming
        if self._blocks_are_coming(request, num_covered_tokens):
            self._queues.rest(request)
            return 1
        candidates = self._queues.running[index:]
        self._preempt(newest(candidates, self._config.max_num_preemptions))
        return 0

    def _blocks_are_coming(self, request: Request, num_tokens: int) -> bool:
        """Whether what retired requests still hold suffices, so that no more need to give way."""
        missing = self._kv.missing_blocks(request.request_id, num_tokens)
        return missing <= self._kv.num_free_blocks + self._kv.num_retired_blocks

    def _preempt(self, request: Request) -> None:
        if request.last_step_id == self.next_step_id:
            raise InvariantError(f"{request.request_id} is in the plan that is being made")
        self._queues.preempt(request)
        # It may have shared with one that failed: its blocks are had in this plan all the same.
        self._clears.extend(self._kv.take_clears())

    # --- who waits ---

    def _admit(self, request: Request, index: int, draft: _Draft) -> bool:
        """Let a waiting request run, if tokens, places and blocks suffice.

        `index` is its place among those who run: those before it are planned, all others are of a
        lower rank, and give way if they must.
        """
        hit = self._prefixes.find(request)
        if hit is None or self._share(draft, index) < 1:
            return False
        if hit.partial is not None and not self._fits(request, hit):
            # Beside its copy the block needs room of its own, which must not be what is lacking.
            hit = hit.without_copy(self._kv.geometry.block_size)
        time = self._time(draft)
        if time is not None and not time.has_room(hit.num_tokens):
            return False
        if not self._fits(request, hit) and not self._make_room(request, hit, index):
            return False
        self._queues.admit(request)
        if request.queue_s is None:
            request.queue_s = draft.now - request.arrival_s
            num_prompt_tokens = len(request.spec.prompt_token_ids)
            request.num_cached_tokens = min(hit.num_tokens, num_prompt_tokens)
        self._take_blocks(request, hit, draft)
        self._join(request, draft)
        num_tokens = min(request.num_to_compute, self._share(draft, index + 1))
        if time is not None:
            time.enter(request.num_scheduled)
            num_tokens = time.room(request.num_scheduled, num_tokens)
            time.take(request.num_scheduled, num_tokens)
        self._schedule(request, num_tokens, draft)
        return True

    def _take_blocks(self, request: Request, hit: Hit, draft: _Draft) -> None:
        self._kv.adopt(request.request_id, hit, self.next_step_id)
        groups = self._cover(request, self._num_tokens_to_cover(request))
        if groups is None:
            raise InvariantError(f"no blocks for {request.request_id}, which was admissible")
        if hit.partial is not None:
            num_copied = hit.num_tokens - len(hit.blocks) * self._kv.geometry.block_size
            draft.copies.append(BlockCopy(hit.partial, groups[0].start, num_copied))
        request.num_scheduled = hit.num_tokens
        self._prefixes.begin(request, len(hit.blocks))

    def _num_tokens_to_cover(self, request: Request) -> int:
        """Return for how many tokens a request needs blocks when it is admitted.

        One that was preempted too often gets all that it can ever need: it cannot lack any later,
        and nobody can take them, so it runs to completion.
        """
        if request.num_preemptions < self._config.max_num_preemptions:
            return request.num_tokens
        return request.max_num_tokens

    def _fits(self, request: Request, hit: Hit, gone: Sequence[Request] = ()) -> bool:
        """Whether there is a place, and blocks for all known tokens, with room for others to grow.

        The watermark is a block for every running request: without it a newcomer takes the last
        blocks and is thrown out again within `block_size` steps. `gone` are running requests whose
        leaving is considered.
        """
        num_running = len(self._queues.running) - len(gone)
        num_needed = (
            self._kv.blocks_for(self._num_tokens_to_cover(request))
            - len(hit.blocks)
            + self._kv.num_idle_in(hit)
            + num_running
        )
        num_gained = sum(self._kv.num_blocks_gained(victim.request_id, hit) for victim in gone)
        return (
            num_running < self._config.max_num_running
            and num_needed <= self._kv.num_free_blocks + num_gained
        )

    def _make_room(self, request: Request, hit: Hit, index: int) -> bool:
        """Preempt requests of a lower rank for one that waits. True if it fits now.

        If not, it is in vain, or steps in flight still hold the blocks and it will fit soon.
        """
        if self._kv.num_retired_blocks:
            return False  # what was given up already is on its way
        victims = outranked(
            request,
            self._queues.running[index:],
            self._config.max_num_preemptions,
            lambda victims: self._fits(request, hit, victims),
        )
        for victim in victims:
            self._preempt(victim)
        return bool(victims) and self._fits(request, hit)

    # --- what goes into the plan ---

    def _cover(self, request: Request, num_tokens: int) -> tuple[BlockGroup, ...] | None:
        """Get blocks for so many of the request's tokens; None, and no change, if they lack."""
        groups = self._kv.cover(request.request_id, num_tokens, request.max_num_tokens)
        if groups is not None:
            num_slots = self._kv.num_slots(request.request_id)
            request.num_slots = min(num_slots, request.max_num_tokens)
        return groups

    def _join(self, request: Request, draft: _Draft) -> None:
        request.in_batch = True
        draft.joins.append(
            Join(
                request.request_id,
                request.token_ids,
                len(request.spec.prompt_token_ids),
                request.num_scheduled,
                self._kv.groups(request.request_id),
                request.spec.params,
            )
        )

    def _schedule(self, request: Request, num_tokens: int, draft: _Draft) -> None:
        if num_tokens < 1:
            raise InvariantError(f"running request {request.request_id} has nothing to compute")
        if num_tokens > 1:
            draft.chunks.append(Chunk(request.request_id, num_tokens))
        if num_tokens < request.num_to_compute:
            draft.progress.append((request, request.num_scheduled + num_tokens))
        request.num_scheduled += num_tokens
        request.last_step_id = self.next_step_id
        draft.num_tokens_left -= num_tokens
        draft.num_requests += 1


def _rests(request: Request) -> bool:
    """Whether a running request has nothing to compute before a result comes."""
    is_done = request.num_scheduled >= request.max_num_tokens  # once its last token has come
    return is_done or bool(request.num_pending and not request.in_batch)


def _rank(request: Request) -> int:
    return request.rank


def _outranks(head: Request | None, request: Request) -> bool:
    """Whether a waiting request comes before one that runs."""
    return head is not None and head.rank < request.rank
