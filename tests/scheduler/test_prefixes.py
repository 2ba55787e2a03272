"""Shared prefixes by example: what is found, what is copied, what nobody may find any more."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from scheduler.instance.plan import BlockCopy, Failure, SampledToken, StepResult
from scheduler.kv.prefix import next_key, root_key
from scheduler.types import FinishReason, RequestId
from tests.factories import make_executor, make_scheduler, make_spec

PROMPT = (1, 2, 3, 4, 5, 6)  # a block of 4 tokens, and half of another


def step(scheduler, failed=(), **tokens):
    """Plan a step and complete it with these tokens and failures; return the plan."""
    plan = scheduler.plan_step(0.0)
    sampled = tuple(SampledToken(RequestId(name), token) for name, token in tokens.items())
    failures = tuple(Failure(RequestId(name), "a bad row") for name in failed)
    scheduler.complete_step(StepResult(step_id=plan.step_id, sampled=sampled, failures=failures))
    return plan


def num_found(scheduler, prompt):
    """Return how many tokens of the prompt a new request finds computed."""
    scheduler.add(make_spec("probe", prompt, max_tokens=1), 0.0)
    (join,) = scheduler.plan_step(0.0).joins
    return join.num_computed_tokens


def test_n_choices_compute_their_prompt_once():
    scheduler, executor = make_scheduler(), make_executor()
    for choice in range(4):
        spec = make_spec(f"r{choice}", range(1, 13), max_tokens=2, temperature=1.0, choice=choice)
        scheduler.add(spec, 0.0)
    while plan := scheduler.plan_step(0.0):
        executor.submit(plan)
        scheduler.complete_step(executor.poll())
    view = scheduler.view()
    assert view.num_computed_tokens == 12 + 3 * 1 + 4, "the prompt, its last token again, decodes"
    assert view.kv.num_copied_blocks == 3


def test_a_prompt_shorter_than_a_block_is_found_by_its_own_tenant_alone():
    for owner, num_copied in ({}, 2), ({"tenant": "other"}, 0), ({"cache_salt": "other"}, 0):
        scheduler = make_scheduler()
        scheduler.add(make_spec("a", PROMPT[:3]), 0.0)
        step(scheduler, a=7)
        scheduler.add(replace(make_spec("b", PROMPT[:3]), **owner), 0.0)
        plan = scheduler.plan_step(0.0)
        assert [copy.num_tokens for copy in plan.copies] == [num_copied] * bool(num_copied), owner


def test_of_a_block_that_others_fill_the_shared_tokens_are_copied_and_no_more():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a", PROMPT), 0.0)
    (a,) = step(scheduler, a=7).joins
    scheduler.add(make_spec("b", PROMPT), 0.0)
    plan = scheduler.plan_step(0.0)
    (b,) = plan.joins
    assert b.num_computed_tokens == 5, "the logits of the last one are to be had"
    assert b.groups[0].start == a.groups[0].start, "the first block is shared"
    assert plan.copies == (BlockCopy(a.groups[0].start + 1, b.groups[1].start, 1),)


def test_what_a_failing_neighbour_writes_behind_the_shared_tokens_is_not_copied():
    def fault(request_id, positions):
        return "nan" if request_id == "a" and len(PROMPT) in positions else None

    scheduler, executor = make_scheduler(), make_executor(fault=fault)
    scheduler.add(make_spec("a", PROMPT), 0.0)
    executor.submit(scheduler.plan_step(0.0))
    scheduler.complete_step(executor.poll())
    executor.submit(scheduler.plan_step(0.0))  # a fails in this one, which nobody knows yet
    scheduler.add(make_spec("b", PROMPT, max_tokens=3), 0.0)
    executor.submit(scheduler.plan_step(0.0))
    ends = {}
    for _ in range(4):
        for event in scheduler.complete_step(executor.poll()):
            if hasattr(event, "reason"):
                ends[event.request_id] = event.reason
        plan = scheduler.plan_step(0.0)
        if plan is not None:
            executor.submit(plan)
    assert ends == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}


def test_what_was_computed_behind_the_tokens_shown_is_found_by_nobody():
    tokens = (*PROMPT, 7, 8, 9)
    for num_shown, expected in ((1, 4), (2, 8)):
        scheduler = make_scheduler()
        scheduler.add(make_spec("a", PROMPT), 0.0)
        for token in (7, 8, 9):
            step(scheduler, a=token)
        scheduler.abort(RequestId("a"), num_shown)
        assert num_found(scheduler, (*tokens, 1)) == expected


def test_a_block_that_a_failed_request_touched_is_found_by_nobody_though_its_owner_goes_on():
    scheduler = make_scheduler()
    scheduler.add(make_spec("a", PROMPT), 0.0)
    step(scheduler, a=7)
    scheduler.add(make_spec("b", PROMPT), 0.0)
    step(scheduler, failed=["b"], a=8)  # b copies from a's second block, and fails
    step(scheduler, a=9)  # which a fills
    step(scheduler, a=10)
    scheduler.add(make_spec("c", (*PROMPT[:4], 11)), 0.0)
    step(scheduler, a=12, c=13)  # computes the first block anew, and that may be found
    assert num_found(scheduler, (*PROMPT, 7, 8, 9)) == 4


def test_no_two_owners_have_the_same_root_and_no_two_histories_the_same_key():
    owners = [("m", "a", "b"), ("m", "ab", ""), ("m", "", "ab"), ("ma", "", "b"), ("m", "b", "a")]
    roots = [root_key(*owner) for owner in owners]
    for a, b in combinations([*roots, *(next_key(root, (1, 2)) for root in roots)], 2):
        assert a != b


def test_tenants_and_salts_find_their_own_only():
    scheduler = make_scheduler()
    spec = make_spec("a", PROMPT, max_tokens=1)
    scheduler.add(spec, 0.0)
    step(scheduler, a=7)
    for other in (replace(spec, tenant="other"), replace(spec, cache_salt="other"), spec):
        scheduler.add(other, 0.0)
        (join,) = step(scheduler, a=7).joins
        assert join.num_computed_tokens == (5 if other is spec else 0)
