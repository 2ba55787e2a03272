"""Whole plans: determinism, what each setting does, and that blocks become shared prose."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from loadgen.types import LoadError
from loadgen.workload.build import WorkloadSpec, build, build_plan
from loadgen.workload.corpus import default_text
from loadgen.workload.plan_file import write_plan
from loadgen.workload.reuse import lru_reuse, unbounded_reuse
from loadgen.workload.traces import Slice, cut_trace, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 + second},{second + 1}\n" for second in range(40)
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_bytes(default_text()[:30_000].encode("ascii", "ignore"))
    return path


@pytest.fixture
def spec(text):
    return WorkloadSpec(seed=3, num_sessions=30, rate=4.0, tokenizer="bytes", text=text)


@pytest.fixture
def mooncake(tmp_path):
    """Three users; each request is the one before of the same user and more."""
    rows = []
    for number in range(24):
        user, turn = number % 3, number // 3
        num_tokens = 512 * (turn + 1) + 100
        ids = [1000 * user + place for place in range(turn + 1)] + [10_000 + number]
        rows.append({"timestamp": 500 * number, "input_length": num_tokens, "output_length": 32})
        rows[-1]["hash_ids"] = ids
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first_turns(plan):
    return [session.turns[0] for session in plan]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"turns": "uniform:1-3", "think": "exp:2", "next_prompt_tokens": "20"},
        {"prefix_tokens": 50, "num_prefixes": 2, "tenants": ("a:1", "flood:b@1+2x3")},
        {"token_ids": True},
        {"tokenizer": None},
        {"token_ids": True, "tokenizer": None, "vocab_size": 100},
    ],
)
def test_the_same_spec_gives_the_same_plan_and_another_seed_another(spec, changes):
    spec = replace(spec, **changes)
    plan = build_plan(spec)
    assert plan == build_plan(spec)
    other = build_plan(replace(spec, seed=4))
    assert [it.start_at_s for it in other] != [it.start_at_s for it in plan]
    assert not {it.prompt for it in first_turns(other)} & {it.prompt for it in first_turns(plan)}


def test_values_are_plain_python(spec):
    session = build_plan(replace(spec, token_ids=True, tenants=("a:1:2",)))[3]
    turn = session.turns[0]
    assert type(session.start_at_s) is float
    assert {type(it) for it in (turn.max_tokens, turn.num_prompt_tokens, *turn.prompt)} == {int}


def test_prompts_have_their_lengths_and_sessions_their_order(spec):
    spec = replace(spec, prompt_tokens="uniform:40-60", output_tokens="7", tenants=("a:1", "b:3:5"))
    plan = build_plan(spec)
    turns = first_turns(plan)
    assert all(len(it.prompt) == it.num_prompt_tokens for it in turns)
    assert len({it.num_prompt_tokens for it in turns}) > 10
    assert all(40 <= it.num_prompt_tokens <= 60 for it in turns)
    assert {it.max_tokens for it in turns} == {7}
    assert [it.start_at_s for it in plan] == sorted(it.start_at_s for it in plan)
    assert {(it.tenant, it.priority) for it in plan} == {("a", None), ("b", 5)}


def test_one_setting_changes_one_thing(spec):
    turns = first_turns(build_plan(spec))
    plan = build_plan(replace(spec, output_tokens="uniform:1-9", tenants=("a:1", "b:1")))
    assert [it.prompt for it in first_turns(plan)] == [it.prompt for it in turns]
    assert [it.start_at_s for it in plan] == [it.start_at_s for it in build_plan(spec)]


def test_conversations_carry_only_what_the_user_says(spec):
    spec = replace(spec, turns="3", next_prompt_tokens="20", think="1.5", prefix_tokens=64)
    for session in build_plan(spec):
        assert [it.num_prompt_tokens for it in session.turns] == [320, 20, 20]
        assert [len(it.prompt) for it in session.turns] == [320, 20, 20]
        assert [it.think_s for it in session.turns] == [0.0, 1.5, 1.5]


def test_prefixes_are_shared(spec):
    spec = replace(spec, prefix_tokens=64, num_prefixes=3, prompt_tokens="30", num_sessions=60)
    prompts = [it.prompt for it in first_turns(build_plan(spec))]
    assert {len(it) for it in prompts} == {94}
    assert len({it[:64] for it in prompts}) == 3
    assert len(set(prompts)) == 60


def test_a_flood_comes_on_top_and_shares_the_prefixes(spec):
    calm = replace(spec, tenants=("a:1", "b:1:7"), prefix_tokens=20)
    flooded = replace(calm, tenants=(*calm.tenants, "flood:b@2+1.5x8", "flood:new@0+1x2"))
    before, after = build_plan(calm), build_plan(flooded)
    added = [it for it in after if it not in before]
    assert len(after) == len(before) + 14
    assert sorted(before, key=after.index) == list(before)
    assert [it.start_at_s for it in after] == sorted(it.start_at_s for it in after)
    floods = [it for it in added if it.tenant == "b"]
    assert [it.start_at_s for it in floods] == [2 + number / 8 for number in range(12)]
    assert {it.priority for it in floods} == {7}
    assert Counter(it.tenant for it in added) == {"b": 12, "new": 2}
    assert len({it.prompt[:20] for it in first_turns(after)}) == 1
    assert len({it.prompt for it in first_turns(after)}) == len(after)


def test_what_is_too_long_is_shortened_and_reported(spec):
    spec = replace(spec, prompt_tokens="uniform:80-120", output_tokens="10", prefix_tokens=20)
    work = build(replace(spec, max_context=130))
    turns = first_turns(work.plan)
    assert max(it.num_prompt_tokens for it in turns) == 120
    assert all(len(it.prompt) == it.num_prompt_tokens for it in turns)
    num = sum(it.num_prompt_tokens > 120 for it in first_turns(build_plan(spec)))
    assert work.facts["shortened"] == f"{num} of 30, to 130 tokens"
    assert num > 5


def test_without_a_tokenizer_counts_are_unknown(spec):
    work = build(replace(spec, tokenizer=None))
    assert {it.num_prompt_tokens for it in first_turns(work.plan)} == {None}
    assert work.facts["tokenizer"] == "none, so lengths are estimates"


def test_a_trace_is_replayed(spec, tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    spec = replace(
        spec,
        trace=path,
        trace_start_s=10,
        trace_speed=2.0,
        duration_s=5,
        num_sessions=None,
        max_context=130,
        tenants=("a:1", "b:1"),
    )
    work = build(spec)
    assert [it.start_at_s for it in work.plan] == [number / 2 for number in range(10)]
    turns = first_turns(work.plan)
    assert [it.max_tokens for it in turns] == list(range(11, 21))
    assert [len(it.prompt) for it in turns] == [110, 111, 112, 113, 114, 114, 113, 112, 111, 110]
    assert work.facts["shortened"] == "5 of 10, to 130 tokens"
    assert work.facts["trace"] == f"{path}, 10 requests"
    assert {it.tenant for it in work.plan} == {"a", "b"}


def shared_chars(left, right):
    return next(
        (at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
        min(len(left), len(right)),
    )


@pytest.mark.parametrize("token_ids", [False, True])
def test_blocks_become_prose_that_is_shared_so_far_and_no_further(spec, mooncake, token_ids):
    spec = replace(spec, trace=mooncake, trace_divisor=8, num_sessions=None, token_ids=token_ids)
    trace = cut_trace(read_trace(mooncake), Slice(divisor=8))
    prompts = [it.prompt for it in first_turns(build_plan(spec))]
    assert [len(it) for it in prompts] == [it.num_prompt_tokens for it in trace.requests]
    for prompt, request in zip(prompts, trace.requests, strict=True):
        for other, other_request in zip(prompts, trace.requests, strict=True):
            if prompt is not other:
                blocks = shared_chars(request.block_ids, other_request.block_ids)
                assert 0 <= shared_chars(prompt, other) - 64 * blocks < 20


def test_a_prefix_cache_of_the_prompts_hits_what_the_trace_says(spec, mooncake):
    """A cache of 16-token blocks over the real prompts, against the reuse of the ids alone."""
    spec = replace(spec, trace=mooncake, trace_divisor=8, num_sessions=None)
    work = build(spec)
    seen: set[str] = set()
    num_hit_tokens = num_tokens = 0
    for turn in first_turns(work.plan):
        prefixes = [turn.prompt[:end] for end in range(16, len(turn.prompt) + 1, 16)]
        num_hit_tokens += 16 * sum(prefix in seen for prefix in prefixes)
        num_tokens += len(turn.prompt)
        seen.update(prefixes)
    trace = cut_trace(read_trace(mooncake), Slice(divisor=8))
    reuse = unbounded_reuse(trace.requests, trace.block_tokens)
    assert reuse.token_ratio == pytest.approx(num_hit_tokens / num_tokens, abs=0.005)
    assert work.facts["reuse"].startswith(f"{reuse.token_ratio:.2%} of {reuse.num_tokens:,} ")
    part = lru_reuse(trace.requests, trace.block_tokens, 12)
    assert part.token_ratio < reuse.token_ratio
    spec = replace(spec, cache_tokens=12 * trace.block_tokens + 1)
    assert build(spec).facts["reuse, LRU"].startswith(f"{part.token_ratio:.2%} of ")


def test_a_slice_of_a_trace_has_the_prompts_of_the_whole(spec, mooncake):
    spec = replace(spec, trace=mooncake, trace_divisor=8, num_sessions=None)
    whole = first_turns(build_plan(spec))
    part = first_turns(build_plan(replace(spec, trace_start_s=5.0)))
    assert part == whole[10:]


def test_a_recorded_plan_is_replayed_exactly(spec, tmp_path):
    plan = build_plan(replace(spec, turns="2", tenants=("a:1:1", "b:2")))
    path = tmp_path / "plan.jsonl.gz"
    write_plan(path, plan)
    assert build_plan(WorkloadSpec(trace=path, seed=9)) == plan


def test_token_ids_without_a_tokenizer(spec):
    spec = replace(spec, token_ids=True, tokenizer=None, vocab_size=9, prompt_tokens="30")
    turns = first_turns(build_plan(spec))
    assert {len(it.prompt) for it in turns} == {30}
    assert {token for it in turns for token in it.prompt} == set(range(9))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"seed": -1}, "-1 is no seed"),
        ({"num_sessions": 0}, "no request"),
        ({"num_sessions": -1}, "no request"),
        ({"num_sessions": None}, "never end"),
        ({"rate": math.nan}, "rate nan"),
        ({"prompt_tokens": "lots"}, "'lots' is not a length"),
        ({"tenants": ("a",)}, "'a' is not a tenant"),
        ({"think": "long"}, "'long' is not a think time"),
        ({"num_prefixes": 0}, "no such prefix"),
        ({"prefix_tokens": 50, "max_context": 51}, "no room"),
        ({"token_ids": True, "tokenizer": None}, "need a vocabulary"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"cache_tokens": 0}, "a cache of 0 tokens"),
        ({"prefix_tokens": 10**12}, "shared prefixes are more than 10,000,000 tokens"),
        ({"num_prefixes": 10**12}, "shared prefixes are more than 10,000,000 tokens"),
        ({"turns": "10000000"}, "more than 10,000,000 requests"),
        ({"output_tokens": "99999999999999999999999"}, "at most 10,000,000"),
        ({"token_ids": True, "tokenizer": None, "vocab_size": 10**30}, "need a vocabulary"),
    ],
)
def test_mistakes_are_named(spec, changes, cause):
    with pytest.raises(LoadError) as caught:
        build_plan(replace(spec, **changes))
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.remedy
