"""What an instance tells of its load, and what a step costs."""

from __future__ import annotations

from scheduler.costs import StepCosts, StepShape
from tests.factories import make_scheduler, make_spec


def test_a_linear_cost_adds_up():
    cost = StepCosts.linear(fixed_s=1.0, token_s=0.5, request_s=0.25, context_token_s=0.125)
    assert cost.step_s(StepShape(4, 2, 8)) == 1.0 + 2.0 + 0.5 + 1.0


def test_a_view_tells_the_load():
    scheduler = make_scheduler(num_blocks=4, max_num_running=1)
    scheduler.add(make_spec("a", range(8), max_tokens=2), 0.0)
    scheduler.add(make_spec("b", range(5), max_tokens=2), 0.0)
    scheduler.plan_step(0.0)
    view = scheduler.view()
    assert (view.num_running, view.num_waiting, view.num_waiting_tokens) == (1, 1, 5)
    assert view.kv_usage == 0.5
    assert view.num_head_blocks == 2, "five tokens take two blocks of four"


def test_a_view_counts_all_that_was_given_what_was_refused_too():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_spec("a"), 0.0)
    scheduler.add(make_spec("a"), 0.0)
    scheduler.add(make_spec("b", range(400)), 0.0)
    assert scheduler.view().num_given == 3
