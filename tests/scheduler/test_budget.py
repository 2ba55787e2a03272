"""How much of a prompt a step computes beside those who decode, and that the promise is kept."""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.costs import StepCosts, StepShape
from scheduler.instance.budget import Pace, StepBudget, num_fitting
from scheduler.instance.plan import StepPlan
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.sim.events import Arrival
from scheduler.sim.instance import SimulatedInstance
from scheduler.types import FinishReason, RequestId
from tests.factories import make_config, make_geometry, make_spec
from tests.scheduler.test_costs import step_costs

COSTS = StepCosts.linear(fixed_s=1.0, token_s=0.5)
SETTINGS = {"max_num_batched_tokens": 128, "max_num_running": 8}


@given(
    step_costs(), st.integers(0, 40), st.integers(0, 3000), st.integers(0, 512), st.floats(0, 50)
)
def test_what_fits_is_the_most_that_keeps_the_limit(
    costs: StepCosts, num_decodes: int, num_computed: int, most: int, limit_s: float
):
    shape = StepShape(num_decodes, num_decodes, num_decodes * 100, num_decodes * 100)
    found = num_fitting(costs, shape, num_computed, most, limit_s)
    assert 0 <= found <= most
    if found:
        assert costs.step_s(shape.with_tokens(num_computed, found)) <= limit_s
    if found < most:
        assert costs.step_s(shape.with_tokens(num_computed, found + 1)) > limit_s


def test_more_decodes_leave_less():
    shapes = [StepShape(number, number, 0, 0) for number in range(20)]
    found = [num_fitting(COSTS, shape, 0, 512, 8.0) for shape in shapes]
    assert found == [max(0, 14 - number) for number in range(20)]


def test_some_tokens_are_sure_whatever_they_take():
    budget = StepBudget(COSTS, StepShape(8, 8, 80, 80), 2.0, 16)
    assert budget.has_room(0)
    budget.enter(0)
    assert budget.room(0, 10) == 10
    assert budget.room(0, 100) == 16
    assert budget.shape.num_tokens == 8, "asking takes nothing"
    budget.take(0, 10)
    assert budget.has_room(0)
    budget.enter(0)
    assert budget.room(0, 100) == 16 - 10
    budget.take(0, 6)
    assert not budget.has_room(0)
    assert budget.room(5, 100) == 0
    assert budget.shape.num_tokens == 8 + 16


def test_the_pace_follows_slowly_and_within_bounds():
    pace = Pace()
    pace.took(1.0, 1.0)
    pace.took(0.0, 5.0)
    pace.took(1.0, 0.0)
    assert pace.factor == 1.0
    pace.took(1.0, 1.5)
    assert pace.factor == 1.0 + 0.5 / 8
    pace.took(1.0, 1.0)
    assert pace.factor == 1.0 + 0.5 / 8 * 31 / 32
    for _ in range(200):
        pace.took(1.0, 1000.0)
    assert pace.factor == pytest.approx(2.0, rel=1e-4)
    for _ in range(500):
        pace.took(1.0, 0.001)
    assert pace.factor == pytest.approx(0.5, rel=1e-4)


class Watch:
    """Reads plans as an executor does, and holds each step against the promise."""

    def __init__(self, scheduler: InstanceScheduler, costs: StepCosts) -> None:
        self.scheduler = scheduler
        self.costs = costs
        self.rows: dict[RequestId, tuple[int, int]] = {}  # tokens computed, known when it joined
        self.admissions: set[int] = set()
        self.sizes: list[int] = []

    def __call__(self, plan: StepPlan) -> None:
        before = {name: row for name, row in self.rows.items() if name not in plan.leaves}
        chunks = dict(plan.chunks)
        self.rows = dict(before)
        ran = set(before)
        for join in plan.joins:
            self.rows[join.request_id] = (join.num_computed_tokens, len(join.token_ids))
            admission = self.scheduler._queues.requests[join.request_id].admission
            if admission in self.admissions:  # it rested
                ran.add(join.request_id)
            self.admissions.add(admission)
        shape = StepShape()
        num_more = 0  # beside a token for each that ran already
        for name, (num_computed, num_known) in self.rows.items():
            num_tokens = chunks.get(name, 1)
            shape = shape.with_request(num_computed).with_tokens(num_computed, num_tokens)
            num_more += num_tokens - (name in ran)
            self.rows[name] = (num_computed + num_tokens, num_known)
        self.sizes.append(shape.num_tokens)
        if any(num_computed >= num_known for num_computed, num_known in before.values()):
            config = self.scheduler.config
            assert config.max_step_s is not None
            step_s = self.costs.step_s(shape) * self.scheduler._planner.pace.factor
            assert step_s <= config.max_step_s + 1e-9 or num_more <= config.min_prompt_tokens


def simulate(specs, *, costs=COSTS, real=None, depth=1, num_blocks=4000, **settings):
    scheduler = InstanceScheduler(
        make_config(**{"max_model_len": 2000, **SETTINGS, **settings}),
        make_geometry(num_blocks),
        costs,
    )
    watch = Watch(scheduler, costs)
    instance = SimulatedInstance(scheduler, real or costs, depth=depth, on_plan=watch)
    for at_s, spec in specs:
        instance.events.put(at_s, Arrival(spec))
    return instance.run(), watch


def test_a_long_prompt_computes_what_fits_beside_the_decodes():
    specs = [(0.0, make_spec("a", max_tokens=40)), (5.0, make_spec("b", range(400), 1))]
    _, watch = simulate(specs, max_step_s=21.0, prefix_caching=False)
    assert watch.sizes[0] == 3
    assert max(watch.sizes) == 40
    assert watch.sizes.count(40) == 400 // 39


def test_alone_it_computes_all_that_a_step_may():
    _, watch = simulate([(0.0, make_spec("b", range(400), 2))], max_step_s=21.0)
    assert watch.sizes == [128, 128, 128, 16, 1]


def test_it_goes_on_though_decoding_alone_takes_longer():
    specs = [(0.0, make_spec("a", max_tokens=40)), (5.0, make_spec("b", range(160), 1))]
    _, watch = simulate(specs, max_step_s=0.1)
    # The first step, and then beside the one that each who runs has.
    assert watch.sizes.count(1 + 16) == 1
    assert watch.sizes.count(2 + 16) == (160 - 16) // 17


@pytest.mark.parametrize("without", [{"max_step_s": None}, {"costs": None}])
def test_without_a_limit_or_costs_only_tokens_count(without):
    settings = {"max_step_s": 2.0, **without}
    costs = settings.pop("costs", COSTS)
    scheduler = InstanceScheduler(
        make_config(**{"max_model_len": 2000, **SETTINGS, **settings}), make_geometry(4000), costs
    )
    instance = SimulatedInstance(scheduler, COSTS, on_plan=(plans := []).append)
    instance.events.put(0.0, Arrival(make_spec("a", max_tokens=40)))
    instance.events.put(5.0, Arrival(make_spec("b", range(400), 1)))
    instance.run()
    assert [chunk.num_tokens for plan in plans for chunk in plan.chunks] == [3, 127, 127, 127, 19]


@given(
    seed=st.integers(0, 10**6),
    costs=step_costs(),
    slower=st.sampled_from([0.3, 1.0, 1.0, 1.7, 5.0]),
    limit_s=st.sampled_from([0.01, 1.0, 10.0, 100.0, 1000.0]),
    min_prompt_tokens=st.sampled_from([1, 5, 16]),
    depth=st.integers(1, 2),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_blocks=st.sampled_from([30, 60, 4000]),
)
def test_every_step_keeps_the_promise_and_every_request_ends(
    seed, costs, slower, limit_s, min_prompt_tokens, depth, policy, num_blocks
):
    rng = random.Random(seed)
    specs, now = [], 0.0
    draw = partial(rng.choice, [1, 3, 20, 60, 100])
    for index in range(10):
        now += rng.choice([0.0, limit_s, 5 * limit_s])
        prompt = [rng.randrange(9) for _ in range(draw())]
        specs.append((now, make_spec(f"r{index}", prompt, rng.randint(1, 20))))
    real = StepCosts(
        dense=tuple((size, slower * seconds) for size, seconds in costs.dense),
        request_s=slower * costs.request_s,
        context_token_s=slower * costs.context_token_s,
        visit_s=slower * costs.visit_s,
    )
    results, _ = simulate(
        specs, costs=costs, real=real, depth=depth, num_blocks=num_blocks,
        max_step_s=limit_s, min_prompt_tokens=min_prompt_tokens, policy=policy,
    )  # fmt: skip
    assert all(record.outcome is FinishReason.LENGTH for record in results.records.values())


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(ValueError, match="max_step_s must be more than 0"):
        make_config(max_step_s=0.0)
