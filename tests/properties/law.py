"""Drives a scheduler and a checksum executor through one random schedule and checks the law.

The law: each request's tokens are those of running it alone. After every step the blocks are
conserved: each is free or in exactly one table, and free runs are maximal.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import FinishedEvent, FinishReason, RequestId, RequestSpec, TokenEvent
from tests.factories import BLOCK_SIZE, VOCAB_SIZE, make_executor, make_scheduler, make_spec


@dataclass
class Outcome:
    """What the clients of a schedule saw."""

    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    finished: dict[RequestId, FinishReason] = field(default_factory=dict)
    num_preemptions: int = 0
    num_steps: int = 0


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


def check_blocks(scheduler: InstanceScheduler) -> None:
    kv = scheduler.kv
    waiting_tokens = sum(request.num_tokens for request in scheduler._waiting)
    assert scheduler.view().num_waiting_tokens == waiting_tokens
    owner = [0] * kv.geometry.num_blocks
    for groups in (*kv.tables().values(), kv.retired()):
        for group in groups:
            for block in range(group.start, group.end):
                owner[block] += 1
    previous_end = -1
    for run in kv.free_runs():
        assert run.start > previous_end, "free runs touch or overlap"
        previous_end = run.end
        for block in range(run.start, run.end):
            owner[block] += 1
    assert owner == [1] * len(owner), "a block is lost or owned twice"
    assert kv.num_free_blocks == sum(run.num_blocks for run in kv.free_runs())


def random_specs(rng: random.Random, num_blocks: int) -> list[RequestSpec]:
    capacity = num_blocks * BLOCK_SIZE
    specs = []
    for index in range(rng.randint(1, 12)):
        num_prompt = rng.randint(1, min(20, capacity - 1))
        specs.append(
            make_spec(
                f"r{index}",
                prompt=[rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)],
                max_tokens=rng.randint(1, min(60, capacity - num_prompt + 1)),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(2**63),
                choice=rng.randrange(3),
                stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.randint(0, 4))),
            )
        )
    return specs


def run_schedule(seed: int) -> tuple[Outcome, list[RequestSpec]]:
    """Play one schedule: arrivals and aborts at random moments, tiny pools, any chunk budget."""
    rng = random.Random(seed)
    num_blocks = rng.randint(3, 12)
    max_num_running = rng.randint(1, 8)
    depth = rng.randint(1, 2)
    scheduler = make_scheduler(
        num_blocks,
        max_num_running=max_num_running,
        max_num_batched_tokens=rng.randint(max_num_running, 32),
    )
    executor = make_executor(num_blocks, max_num_rows=max_num_running)
    specs = random_specs(rng, num_blocks)
    to_arrive, outcome, in_flight = list(specs), Outcome(), 0

    def take(events) -> None:
        for event in events:
            assert event.request_id not in outcome.finished, "an event after the end"
            if isinstance(event, TokenEvent):
                tokens = outcome.tokens.setdefault(event.request_id, [])
                assert event.output_index == len(tokens), "a token is missing or repeated"
                tokens.append(event.token_id)
            elif isinstance(event, FinishedEvent):
                outcome.finished[event.request_id] = event.reason

    def disturb(now: float) -> None:
        while to_arrive and rng.random() < 0.5:
            assert scheduler.add(to_arrive.pop(0), now) is None
        if rng.random() < 0.01:
            victim = rng.choice(specs).request_id
            take(event for event in [scheduler.abort(victim)] if event)

    while len(outcome.finished) < len(specs):
        now = float(outcome.num_steps)
        disturb(now)
        while in_flight < depth and (plan := scheduler.plan_step(now)) is not None:
            executor.submit(plan)
            in_flight += 1
            check_blocks(scheduler)
            disturb(now)  # arrivals and aborts that meet a step in flight
        if in_flight:
            take(scheduler.complete_step(executor.poll()))
            in_flight -= 1
            check_blocks(scheduler)
        elif scheduler.has_work:
            raise AssertionError("requests are alive, but nothing is planned")
        outcome.num_steps += 1
        assert outcome.num_steps < 5000, "livelock"
    while in_flight:  # steps that compute surplus tokens only
        take(scheduler.complete_step(executor.poll()))
        in_flight -= 1
    assert scheduler.kv.num_free_blocks == num_blocks, "blocks are held by nobody"
    outcome.num_preemptions = scheduler.view().num_preemptions
    return outcome, specs


def check_law(seed: int) -> Outcome:
    outcome, specs = run_schedule(seed)
    for spec in specs:
        expected, reason = solo(spec)
        got = outcome.tokens.get(spec.request_id, [])
        if outcome.finished[spec.request_id] is FinishReason.ABORT:
            assert got == expected[: len(got)], f"seed {seed}: {spec.request_id} before its abort"
        else:
            assert got == expected, f"seed {seed}: {spec.request_id}"
            assert outcome.finished[spec.request_id] is reason
    return outcome
