"""The scheduler against a reference model that reads its plans alone, as an executor does.

The model keeps what each slot holds: a token and all those before it, of one tenant and salt. So a
wrong block, a copy too many or a prefix that nobody computed shows when a request attends to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from scheduler.costs import StepCosts
from scheduler.instance.plan import Failure, Join, SampledToken, StepPlan, StepResult
from scheduler.request import RequestState
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    RequestEvent,
    RequestId,
    StartedEvent,
    TokenEvent,
)
from tests.factories import BLOCK_SIZE as SIZE
from tests.factories import make_scheduler, make_spec
from tests.properties.invariants import blocks_of, check_blocks, check_requests
from tests.properties.lives import Client, Life, Step, next_token

STEMS = ((1,) * 12, (1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2), (3, 4, 5, 6) * 3)
MAX_PROMPT, MAX_TOKENS = 12, 9  # so that any request fits into 5 blocks
NAMES = [RequestId(f"r{index}") for index in range(8)]  # used again as soon as they are free
GARBAGE = "garbage"


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[RequestId, Client] = {}
        self.lives: dict[RequestId, Life] = {}  # those that hold blocks
        self.batch: set[RequestId] = set()  # those in the executor's set
        self.slots: dict[tuple[int, int], tuple | str] = {}
        self.in_flight: list[Step] = []
        self.histories: list[tuple[int, ...]] = []
        self.now = 0.0
        self.num_arrivals = self.num_admissions = self.num_planned_tokens = 0

    @initialize(
        num_blocks=st.integers(5, 8),
        max_num_running=st.sampled_from([4, 3, 2, 1]),
        more_budget=st.integers(0, 10),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_num_preemptions=st.sampled_from([3, 1, 0]),
        prefix_caching=st.sampled_from([True, True, False]),
        max_step_s=st.sampled_from([None, None, 0.5, 4.0, 6.0]),
        min_prompt_tokens=st.sampled_from([1, 3]),
    )
    def begin(self, num_blocks, max_num_running, more_budget, **config) -> None:
        self.scheduler = make_scheduler(
            num_blocks,
            StepCosts.linear(token_s=1.0),
            max_num_running=max_num_running,
            max_num_batched_tokens=max_num_running + more_budget,
            **config,
        )
        self.config = self.scheduler.config

    # --- requests come and go ---

    @rule(
        stem=st.integers(0, 5),
        num_shared=st.sampled_from([8, 12, 6, 4, 1]),
        tail=st.lists(st.integers(1, 2), max_size=2),
        max_tokens=st.sampled_from([MAX_TOKENS, 6, 3, 1]),
        num_choices=st.sampled_from([1, 1, 3]),
        space=st.sampled_from([("x", ""), ("x", ""), ("x", "salt"), ("y", "")]),
        priority=st.integers(0, 2),
        stop_token_ids=st.sampled_from([(), (0, 1, 2)]),
        seed=st.integers(0, 9),
        min_tokens=st.sampled_from([0, 0, 3]),
    )
    def add(
        self, stem, num_shared, tail, max_tokens, num_choices, space, priority, **params
    ) -> None:
        stems = [*STEMS, *self.histories[-3:]]  # so that conversations go on
        prompt = (*stems[stem % len(stems)][:num_shared], *tail)[:MAX_PROMPT]
        for choice in range(num_choices):
            name = next((name for name in NAMES if name not in self.clients), None)
            if name is None:
                return
            spec = make_spec(name, prompt, max_tokens, choice=choice, **params)
            spec = replace(spec, tenant=space[0], cache_salt=space[1], priority=priority)
            assert self.scheduler.add(spec, self.now) is None
            self.clients[name] = Client(
                spec,
                self.num_arrivals,
                priority if self.config.policy == "priority" else 0,
                self.now,
                self.scheduler._queues.requests[name],
                [*prompt],
            )
            self.num_arrivals += 1

    @precondition(lambda self: self.clients)
    @rule(index=st.integers(0, 9), num_shown=st.sampled_from([None, 0, 1, 3]))
    def abort(self, index: int, num_shown: int | None) -> None:
        name = list(self.clients)[index % len(self.clients)]
        client = self.clients.pop(name)
        if num_shown is not None:
            num_shown = min(num_shown, client.num_output_tokens)
        event = self.scheduler.abort(name, num_shown)
        assert event == FinishedEvent(name, FinishReason.ABORT, client.num_preemptions)
        assert self.scheduler.abort(name) is None

    # --- a step is planned, and computed at once: only its result comes later ---

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule(failing=st.sampled_from([None, None, None, 0, 1]), leaves_garbage=st.booleans())
    def plan(self, failing: int | None = None, leaves_garbage: bool = False) -> None:
        waiting = [client for name, client in self.clients.items() if not self.is_alive(name)]
        self.now += 1.0
        plan = self.scheduler.plan_step(self.now)
        self.bury(plan)
        if plan is None:
            assert self.in_flight or not self.clients, "requests are alive, and nothing happens"
            return
        joined = self.apply(plan)
        self.check_admissions(waiting, joined)
        self.compute(plan, failing, leaves_garbage)

    def is_alive(self, name: RequestId) -> bool:
        """Whether the life that the model knows by this name goes on."""
        life, client = self.lives.get(name), self.clients.get(name)
        return (
            life is not None
            and life.client is client
            and client.request.state is RequestState.RUNNING
            and client.request.num_preemptions == client.num_preemptions
        )

    def bury(self, plan: StepPlan | None) -> None:
        """Forget the lives that have ended; who was preempted is the newest of the lowest rank."""
        dead = [life for name, life in self.lives.items() if not self.is_alive(name)]
        preempted = []
        for life in dead:
            del self.lives[life.name]
            if self.clients.get(life.name) is life.client:
                life.client.num_preemptions += 1
                preempted.append(life)
        for client in self.clients.values():
            assert client.request.num_preemptions == client.num_preemptions
            assert client.num_preemptions <= self.config.max_num_preemptions
        for victim in preempted:
            for life in self.lives.values():
                is_safe = life.client.num_preemptions == self.config.max_num_preemptions
                assert is_safe or life.order < victim.order, "the wrong one gave way"
        if plan is not None:
            assert self.batch.issuperset(plan.leaves)
            assert len(set(plan.leaves)) == len(plan.leaves)
            self.batch.difference_update(plan.leaves)
            assert self.batch <= set(self.lives), "one that has ended stays in the set"

    def apply(self, plan: StepPlan) -> list[Client]:
        """Take over what a plan changes and return who was admitted."""
        self.step = Step(StepResult(step_id=plan.step_id, sampled=()), [])
        for block in blocks_of(plan.clears):
            assert not self.holders(block), "a block is cleared that somebody holds"
            self.check_untouched(block, None)
            self.slots.update({(block, offset): "" for offset in range(SIZE)})
        admitted = [self.join(join) for join in plan.joins]
        for name, groups in plan.appends:
            assert name in self.batch
            assert groups
            self.lives[name].blocks += blocks_of(groups)
        for source, target, num_tokens in plan.copies:
            (life,) = self.holders(target)
            assert life.num_computed == life.blocks.index(target) * SIZE + num_tokens
            self.check_untouched(target, life)
            self.step.touched.setdefault(source, set()).update(self.holders(source))
            for offset in range(num_tokens):
                self.slots[target, offset] = self.slots[source, offset]
        for life in self.lives.values():
            assert len(set(life.blocks)) == len(life.blocks)
        return [client for client in admitted if client is not None]

    def join(self, join: Join) -> Client | None:
        """A request enters the set; return it if it was admitted, None if it had only rested."""
        name, client = join.request_id, self.clients[join.request_id]
        assert name not in self.batch
        assert (list(join.token_ids), join.params) == (client.tokens, client.spec.params)
        assert join.num_prompt_tokens == len(client.spec.prompt_token_ids)
        self.batch.add(name)
        life = self.lives.get(name)
        blocks = blocks_of(join.groups)
        if life is not None:
            assert join.num_computed_tokens == life.num_computed, "not where it had stopped"
            assert (life.tokens, life.blocks) == (client.tokens, blocks[: len(life.blocks)])
            life.blocks = blocks
            return None
        assert join.num_computed_tokens < len(client.tokens)
        assert self.config.prefix_caching or not join.num_computed_tokens
        if client.started is None:
            queue_s = self.now - client.arrival_s
            client.started = StartedEvent(name, queue_s, join.num_computed_tokens)
        order = (client.rank, self.num_admissions)
        self.num_admissions += 1
        self.lives[name] = Life(client, order, [*client.tokens], blocks, join.num_computed_tokens)
        if client.num_preemptions == self.config.max_num_preemptions:
            num_tokens = len(client.spec.prompt_token_ids) + client.spec.params.max_tokens - 1
            assert len(blocks) * SIZE >= num_tokens, "it could lack blocks once more"
        return client

    def check_admissions(self, waiting: list[Client], admitted: list[Client]) -> None:
        """Nobody was passed over, but for those who wait for a prefix that is being computed."""
        passed_over = [
            client
            for client in waiting
            if client not in admitted and client.request.waits_for is None
        ]
        for client in admitted:
            for other in passed_over:
                assert client.waiting_order < other.waiting_order, "one was passed over"

    def compute(self, plan: StepPlan, failing: int | None, leaves_garbage: bool) -> None:
        chunks = dict(plan.chunks)
        assert len(chunks) == len(plan.chunks)
        assert self.batch.issuperset(chunks)
        assert all(num_tokens > 1 for num_tokens in chunks.values())
        num_tokens = {name: chunks.get(name, 1) for name in sorted(self.batch)}
        assert 0 < sum(num_tokens.values()) <= self.config.max_num_batched_tokens
        assert len(self.batch) <= self.config.max_num_running
        self.num_planned_tokens += sum(num_tokens.values())
        rows = [self.lives[name] for name in num_tokens if not self.lives[name].failed]
        failures = []
        for row, life in enumerate(rows):
            life.failed = row == failing
            if life.failed:
                failures.append(Failure(life.name, "it was to fail"))
            self.write(life, num_tokens[life.name], leaves_garbage)
        sampled = []
        for life in rows:
            if not life.failed:
                self.attend(life)
                if life.num_computed == len(life.tokens):
                    life.tokens.append(next_token(life.client.spec, life.num_computed))
                    sampled.append(SampledToken(life.name, life.tokens[-1]))
                    self.step.sampled_by.append(life)
                else:
                    self.step.only_computed.append(life)
        self.step.result = replace(
            self.step.result, sampled=tuple(sampled), failures=tuple(failures)
        )
        self.in_flight.append(self.step)

    def write(self, life: Life, num_tokens: int, leaves_garbage: bool) -> None:
        end = life.num_computed + num_tokens
        assert end <= len(life.tokens), "a token is computed that nobody knows"
        for position in range(life.num_computed, end):
            block, _ = life.slot(position)
            assert self.holders(block) == {life}, "a block is written that another one holds"
            self.check_untouched(block, life)
            if not life.failed:
                self.slots[life.slot(position)] = life.content(position)
            elif leaves_garbage:
                self.slots[life.slot(position)] = GARBAGE
        for block in life.blocks[: -(-end // SIZE)]:
            self.step.touched.setdefault(block, set()).add(life)
        life.num_computed = end

    def attend(self, life: Life) -> None:
        for position in range(life.num_computed):
            found = self.slots.get(life.slot(position))
            assert found == life.content(position), "it attends to what is not its own"
        for position in range(life.num_computed, -(-life.num_computed // SIZE) * SIZE):
            assert self.slots.get(life.slot(position)) != GARBAGE, "garbage behind its tokens"

    def holders(self, block: int) -> set[Life]:
        return {life for life in self.lives.values() if block in life.blocks}

    def check_untouched(self, block: int, life: Life | None) -> None:
        for step in self.in_flight:
            touching = step.touched.get(block, {life})
            assert life in touching, "a step in flight touches what another one writes"

    # --- a result comes ---

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete(self) -> None:
        step = self.in_flight.pop(0)
        expected, started = [*self.expected_events(step)], [*self.expected_starts(step)]
        events = self.scheduler.complete_step(step.result)
        assert events[: len(expected)] == expected
        assert sorted(events[len(expected) :]) == sorted(started)

    def expected_events(self, step: Step) -> Iterator[RequestEvent]:
        for name, cause, _ in step.result.failures:
            client = self.clients.get(name)
            if client is not None and step.result.step_id >= client.request.born_step_id:
                del self.clients[name]
                yield FinishedEvent(name, FinishReason.ERROR, client.num_preemptions, cause)
        for life, (name, token_id, _) in zip(step.sampled_by, step.result.sampled, strict=True):
            if not self.is_alive(name) or self.lives[name] is not life:
                continue  # it has ended, or will draw the same token again
            client, params = life.client, life.client.spec.params
            if not client.is_announced:
                assert not client.num_output_tokens
                yield self.announce(client)
            yield TokenEvent(name, client.num_output_tokens, token_id)
            client.tokens.append(token_id)
            assert life.tokens[: len(client.tokens)] == client.tokens
            reason = None
            is_stop = token_id in params.stop_token_ids
            if is_stop and client.num_output_tokens > params.min_tokens:
                reason = FinishReason.STOP
            elif client.num_output_tokens == params.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                del self.clients[name]
                self.histories.append(tuple(client.tokens))
                yield FinishedEvent(name, reason, client.num_preemptions)

    def expected_starts(self, step: Step) -> Iterator[RequestEvent]:
        """Those who began with a part of their prompt, and have no token yet."""
        for life in step.only_computed:
            is_there = self.is_alive(life.name) and self.lives[life.name] is life
            if is_there and not life.client.is_announced:
                yield self.announce(life.client)

    def announce(self, client: Client) -> StartedEvent:
        client.is_announced = True
        assert client.started is not None
        return client.started

    @rule(num_steps=st.integers(2, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if len(self.in_flight) < 2:
                self.plan()
            if self.in_flight:
                self.complete()
            self.check()

    # --- what always holds ---

    @invariant()
    def check(self) -> None:
        check_blocks(
            self.scheduler, {step.result.step_id: set(step.touched) for step in self.in_flight}
        )
        check_requests(self.scheduler)
        view = self.scheduler.view()
        assert view.num_running + view.num_waiting == len(self.clients)
        assert view.num_computed_tokens == self.num_planned_tokens
        assert self.scheduler.has_work == bool(self.clients)

    def teardown(self) -> None:
        num_steps = 0
        while self.clients or self.in_flight:
            self.run(1)
            num_steps += 1
            assert num_steps < 500, "it never ends"
        assert self.scheduler.plan_step(self.now) is None
        self.scheduler.check_idle()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, report_multiple_bugs=False
)
