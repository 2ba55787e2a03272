"""The simulator: the plans of the engine on a manual clock, and times that add up."""

from __future__ import annotations

import random

import pytest

from engine.core import EngineCore
from engine.fake import ChecksumExecutor
from engine.messages import Abort, Submit
from scheduler.costs import StepCosts
from scheduler.sim import events
from scheduler.sim.instance import SimulatedInstance
from scheduler.types import FinishReason, RejectReason, RequestId
from tests.factories import VOCAB_SIZE, make_geometry, make_scheduler, make_spec
from tests.properties.law import random_specs, solo

COST = StepCosts.linear(fixed_s=0.25, token_s=0.125, request_s=0.0625, context_token_s=1 / 256)
NUM_BLOCKS = 10


def make_timeline(seed):
    """Return (time, spec or request id to abort), by time."""
    rng = random.Random(seed)
    timeline, now = [], 0.0
    for spec in random_specs(rng, NUM_BLOCKS):
        now += rng.choice([0.0, 0.5, 2.0, 40.0])
        timeline.append((now, spec))
        if rng.random() < 0.15:
            timeline.append((now + rng.uniform(0, 5), spec.request_id))
    return sorted(timeline, key=lambda item: item[0])


class Recorder:
    """An executor that writes down its plans."""

    def __init__(self, inner):
        self.inner = inner
        self.plans = []

    def submit(self, plan):
        self.plans.append(plan)
        self.inner.submit(plan)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def engine_plans(timeline, settings, depth):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    executor = Recorder(
        ChecksumExecutor(
            make_geometry(NUM_BLOCKS), max_num_rows=8, max_model_len=256, vocab_size=VOCAB_SIZE,
            cost=COST, clock=lambda: now[0], sleep=sleep,
        )
    )  # fmt: skip
    scheduler = make_scheduler(NUM_BLOCKS, **settings)
    core = EngineCore(scheduler, executor, lambda _: None, depth=depth, clock=lambda: now[0])
    todo = list(timeline)
    while todo or scheduler.has_work or core._in_flight:
        if not scheduler.has_work and not core._in_flight:
            now[0] = max(now[0], todo[0][0])
        while todo and todo[0][0] <= now[0]:
            item = todo.pop(0)[1]
            core.inbox.put(Abort(item) if isinstance(item, str) else Submit(item))
        core.turn()
    return executor.plans


@pytest.mark.parametrize("depth", [1, 2])
def test_the_simulator_plans_what_the_engine_plans(depth):
    num_preemptions = 0
    for seed in range(25):
        timeline = make_timeline(seed)
        settings = {"max_num_running": 5, "policy": "priority"}
        expected = engine_plans(timeline, settings, depth)
        plans = []
        tokens = {spec: solo(spec)[0] for _, spec in timeline if not isinstance(spec, str)}
        instance = SimulatedInstance(
            make_scheduler(NUM_BLOCKS, **settings),
            COST,
            depth=depth,
            # What is computed beyond a request's end is in no plan.
            token_source=lambda spec, index, t=tokens: (*t[spec], *[0] * 99)[index],
            on_plan=plans.append,
        )
        for at_s, item in timeline:
            event = events.Abort(item) if isinstance(item, str) else events.Arrival(item)
            instance.events.put(at_s, event)
        results = instance.run()
        assert plans == expected, f"seed {seed}"
        num_preemptions += sum(record.num_preemptions for record in results.records.values())
    assert num_preemptions > 0


def test_times_are_those_of_the_cost_table():
    cost = StepCosts.linear(fixed_s=1.0, token_s=0.5)
    instance = SimulatedInstance(make_scheduler(), cost)
    instance.events.put(10.0, events.Arrival(make_spec("a", (1, 2, 3), max_tokens=3)))
    instance.events.put(11.0, events.Arrival(make_spec("b", (4,), max_tokens=1)))
    a, b = instance.run().records.values()
    # Steps: a's three tokens (2.5 s), then a and b one each (2 s), then a alone (1.5 s).
    assert a.token_at_s == [12.5, 14.5, 16.0]
    assert b.token_at_s == [14.5]
    assert (a.ttft_s, a.tpot_s, b.tpot_s) == (2.5, 1.75, None)
    assert (a.queue_s, b.queue_s) == (0.0, 0.0)
    assert (b.ended_at_s, b.outcome) == (14.5, FinishReason.LENGTH)
    assert instance.results.num_steps == 3
    assert instance.results.end_s == 16.0


def test_refusals_and_aborts_are_results_too():
    instance = SimulatedInstance(make_scheduler(), StepCosts.linear(fixed_s=1.0))
    instance.events.put(0.0, events.Arrival(make_spec("a", range(300))))
    instance.events.put(0.0, events.Arrival(make_spec("b", max_tokens=50)))
    instance.events.put(2.5, events.Abort(RequestId("b")))
    a, b = instance.run().records.values()
    assert a.outcome is RejectReason.NEVER_FITS
    assert (b.outcome, b.ended_at_s) == (FinishReason.ABORT, 3.0)
