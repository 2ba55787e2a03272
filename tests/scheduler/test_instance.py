"""The instance scheduler by example; the law over random schedules is in tests/properties."""

from __future__ import annotations

import pytest

from scheduler.config import InstanceConfig
from scheduler.instance.batching import rank_policy
from scheduler.instance.plan import Chunk, Failure, SampledToken, StepResult
from scheduler.instance.preemption import newest
from scheduler.request import TRANSITIONS, InvariantError, Request, RequestState, Transition
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    RejectReason,
    RequestId,
    StartedEvent,
    TokenEvent,
)
from tests.factories import make_scheduler, make_spec


def finish_step(scheduler, plan, **tokens):
    """Return the events of a step that sampled these tokens, the starts left out."""
    sampled = tuple(SampledToken(RequestId(name), token) for name, token in tokens.items())
    events = scheduler.complete_step(StepResult(step_id=plan.step_id, sampled=sampled))
    return [event for event in events if not isinstance(event, StartedEvent)]


def failed(plan, *names):
    """Return the result of a step in which these requests failed."""
    failures = tuple(Failure(RequestId(name), "a bad row") for name in names)
    return StepResult(step_id=plan.step_id, sampled=(), failures=failures)


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_spec("a", range(19), max_tokens=2), 0.0)
    chunks = []
    for tokens in ({}, {}, {"a": 5}):
        plan = scheduler.plan_step(0.0)
        chunks.append(plan.chunks)
        events = finish_step(scheduler, plan, **tokens)
    assert chunks == [(Chunk("a", 8),), (Chunk("a", 8),), (Chunk("a", 3),)]
    assert events == [TokenEvent("a", 0, 5)]


def test_a_step_of_decodes_is_an_empty_plan():
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(make_spec(name, (1, 2)), 0.0)
    plan = scheduler.plan_step(0.0)
    assert [join.request_id for join in plan.joins] == ["a", "b"]
    finish_step(scheduler, plan, a=1, b=1)
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, plan.joins, plan.appends, plan.chunks) == ((), (), (), ())


def test_the_size_of_a_step_is_told_when_it_has_completed():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for name, prompt in (("a", (1, 2)), ("b", range(30))):
        scheduler.add(make_spec(name, prompt), 0.0)
    sizes = [scheduler.view().last_step]
    plans = [scheduler.plan_step(0.0), scheduler.plan_step(0.0)]  # two in flight
    for plan in plans:
        finish_step(scheduler, plan, a=1)
        sizes.append(scheduler.view().last_step)
    assert sizes == [(0, 0), (8, 2), (8, 2)]
    scheduler.abort("b")
    finish_step(scheduler, scheduler.plan_step(0.0), a=1)
    assert scheduler.view().last_step == (1, 1)


def test_decodes_come_before_a_long_prompt_in_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_spec("a", (1, 2)), 0.0)
    finish_step(scheduler, scheduler.plan_step(0.0), a=1)
    scheduler.add(make_spec("b", range(30)), 0.0)
    plan = scheduler.plan_step(0.0)
    assert plan.chunks == (Chunk("b", 7),)


def test_the_newest_is_preempted_and_comes_back_with_its_tokens():
    # 4 blocks of 4 slots: a takes its third at 9 tokens, so b finds none for its fifth token.
    scheduler = make_scheduler(num_blocks=4, max_num_running=2)
    scheduler.add(make_spec("a", range(7), max_tokens=9), 0.0)
    scheduler.add(make_spec("b", (1,), max_tokens=12), 0.0)
    for step in range(4):
        finish_step(scheduler, scheduler.plan_step(0.0), a=step, b=10 + step)
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, plan.joins) == (("b",), ())
    assert scheduler.view().num_waiting_tokens == 5
    finish_step(scheduler, plan, a=4)
    for step in range(5, 9):
        plan = scheduler.plan_step(0.0)
        assert plan.joins == (), "b must not come back while a needs the room"
        events = finish_step(scheduler, plan, a=step)
    assert events[-1] == FinishedEvent("a", FinishReason.LENGTH)
    plan = scheduler.plan_step(0.0)
    assert plan.leaves == ("a",)
    assert [join.token_ids for join in plan.joins] == [(1, 10, 11, 12, 13)]
    assert plan.chunks == (Chunk("b", 5),)
    assert finish_step(scheduler, plan, b=14) == [TokenEvent("b", 4, 14)]


def test_a_preempted_request_keeps_its_place_before_later_ones():
    scheduler = make_scheduler(num_blocks=4, max_num_running=2)
    scheduler.add(make_spec("a", range(7), max_tokens=9), 0.0)
    scheduler.add(make_spec("b", (1,), max_tokens=12), 0.0)
    scheduler.add(make_spec("c", (2,), max_tokens=2), 0.0)
    joins = []
    for step in range(30):
        plan = scheduler.plan_step(0.0)
        joins += [join.request_id for join in plan.joins]
        running = [name for name in ("a", "b", "c") if name in joins]
        if plan.leaves == ("b",):
            break
        finish_step(scheduler, plan, **dict.fromkeys(running, step))
    finish_step(scheduler, plan, a=1)
    scheduler.abort(RequestId("a"))
    assert [join.request_id for join in scheduler.plan_step(0.0).joins] == ["b", "c"]


def test_who_was_preempted_so_often_that_its_blocks_are_reserved_does_not_give_way():
    requests = [Request(make_spec(name), 0, 0.0) for name in ("a", "b", "c")]
    for request, num_preemptions in zip(requests, (0, 1, 2), strict=True):
        request.num_preemptions = num_preemptions
    a, b, c = requests
    assert newest([a, b, c], 3) is c
    assert newest([a, b, c], 2) is b
    assert newest([a, b, c], 1) is a
    with pytest.raises(InvariantError, match="a lacks blocks that were reserved for it"):
        newest([a, b, c], 0)


def test_a_newcomer_leaves_those_who_run_a_block_each_to_grow():
    scheduler = make_scheduler(num_blocks=4, prefix_caching=False)
    scheduler.add(make_spec("a", range(5), max_tokens=8), 0.0)
    finish_step(scheduler, scheduler.plan_step(0.0), a=1)
    scheduler.add(make_spec("b", range(5), max_tokens=2), 0.0)
    assert scheduler.plan_step(0.0).joins == (), "2 blocks are free, and b needs both"
    assert scheduler.view().num_waiting_tokens == 5
    scheduler.abort(RequestId("b"))
    assert scheduler.view().num_waiting_tokens == 0


def test_stop_tokens_and_length_end_a_request():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a", stop_token_ids=(9,)), 0.0)
    scheduler.add(make_spec("b", max_tokens=1, stop_token_ids=(9,)), 0.0)
    events = finish_step(scheduler, scheduler.plan_step(0.0), a=9, b=3)
    assert [(event.request_id, event.reason) for event in events[1::2]] == [
        ("a", FinishReason.STOP),
        ("b", FinishReason.LENGTH),
    ]
    assert not scheduler.has_work
    assert scheduler.plan_step(0.0) is None
    assert scheduler.view().num_free_blocks == scheduler.view().num_blocks


def test_a_stop_token_before_min_tokens_does_not_end_a_request():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a", stop_token_ids=(9,), min_tokens=2), 0.0)
    for index in range(2):
        assert finish_step(scheduler, scheduler.plan_step(0.0), a=9) == [TokenEvent("a", index, 9)]
    events = finish_step(scheduler, scheduler.plan_step(0.0), a=9)
    assert events == [TokenEvent("a", 2, 9), FinishedEvent("a", FinishReason.STOP)]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (make_spec("x", range(250), max_tokens=7), RejectReason.NEVER_FITS),  # the window
        (make_spec("x", range(60), max_tokens=6), RejectReason.NEVER_FITS),  # the pool
        (make_spec("x", (), max_tokens=1), RejectReason.NEVER_FITS),
        (make_spec("a"), RejectReason.DUPLICATE_ID),
        (make_spec("x"), RejectReason.QUEUE_FULL),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(spec, reason):
    scheduler = make_scheduler(num_blocks=16, max_num_running=1, max_num_waiting=0)
    assert scheduler.add(make_spec("a"), 0.0) is None
    assert scheduler.add(spec, 0.0) == (spec.request_id, reason)


def test_the_largest_request_that_fits_is_served():
    # 16 blocks of 4 slots: 64 computed tokens and one more that is sampled last.
    scheduler = make_scheduler(num_blocks=16)
    assert scheduler.add(make_spec("a", range(60), max_tokens=5), 0.0) is None


def test_blocks_of_an_aborted_request_return_when_its_step_completes():
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add(make_spec("a"), 0.0)
    plan = scheduler.plan_step(0.0)
    assert scheduler.abort(RequestId("a")) == FinishedEvent("a", FinishReason.ABORT)
    assert scheduler.view().num_free_blocks < 16, "a step in flight still writes there"
    assert finish_step(scheduler, plan, a=1) == [], "a token after the end"
    assert scheduler.view().num_free_blocks == 16
    assert scheduler.abort(RequestId("a")) is None


def test_an_id_that_is_used_again_gets_no_token_of_its_past_life():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a"), 0.0)
    old = scheduler.plan_step(0.0)
    scheduler.abort(RequestId("a"))
    assert scheduler.add(make_spec("a", (7, 8)), 0.0) is None
    new = scheduler.plan_step(0.0)
    assert new.leaves == ("a",)
    assert [join.token_ids for join in new.joins] == [(7, 8)]
    assert finish_step(scheduler, old, a=1) == []
    assert finish_step(scheduler, new, a=2) == [TokenEvent("a", 0, 2)]


def test_an_id_that_is_used_again_is_not_ended_by_a_failure_of_its_past_life():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a"), 0.0)
    old = scheduler.plan_step(0.0)
    scheduler.abort(RequestId("a"))
    scheduler.add(make_spec("a", (7, 8)), 0.0)
    assert scheduler.complete_step(failed(old, "a")) == []
    assert finish_step(scheduler, scheduler.plan_step(0.0), a=2) == [TokenEvent("a", 0, 2)]


def test_a_failure_after_the_end_is_not_told_but_its_blocks_are_cleared():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_spec("a", range(6)), 0.0)
    plan = scheduler.plan_step(0.0)
    (join,) = plan.joins
    scheduler.abort(RequestId("a"))
    assert scheduler.complete_step(failed(plan, "a")) == []
    assert scheduler.view().num_failures == 0
    scheduler.add(make_spec("b", range(6)), 0.0)
    assert scheduler.plan_step(0.0).clears == join.groups


def test_a_surplus_token_is_neither_shown_nor_counted():
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add(make_spec("a", stop_token_ids=(9,)), 0.0)
    first = scheduler.plan_step(0.0)
    ahead = scheduler.plan_step(0.0)
    assert (ahead.joins, ahead.chunks) == ((), ()), "it decodes ahead of the first result"
    events = finish_step(scheduler, first, a=9)
    assert events == [TokenEvent("a", 0, 9), FinishedEvent("a", FinishReason.STOP)]
    assert scheduler.view().num_free_blocks == 15, "the surplus token still writes its slot"
    assert finish_step(scheduler, ahead, a=5) == []
    assert scheduler.view().num_free_blocks == 16


def test_nothing_is_planned_beyond_the_last_token():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a", range(5), max_tokens=2), 0.0)  # its second block is not filled
    plans = [scheduler.plan_step(0.0) for _ in range(3)]
    assert plans[2] is None
    finish_step(scheduler, plans[0], a=1)
    assert scheduler.plan_step(0.0) is None
    assert finish_step(scheduler, plans[1], a=2)[-1] == FinishedEvent("a", FinishReason.LENGTH)


def test_the_dump_says_what_is_on_its_way():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_spec("a", range(10)), 0.0)
    pending = []
    for _ in range(3):
        scheduler.plan_step(0.0)
        (request,) = scheduler.state()["running"]
        pending.append((request["num_scheduled"], request["num_pending"]))
    assert pending == [(8, 0), (10, 1), (11, 2)]


def test_planning_ahead_waits_for_blocks_that_are_coming():
    # 5 blocks of 4 slots: b takes the last one in its second step, a needs it in its fifth.
    scheduler = make_scheduler(num_blocks=5, max_num_running=2, prefix_caching=False)
    scheduler.add(make_spec("a", range(9), max_tokens=8), 0.0)
    scheduler.add(make_spec("b", range(4), max_tokens=8), 0.0)
    in_flight = [scheduler.plan_step(0.0)]
    for step in range(3):
        in_flight.append(scheduler.plan_step(0.0))
        finish_step(scheduler, in_flight.pop(0), a=step, b=step)
    assert scheduler.plan_step(0.0) is None, "b gives way, but a step in flight still writes there"
    assert scheduler.view().num_preemptions == 1
    events = finish_step(scheduler, in_flight.pop(0), a=3, b=3)
    assert events == [TokenEvent("a", 3, 3)], "b's token is drawn again when b comes back"
    plan = scheduler.plan_step(0.0)
    assert set(plan.leaves) == {"a", "b"}
    assert [(join.request_id, join.num_computed_tokens) for join in plan.joins] == [("a", 12)]


def test_results_of_unknown_steps_are_broken_invariants():
    scheduler = make_scheduler()
    with pytest.raises(InvariantError, match="step 3 is not in flight"):
        scheduler.complete_step(StepResult(step_id=3, sampled=()))


def test_a_token_that_was_not_planned_is_a_broken_invariant():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_spec("a", range(19)), 0.0)
    with pytest.raises(InvariantError, match="a was to sample nothing"):
        finish_step(scheduler, scheduler.plan_step(0.0), a=1)


def test_every_transition_outside_the_table_is_a_broken_invariant():
    for state in RequestState:
        for transition in Transition:
            request = Request(make_spec(), 0, 0.0)
            request.state = state
            if (state, transition) in TRANSITIONS:
                request.move(transition)
                assert request.state is TRANSITIONS[state, transition]
            else:
                with pytest.raises(InvariantError, match=f"cannot {transition} while {state}"):
                    request.move(transition)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="must be at least max_num_running"):
        InstanceConfig(max_model_len=8, max_num_batched_tokens=4, max_num_running=5)
    with pytest.raises(ValueError, match="max_model_len must be at least 1"):
        InstanceConfig(max_model_len=0)
    with pytest.raises(ValueError, match="unknown policy 'lifo'; known policies: fcfs, priority"):
        rank_policy("lifo")
