"""What requests share and what they take from each other, by example."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.instance.batching import waiting_order
from scheduler.instance.plan import BlockCopy, Chunk, Failure, SampledToken, StepResult
from scheduler.instance.preemption import newest
from scheduler.kv.blocks import BlockGroup
from scheduler.request import InvariantError, Request
from scheduler.types import FinishedEvent, FinishReason, RequestId, StartedEvent, TokenEvent
from tests.factories import make_scheduler, make_spec
from tests.properties.invariants import blocks_of

PROMPT = tuple(range(10))  # two blocks of 4 and half of a third


def add(scheduler, name, prompt=PROMPT, max_tokens=8, now=0.0, params=None, **fields):
    spec = replace(make_spec(name, prompt, max_tokens, **(params or {})), **fields)
    assert scheduler.add(spec, now) is None


def finish(scheduler, plan, failed=(), **tokens):
    """Return the events of a step that sampled these tokens, and in which these failed."""
    result = StepResult(
        step_id=plan.step_id,
        sampled=tuple(SampledToken(RequestId(name), token) for name, token in tokens.items()),
        failures=tuple(Failure(RequestId(name), "broken") for name in failed),
    )
    return scheduler.complete_step(result)


def step(scheduler, **tokens):
    """Plan a step that samples these tokens, complete it, and return the plan."""
    plan = scheduler.plan_step(0.0)
    finish(scheduler, plan, **tokens)
    return plan


def joined(plan):
    """Return who joins, and with how many computed tokens."""
    return {join.request_id: join.num_computed_tokens for join in plan.joins}


# --- prefixes ---


def test_choices_of_one_prompt_compute_it_once():
    scheduler = make_scheduler()
    for choice, name in enumerate("abc"):
        add(scheduler, name, params={"choice": choice})
    plan = step(scheduler, a=1)
    assert (joined(plan), plan.chunks) == ({"a": 0}, (Chunk("a", 10),))
    plan = step(scheduler, a=1, b=2, c=3)
    assert joined(plan) == {"b": 9, "c": 9}, "all but the last token, whose logits each one needs"
    assert plan.chunks == ()
    tables = [blocks_of(join.groups) for join in plan.joins]
    assert [table[:2] for table in tables] == [[0, 1], [0, 1]]
    assert plan.copies == tuple(BlockCopy(2, table[2], 1) for table in tables)
    assert len({2, tables[0][2], tables[1][2]}) == 3, "each writes into a block of its own"


def test_all_who_wait_for_a_prefix_proceed_in_the_same_step():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    shared = range(12)
    for index, name in enumerate("abcdef"):
        add(scheduler, name, (*shared, 90 + index))
    assert joined(step(scheduler)) == {"a": 0}
    assert joined(step(scheduler, a=1)) == {}, "b to f wait for the third block"
    plan = step(scheduler, a=1, b=1, c=1, d=1, e=1, f=1)
    assert joined(plan) == dict.fromkeys("bcdef", 12)


def test_those_who_wait_for_a_prefix_are_counted_apart():
    scheduler = make_scheduler(max_num_running=2)
    for name in "abc":
        add(scheduler, name)
    for name in "xyz":
        add(scheduler, name, prompt=(90, ord(name)))

    def waiting():
        view = scheduler.view()
        return view.num_waiting, view.num_deferred

    assert waiting() == (6, 0)
    plan = scheduler.plan_step(0.0)
    assert set(joined(plan)) == {"a", "x"}
    assert waiting() == (4, 2), "b and c for the prefix, y and z for a place"
    scheduler.abort(RequestId("c"))
    assert waiting() == (3, 1)
    finish(scheduler, plan, a=1, x=1)
    assert waiting() == (3, 0), "the prefix is there"


def test_those_who_wait_go_on_without_one_that_ends():
    scheduler = make_scheduler()
    for name in "abc":
        add(scheduler, name)
    plan = scheduler.plan_step(0.0)
    scheduler.abort(RequestId("a"))
    finish(scheduler, plan, a=1)
    assert joined(step(scheduler, b=1)) == {"b": 0}
    assert joined(step(scheduler, b=1, c=1)) == {"c": 9}


@pytest.mark.parametrize(("rank", "found"), [(1, {}), (0, {"late": 4})])
def test_one_waits_for_an_equal_and_not_for_a_request_of_a_lower_rank(rank, found):
    scheduler = make_scheduler(policy="priority", max_num_running=4, max_num_batched_tokens=4)
    add(scheduler, "low", priority=1)
    step(scheduler)
    add(scheduler, "late", priority=rank)
    assert joined(scheduler.plan_step(0.0)) == found


@pytest.mark.parametrize("fields", [{"tenant": "other"}, {"cache_salt": "other"}])
def test_another_tenant_or_salt_neither_finds_a_prefix_nor_waits_for_it(fields):
    scheduler = make_scheduler(max_num_batched_tokens=30)
    add(scheduler, "a")
    add(scheduler, "b", **fields)
    assert joined(step(scheduler, a=1, b=1)) == {"a": 0, "b": 0}
    add(scheduler, "c", **fields)
    add(scheduler, "d", tenant="third")
    assert joined(step(scheduler, a=1, b=1, c=1, d=1)) == {"c": 9, "d": 0}


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make_scheduler(max_num_batched_tokens=30, prefix_caching=False)
    add(scheduler, "a")
    add(scheduler, "b")
    assert joined(step(scheduler, a=1, b=1)) == {"a": 0, "b": 0}


def test_one_that_wants_logprobs_of_its_prompt_computes_all_of_it():
    scheduler = make_scheduler()
    add(scheduler, "a")
    step(scheduler, a=1)
    add(scheduler, "b", params={"prompt_logprobs": 1})
    assert joined(scheduler.plan_step(0.0)) == {"b": 0}


def test_what_a_failed_request_computed_is_not_found_and_is_cleared_before_it_is_used():
    scheduler = make_scheduler(num_blocks=5)
    add(scheduler, "a")
    step(scheduler, a=1)
    plan = scheduler.plan_step(0.0)
    events = finish(scheduler, plan, failed="a")
    assert events == [FinishedEvent("a", FinishReason.ERROR, 0, "broken")]
    add(scheduler, "b")
    plan = scheduler.plan_step(0.0)
    assert joined(plan) == {"b": 0}
    assert plan.clears == (BlockGroup(0, 3),)
    finish(scheduler, plan, b=1)
    assert scheduler.plan_step(0.0).clears == ()


def test_blocks_of_a_failed_request_are_cleared_when_no_step_in_flight_touches_them():
    scheduler = make_scheduler()
    add(scheduler, "a")
    first, ahead = scheduler.plan_step(0.0), scheduler.plan_step(0.0)
    finish(scheduler, first, failed="a")
    add(scheduler, "b")
    plan = scheduler.plan_step(0.0)
    assert (joined(plan), plan.clears) == ({"b": 0}, ())
    assert not {0, 1, 2} & set(blocks_of(plan.joins[0].groups))
    finish(scheduler, ahead)
    finish(scheduler, plan, b=1)
    assert scheduler.plan_step(0.0).clears == (BlockGroup(0, 3),)


def test_a_shared_block_of_a_failed_request_is_cleared_when_its_last_holder_has_ended():
    scheduler = make_scheduler()
    add(scheduler, "a")
    step(scheduler, a=1)
    add(scheduler, "b")
    step(scheduler, a=1, b=1)
    finish(scheduler, scheduler.plan_step(0.0), failed="a", b=1)
    assert blocks_of(step(scheduler, b=1).clears) == [2], "b holds the other two"
    scheduler.abort(RequestId("b"))
    add(scheduler, "c")
    plan = scheduler.plan_step(0.0)
    assert joined(plan) == {"c": 0}
    assert set(blocks_of(plan.clears)) >= {0, 1}


@pytest.mark.parametrize(
    ("num_shown", "num_found"), [(None, 16), (8, 16), (5, 12), (2, 12), (1, 8)]
)
def test_what_an_aborted_request_computed_beyond_what_was_shown_is_not_found(num_shown, num_found):
    scheduler = make_scheduler()
    add(scheduler, "a", max_tokens=20)
    for token in range(20, 28):
        step(scheduler, a=token)
    scheduler.abort(RequestId("a"), num_shown)
    add(scheduler, "b", (*PROMPT, *range(20, 28)))
    assert joined(scheduler.plan_step(0.0)) == {"b": num_found}


def test_a_block_that_a_surplus_token_filled_is_not_found():
    scheduler = make_scheduler()
    add(scheduler, "a", (1, 2, 3), params={"stop_token_ids": (9,)})
    first, ahead = scheduler.plan_step(0.0), scheduler.plan_step(0.0)
    assert finish(scheduler, first, a=9)[-1] == FinishedEvent("a", FinishReason.STOP)
    assert finish(scheduler, ahead, a=5) == []
    add(scheduler, "b", (1, 2, 3, 9, 5))
    assert joined(step(scheduler, b=1)) == {"b": 0}
    add(scheduler, "c", (1, 2, 3))
    assert joined(scheduler.plan_step(0.0)) == {"c": 2}, "but the prompt is"


def test_a_request_starts_once_and_says_what_of_its_prompt_was_found():
    scheduler = make_scheduler(policy="priority", max_num_running=1)
    add(scheduler, "a", max_tokens=1, now=1.0)
    events = finish(scheduler, scheduler.plan_step(3.0), a=7)
    assert events[:2] == [StartedEvent("a", 2.0, 0), TokenEvent("a", 0, 7)]
    add(scheduler, "b", now=3.0, priority=1)
    events = finish(scheduler, scheduler.plan_step(4.5), b=7)
    assert events == [StartedEvent("b", 1.5, 9), TokenEvent("b", 0, 7)]
    add(scheduler, "c", (50,), max_tokens=1)
    finish(scheduler, scheduler.plan_step(5.0), c=1)
    plan = scheduler.plan_step(6.0)
    assert joined(plan) == {"b": 8}, "it was preempted, and finds what it had computed"
    assert finish(scheduler, plan, b=8) == [TokenEvent("b", 1, 8)]


# --- who gives way ---


def test_a_preempted_request_waits_before_peers_that_never_ran():
    peer, preempted, urgent = (Request(make_spec(), ordinal, 0.0) for ordinal in range(3))
    preempted.num_preemptions = 1
    urgent.rank = -1
    assert sorted([peer, preempted, urgent], key=waiting_order) == [urgent, preempted, peer]


def test_a_preempted_request_returns_before_a_peer_that_came_earlier_and_never_ran():
    scheduler = make_scheduler(policy="priority", max_num_running=2, max_num_batched_tokens=8)
    add(scheduler, "leader", range(20))
    add(scheduler, "peer", range(20), priority=1)
    add(scheduler, "victim", (50, 51), priority=1)
    assert [joined(step(scheduler)) for _ in range(2)] == [{"leader": 0}, {}]
    plan = step(scheduler, leader=1, victim=1)
    assert joined(plan) == {"victim": 0}, "the peer waits for the prefix of the leader"
    add(scheduler, "urgent", (60,), max_tokens=1)
    plan = step(scheduler, leader=1, urgent=1)
    assert (plan.leaves, joined(plan)) == (("victim",), {"urgent": 0})
    assert set(joined(step(scheduler, leader=1, victim=1))) == {"victim"}
    assert scheduler.view().num_waiting == 1


def preempt_once(scheduler):
    """Let request b, of 12 tokens in the end, run and give way to a, which has ended then."""
    add(scheduler, "b", (1, 2, 3, 4, 5), max_tokens=8, priority=1)
    step(scheduler, b=10)
    add(scheduler, "a", (50,), max_tokens=1)
    plan = step(scheduler, a=1)
    assert plan.leaves == ("b",)


def test_one_that_was_preempted_too_often_gets_all_its_blocks_and_runs_to_completion():
    scheduler = make_scheduler(
        num_blocks=8, policy="priority", max_num_running=1, max_num_preemptions=1
    )
    preempt_once(scheduler)
    plan = step(scheduler, b=11)
    assert len(blocks_of(plan.joins[0].groups)) == 3, "12 tokens of 4 to a block"
    add(scheduler, "a", (50,), max_tokens=1)
    for token in range(12, 18):
        plan = scheduler.plan_step(0.0)
        assert (joined(plan), plan.appends) == ({}, ())
        events = finish(scheduler, plan, b=token)
    assert events[-1] == FinishedEvent("b", FinishReason.LENGTH, 1)
    assert set(joined(scheduler.plan_step(0.0))) == {"a"}


def test_below_the_cap_a_preempted_request_gets_blocks_for_what_it_knows():
    scheduler = make_scheduler(num_blocks=8, policy="priority", max_num_running=1)
    preempt_once(scheduler)
    plan = step(scheduler, b=11)
    assert len(blocks_of(plan.joins[0].groups)) == 2


def test_without_preemptions_every_request_gets_all_its_blocks_at_once():
    scheduler = make_scheduler(num_blocks=4, max_num_preemptions=0)
    add(scheduler, "a", (1,), max_tokens=12)
    add(scheduler, "b", (2,), max_tokens=12)
    plan = step(scheduler, a=1)
    assert [len(blocks_of(join.groups)) for join in plan.joins] == [3]


def run_two_of_low_rank(**settings):
    scheduler = make_scheduler(policy="priority", **settings)
    add(scheduler, "a", (1, 2, 3, 4, 5), priority=1)
    add(scheduler, "b", (6, 7, 8, 9, 10), priority=1)
    assert set(joined(step(scheduler, a=1, b=1))) == {"a", "b"}
    return scheduler


def test_a_high_rank_takes_the_place_of_the_newest_of_low_rank():
    scheduler = run_two_of_low_rank(max_num_running=2)
    add(scheduler, "urgent", (50,))
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, joined(plan)) == (("b",), {"urgent": 0})
    assert scheduler.view().num_preemptions == 1


def test_a_high_rank_takes_no_more_blocks_than_it_lacks():
    # 6 blocks: a and b hold two each, urgent needs two and one for each of those who run on.
    scheduler = run_two_of_low_rank(num_blocks=6)
    add(scheduler, "urgent", (50, 51, 52, 53, 54))
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, joined(plan)) == (("b",), {"urgent": 0})


def test_nobody_gives_way_in_vain():
    # 8 blocks: urgent needs six, and one is kept for first to grow; without low, six are free.
    scheduler = make_scheduler(num_blocks=8, policy="priority", max_num_batched_tokens=40)
    add(scheduler, "first", (1, 2, 3, 4, 5), priority=0)
    add(scheduler, "low", (6, 7, 8, 9, 10), priority=2)
    step(scheduler, first=1, low=1)
    add(scheduler, "urgent", range(30, 54), priority=1)
    plan = step(scheduler, first=1, low=1)
    assert (plan.leaves, joined(plan)) == ((), {})


def test_nobody_gives_way_while_blocks_are_coming():
    # 8 blocks: two are free, urgent needs one and one for each of a and b, last gives two soon.
    scheduler = run_two_of_low_rank(num_blocks=8)
    add(scheduler, "last", (11, 12, 13, 14, 15), max_tokens=4, priority=1)
    in_flight = scheduler.plan_step(0.0)
    assert set(joined(in_flight)) == {"last"}
    scheduler.abort(RequestId("last"))
    add(scheduler, "urgent", (50,))
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, joined(plan)) == (("last",), {})
    finish(scheduler, in_flight, a=2, b=2)
    plan = scheduler.plan_step(0.0)
    assert (plan.leaves, joined(plan)) == ((), {"urgent": 0})


def test_who_lacks_blocks_gives_way_itself_before_one_that_was_preempted_too_often():
    lacking, late, capped = (Request(make_spec(), ordinal, 0.0) for ordinal in range(3))
    capped.num_preemptions = 3
    assert newest([lacking, late, capped], 3) is late
    assert newest([lacking, capped], 3) is lacking
    with pytest.raises(InvariantError, match="lacks blocks that were reserved for it"):
        newest([capped], 3)


@pytest.mark.parametrize("priority", [1, 2])
def test_nobody_gives_way_to_an_equal_or_a_lower_rank(priority):
    scheduler = run_two_of_low_rank(max_num_running=2)
    add(scheduler, "late", (50,), priority=priority)
    plan = step(scheduler, a=2, b=2)
    assert (plan.leaves, joined(plan)) == ((), {})


def test_who_is_in_the_plan_already_does_not_give_way():
    scheduler = make_scheduler(policy="priority", max_num_running=2)
    add(scheduler, "first", (1, 2), priority=0)
    add(scheduler, "low", (3, 4), priority=2)
    step(scheduler, first=1, low=1)
    for name in ("x", "y"):
        add(scheduler, name, (50,), priority=1)
    plan = step(scheduler, first=1, x=1)
    assert (plan.leaves, joined(plan)) == (("low",), {"x": 0})
    assert joined(step(scheduler, first=1, x=1)) == {}
