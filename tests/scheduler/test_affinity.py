"""Prefix affinity: where the beginnings of prompts were sent, and how far that counts."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler.cluster.affinity import (
    CHUNK_TOKENS,
    MAX_CHUNKS,
    TOKENS_PER_REQUEST,
    PrefixAffinity,
    preferred,
)
from scheduler.cluster.ledger import InstanceLoad
from scheduler.types import InstanceId
from tests.factories import make_spec

A, B, C = map(InstanceId, "abc")
SYSTEM = tuple(range(3 * CHUNK_TOKENS))  # a prompt of three chunks


def keys_of(affinity, prompt, **more):
    return affinity.keys(replace(make_spec(prompt=prompt), **more))


def sent(*places):
    affinity = PrefixAffinity()
    for prompt, instance_id in places:
        affinity.sent(keys_of(affinity, prompt), instance_id)
    return affinity


def loads(places=64, **num_requests):
    return [InstanceLoad(InstanceId(key), num, places, 0, 0.0) for key, num in num_requests.items()]


def ids(chosen):
    return [load.instance_id for load in chosen]


def test_a_prompt_is_found_where_it_was_sent_as_far_as_it_is_the_same():
    affinity = sent((SYSTEM, A), (SYSTEM[:CHUNK_TOKENS], B))
    other = (*SYSTEM[: 2 * CHUNK_TOKENS], *range(1000, 1200))
    assert affinity.found(keys_of(affinity, SYSTEM)) == {A: 3 * CHUNK_TOKENS, B: CHUNK_TOKENS}
    assert affinity.found(keys_of(affinity, other)) == {A: 2 * CHUNK_TOKENS, B: CHUNK_TOKENS}
    assert affinity.found(keys_of(affinity, SYSTEM[1:])) == {}


def test_who_was_sent_a_prompt_up_to_somewhere_has_all_that_lies_before():
    affinity = PrefixAffinity()
    keys = keys_of(affinity, SYSTEM)
    affinity.sent(keys[:1], A)
    affinity.sent(keys[2:], B)
    assert affinity.found(keys) == {A: CHUNK_TOKENS, B: 3 * CHUNK_TOKENS}


def test_those_that_are_gone_hide_nobody_who_has_less_of_it():
    affinity = sent((SYSTEM, A), (SYSTEM, B), (SYSTEM[:CHUNK_TOKENS], C))
    affinity.forget(A)
    assert affinity.found(keys_of(affinity, SYSTEM)) == {B: 3 * CHUNK_TOKENS, C: CHUNK_TOKENS}


def test_only_full_chunks_count_and_only_so_many():
    affinity = PrefixAffinity()
    assert keys_of(affinity, SYSTEM[: CHUNK_TOKENS - 1]) == []
    assert len(keys_of(affinity, SYSTEM[: 2 * CHUNK_TOKENS - 1])) == 1
    assert len(keys_of(affinity, range((MAX_CHUNKS + 9) * CHUNK_TOKENS))) == MAX_CHUNKS


def test_tenants_and_salts_share_nothing():
    affinity = sent((SYSTEM, A))
    assert affinity.found(keys_of(affinity, SYSTEM, tenant="other")) == {}
    assert affinity.found(keys_of(affinity, SYSTEM, cache_salt="salt")) == {}


def test_what_an_instance_had_is_gone_with_it():
    affinity = sent((SYSTEM, A), (SYSTEM, B))
    affinity.forget(A)
    assert affinity.found(keys_of(affinity, SYSTEM)) == {B: 3 * CHUNK_TOKENS}
    affinity.forget(B)
    assert affinity.found(keys_of(affinity, SYSTEM)) == {}


def test_what_comes_back_under_the_same_name_has_nothing():
    affinity = sent((SYSTEM, A), (SYSTEM, B))
    affinity.forget(A)
    affinity.sent(keys_of(affinity, SYSTEM[:CHUNK_TOKENS]), A)
    assert affinity.found(keys_of(affinity, SYSTEM)) == {A: CHUNK_TOKENS, B: 3 * CHUNK_TOKENS}


def test_the_oldest_is_forgotten_first_and_of_a_prompt_its_end():
    affinity = PrefixAffinity(max_keys=4)
    old, new = SYSTEM, tuple(range(5000, 5000 + 2 * CHUNK_TOKENS))
    affinity.sent(keys_of(affinity, old), A)
    affinity.sent(keys_of(affinity, new), B)
    assert affinity.found(keys_of(affinity, old)) == {A: 2 * CHUNK_TOKENS}
    affinity.sent(keys_of(affinity, old[:CHUNK_TOKENS]), A)  # sent again: it is the latest now
    affinity.sent(keys_of(affinity, range(9000, 9000 + CHUNK_TOKENS)), C)
    assert affinity.found(keys_of(affinity, old)) == {A: CHUNK_TOKENS}
    assert affinity.found(keys_of(affinity, new)) == {B: 2 * CHUNK_TOKENS}


def test_its_memory_is_bounded_by_keys_and_for_each_by_instances_that_are_up():
    affinity, rng = PrefixAffinity(max_keys=50), random.Random(0)
    affinity.sent(keys_of(affinity, SYSTEM), A)
    for turn in range(2000):
        prompt = [rng.randrange(2)] * (CHUNK_TOKENS * rng.randint(0, 9)) + [turn] * CHUNK_TOKENS
        instance_id = InstanceId(f"i{turn // 10}")
        affinity.sent(keys_of(affinity, prompt), instance_id)
        assert len(affinity._places) <= 50
        assert all(len(places) <= 2 for places in affinity._places.values())
        if turn % 10 == 9:
            affinity.forget(instance_id)
    assert list(affinity._ids.values()) == list(affinity._incarnations) == [A]


# --- whom it prefers ---


def test_nobody_is_preferred_for_a_prompt_that_is_nowhere():
    everybody = loads(a=0, b=9)
    assert preferred(everybody, {}) == everybody
    assert preferred(everybody, {C: 640}) == everybody, "it is only where it cannot go"


def test_those_that_have_the_most_are_preferred():
    found = {A: CHUNK_TOKENS, B: 2 * CHUNK_TOKENS, C: 2 * CHUNK_TOKENS}
    assert ids(preferred(loads(a=0, b=1, c=0), found)) == [B, C]


def test_a_short_prefix_is_worth_one_request():
    found = {A: CHUNK_TOKENS}
    assert ids(preferred(loads(a=6, b=5), found)) == [A]
    assert ids(preferred(loads(a=7, b=5), found)) == [A, B]


def test_a_long_prefix_is_worth_more_requests_and_no_more_than_that():
    found = {A: 4 * TOKENS_PER_REQUEST}
    assert ids(preferred(loads(a=10, b=5), found)) == [A]
    assert ids(preferred(loads(a=11, b=5), found)) == [A, B]


def test_when_the_one_with_the_most_is_too_busy_the_next_is_preferred():
    found = {A: 4 * TOKENS_PER_REQUEST, B: 2 * TOKENS_PER_REQUEST}
    assert ids(preferred(loads(a=9, b=2, c=0), found)) == [B]
    assert ids(preferred(loads(b=2, a=9, c=0), found)) == [B]


def test_the_lead_of_an_instance_is_bounded_by_what_it_may_run():
    found = {A: 100 * TOKENS_PER_REQUEST}
    assert ids(preferred(loads(places=16, a=8, b=5), found)) == [A]
    assert ids(preferred(loads(places=16, a=9, b=5), found)) == [A, B]
    assert ids(preferred(loads(places=4, a=7, b=5), found)) == [A, B]
