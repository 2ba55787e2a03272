"""Drives a scheduler and a checksum executor through one random schedule and checks the law.

The law: each request's tokens are those of running it alone. The invariants of the core are checked
after every step; see `invariants.py`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field, replace
from io import BytesIO

from engine.decision_log import RecordingScheduler
from engine.fake import ChecksumExecutor
from scheduler.costs import StepCosts
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    PromptLogprobs,
    RejectedEvent,
    RejectReason,
    RequestId,
    RequestSpec,
    StartedEvent,
    TokenEvent,
)
from tests.factories import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    make_config,
    make_executor,
    make_geometry,
    make_scheduler,
    make_spec,
)
from tests.properties.invariants import Queue, check_blocks, check_requests, touched_blocks
from tests.properties.oracle import tokens_alone

FAULTS = ("forward", "sample", "nan")


@dataclass
class Outcome:
    """What the clients of a schedule saw."""

    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    finished: dict[RequestId, FinishReason] = field(default_factory=dict)
    cached: dict[RequestId, int] = field(default_factory=dict)
    num_scored: dict[RequestId, int] = field(default_factory=dict)
    num_preemptions: int = 0
    num_steps: int = 0
    num_copies: int = 0
    num_rejections: int = 0
    num_resumed: int = 0
    log_hash: str = ""

    def count(self, reason: FinishReason) -> int:
        return sum(finished is reason for finished in self.finished.values())


# Steps take other times than the scheduler is told, so that their pace decides too.
COSTS = StepCosts.linear(fixed_s=1.0, token_s=0.125, context_token_s=1 / 256)
SLOWER = StepCosts.linear(fixed_s=1.5, token_s=0.125, context_token_s=1 / 256)


@dataclass
class Schedule:
    """What is random in one run, all of it drawn from the seed."""

    rng: random.Random
    num_blocks: int
    depth: int
    settings: dict
    specs: list[RequestSpec]
    faults: dict[RequestId, tuple[str, int]]
    given: dict[RequestId, list[int]]  # output tokens of those that were begun elsewhere

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        rng = random.Random(seed)
        num_blocks = rng.randint(3, 14)
        max_num_running = rng.randint(1, 8)
        specs = random_specs(rng, num_blocks)
        poison = rng.choice([0.0, 0.0, 0.1, 0.4])
        is_queue_short = random.Random(f"queue {seed}").random() < 0.25
        return cls(
            rng=rng,
            num_blocks=num_blocks,
            depth=rng.randint(1, 2),
            settings={
                "max_num_running": max_num_running,
                "max_num_batched_tokens": rng.randint(max_num_running, 32),
                "policy": rng.choice(["fcfs", "priority"]),
                "max_num_preemptions": rng.choice([0, 1, 3, 3]),
                "prefix_caching": rng.random() < 0.8,
                "max_num_waiting": 1 if is_queue_short else 64,
                "max_step_s": random.Random(f"time {seed}").choice([None, 0.1, 1.6, 2.5, 9.0]),
                "min_prompt_tokens": random.Random(f"sure {seed}").choice([1, 2, 16]),
            },
            specs=specs,
            faults={
                spec.request_id: (
                    rng.choice(FAULTS),
                    rng.randrange(len(spec.prompt_token_ids) + spec.params.max_tokens),
                )
                for spec in specs
                if rng.random() < poison
            },
            given=given_tokens(seed, specs),
        )

    def fault(self, request_id: RequestId, positions: range) -> str | None:
        kind, position = self.faults.get(request_id, (None, -1))
        return kind if position in positions else None


def given_tokens(seed: int, specs: list[RequestSpec]) -> dict[RequestId, list[int]]:
    """In some schedules, cut some requests off at a random token, to go on here."""
    rng = random.Random(f"given {seed}")
    share = rng.choice([0.0, 0.0, 0.2, 0.7])
    given = {}
    for spec in specs:
        if rng.random() < share:
            expected, _ = tokens_alone(spec)
            given[spec.request_id] = expected[: rng.randrange(len(expected))]
    return given


def random_specs(rng: random.Random, num_blocks: int) -> list[RequestSpec]:
    """Return requests that share prefixes often: whole blocks, parts of one, whole prompts."""
    capacity = num_blocks * BLOCK_SIZE
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 20))] for _ in range(3)]
    specs: list[RequestSpec] = []
    while len(specs) < 12 and (not specs or rng.random() < 0.9):
        stem = rng.choice(stems)
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 1, 3, 10]))]
        prompt = (stem[: rng.choice([len(stem), rng.randint(0, 20)])] + tail or [1])[: capacity - 1]
        spec = make_spec(
            prompt=prompt,
            max_tokens=rng.randint(1, min(60, capacity - len(prompt) + 1)),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(2**63),
            stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.randint(0, 4))),
            min_tokens=rng.choice([0, 0, 0, 5]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, None, None, 1]),
        )
        spec = replace(
            spec,
            tenant=rng.choice(["x", "x", "x", "y"]),
            cache_salt=rng.choice(["", "", "", "salt"]),
            priority=rng.randint(-1, 1),
        )
        for choice in range(rng.choice([1, 1, 1, 3])):  # n
            request_id = RequestId(f"r{len(specs)}")
            params = replace(spec.params, choice=choice)
            specs.append(replace(spec, request_id=request_id, params=params))
    return specs


def solo(spec: RequestSpec) -> tuple[list[int], FinishReason]:
    """Run one request with the whole machine to itself."""
    scheduler, executor = make_scheduler(num_blocks=64), make_executor(num_blocks=64)
    assert scheduler.add(spec, 0.0) is None
    tokens: list[int] = []
    while plan := scheduler.plan_step(0.0):
        executor.submit(plan)
        for event in scheduler.complete_step(executor.poll()):
            if isinstance(event, TokenEvent):
                tokens.append(event.token_id)
            elif isinstance(event, FinishedEvent):
                return tokens, event.reason
    raise AssertionError("the request never finished")


class Player:
    """One schedule in progress."""

    def __init__(self, seed: int) -> None:
        self.plan = Schedule.draw(seed)
        self.log = BytesIO()
        self.recording = RecordingScheduler(
            make_config(**self.plan.settings),
            make_geometry(self.plan.num_blocks),
            self.log,
            COSTS,
        )
        self.scheduler: InstanceScheduler = self.recording._inner
        self.executor: ChecksumExecutor = make_executor(
            self.plan.num_blocks,
            max_num_rows=self.plan.settings["max_num_running"],
            fault=self.plan.fault,
            cost=SLOWER,
            clock=lambda: 0.0,
            sleep=lambda _: None,
        )
        self.to_arrive = list(self.plan.specs)
        self.outcome = Outcome()
        self.in_flight: dict[int, set[int]] = {}  # steps, and the blocks that each touches

    def play(self) -> Outcome:
        outcome = self.outcome
        while len(outcome.finished) < len(self.plan.specs):
            now = float(outcome.num_steps)
            self._disturb(now)
            while len(self.in_flight) < self.plan.depth and self._submit(now):
                self._disturb(now)  # arrivals and aborts that meet a step in flight
            if self.in_flight:
                self._complete()
            elif self.scheduler.has_work:
                raise AssertionError("requests are alive, but nothing is planned")
            outcome.num_steps += 1
            assert outcome.num_steps < 5000, "livelock"
        while self.in_flight:  # steps that compute surplus tokens only
            self._complete()
        assert self.scheduler.plan_step(0.0) is None
        self.scheduler.check_idle()
        outcome.num_preemptions = self.scheduler.view().num_preemptions
        outcome.num_copies = self.scheduler.view().kv.num_copied_blocks
        outcome.log_hash = hashlib.sha256(self.log.getvalue()).hexdigest()
        return outcome

    def _submit(self, now: float) -> bool:
        queue = Queue(self.scheduler)
        plan = self.recording.plan_step(now)
        queue.check_plan()
        if plan is None:
            return False
        self.executor.submit(plan)
        self.in_flight[plan.step_id] = touched_blocks(self.scheduler, plan)
        self._check()
        return True

    def _complete(self) -> None:
        result = self.executor.poll()
        assert result.step_id == next(iter(self.in_flight))
        for event in self.recording.complete_step(result):
            self._take(event)
        del self.in_flight[result.step_id]
        self._check()

    def _check(self) -> None:
        check_blocks(self.scheduler, self.in_flight)
        check_requests(self.scheduler)

    def _disturb(self, now: float) -> None:
        rng = self.plan.rng
        while self.to_arrive and rng.random() < 0.5:
            spec = self.to_arrive[0]
            given = self.plan.given.get(spec.request_id, [])
            rejected = self.recording.add(spec, now, given)
            if rejected is not None:
                self._check_full(rejected)
                break  # its client tries again
            self.to_arrive.pop(0)
            self.outcome.num_resumed += bool(given)
            if given:
                self.outcome.tokens[spec.request_id] = list(given)
        if rng.random() < 0.01:
            victim = rng.choice(self.plan.specs).request_id
            shown = rng.choice([None, len(self.outcome.tokens.get(victim, []))])
            event = self.recording.abort(victim, shown)
            if event is not None:
                self._take(event)

    def _check_full(self, rejected: RejectedEvent) -> None:
        view, settings = self.scheduler.view(), self.plan.settings
        assert rejected.reason is RejectReason.QUEUE_FULL
        num_alive = view.num_running + view.num_waiting
        assert num_alive == settings["max_num_running"] + settings["max_num_waiting"]
        self.outcome.num_rejections += 1

    def _take(self, event) -> None:
        outcome, request_id = self.outcome, event.request_id
        assert request_id not in outcome.finished, "an event after the end"
        match event:
            case StartedEvent():
                assert request_id not in outcome.cached, "it started twice"
                outcome.cached[request_id] = event.num_cached_tokens
            case PromptLogprobs():
                assert event.start == outcome.num_scored.get(request_id, 0) + 1
                outcome.num_scored[request_id] = event.start + len(event.positions) - 1
            case TokenEvent():
                assert request_id in outcome.cached, "a token before the start"
                tokens = outcome.tokens.setdefault(request_id, [])
                assert event.output_index == len(tokens), "a token is missing or repeated"
                tokens.append(event.token_id)
            case FinishedEvent():
                outcome.finished[request_id] = event.reason


def check_law(seed: int) -> Outcome:
    player = Player(seed)
    outcome = player.play()
    for spec in player.plan.specs:
        request_id = spec.request_id
        expected, reason = tokens_alone(spec)
        got = outcome.tokens.get(request_id, [])
        match outcome.finished[request_id]:
            case FinishReason.ABORT:
                assert got == expected[: len(got)], f"seed {seed}: {request_id} before its abort"
            case FinishReason.ERROR:
                assert request_id in player.plan.faults, f"seed {seed}: {request_id} is innocent"
                assert got == expected[: len(got)], f"seed {seed}: {request_id} before its error"
            case finished:
                assert got == expected, f"seed {seed}: {request_id}"
                assert finished is reason
                if spec.params.prompt_logprobs is not None:
                    num_scored = outcome.num_scored.get(request_id, 0)
                    assert num_scored == len(spec.prompt_token_ids) - 1
    _check_cached(player)
    return outcome


def _check_cached(player: Player) -> None:
    """A prefix is found only where another request of the same tenant and salt had it."""
    for request_id, num_cached in player.outcome.cached.items():
        spec = next(spec for spec in player.plan.specs if spec.request_id == request_id)
        others = [
            other.prompt_token_ids + tuple(player.outcome.tokens.get(other.request_id, ()))
            for other in player.plan.specs
            if other is not spec
            and (other.tenant, other.cache_salt) == (spec.tenant, spec.cache_salt)
        ]
        # A request that was preempted before its first token may find what it computed itself.
        num_shared = max((_common(spec.prompt_token_ids, other) for other in others), default=0)
        is_resumed = bool(player.plan.given.get(request_id))  # else its last token is computed
        assert num_cached <= max(0, min(num_shared, len(spec.prompt_token_ids) - 1 + is_resumed))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    num = 0
    while num < min(len(a), len(b)) and a[num] == b[num]:
        num += 1
    return num
