"""Reuse, by examples small enough to do by hand, and by a plain second way."""

from __future__ import annotations

import random

import pytest

from loadgen.workload.reuse import Reuse, lru_reuse, unbounded_reuse
from loadgen.workload.traces import TraceRequest


def requests(*rows, block_tokens=10):
    return [TraceRequest(0.0, len(ids) * block_tokens - 3, 1, tuple(ids)) for ids in rows]


def test_what_was_seen_hits_from_the_start_on():
    reuse = unbounded_reuse(requests([1, 2, 3], [1, 2, 4], [5], [1, 2, 4, 6]), 10)
    assert reuse == Reuse(num_blocks=11, num_hit_blocks=5, num_tokens=98, num_hit_tokens=50)
    assert reuse.block_ratio == pytest.approx(5 / 11)
    assert reuse.token_ratio == pytest.approx(50 / 98)


def test_a_hit_ends_at_the_first_block_that_is_missing():
    assert unbounded_reuse(requests([1, 2], [3, 2]), 10).num_hit_blocks == 0


def test_a_last_block_hits_only_the_tokens_it_has():
    assert unbounded_reuse(requests([1, 2], [1, 2]), 10).num_hit_tokens == 17


@pytest.mark.parametrize(
    ("num_cached", "hits"),
    [
        (0, 0),
        (1, 1),  # 1 is kept, hits in [1, 3] and gives way to 9
        (2, 1),  # 1 and 3 are kept, and both give way
        (3, 2),  # 2 and then 3 give way, 1 hits again
        (4, 3),  # only 2 gives way
    ],
)
def test_the_least_recently_used_block_is_forgotten(num_cached, hits):
    rows = requests([1, 2], [1, 3], [9, 8], [1, 3])
    assert lru_reuse(rows, 10, num_cached).num_hit_blocks == hits


def test_a_request_larger_than_the_cache_leaves_its_beginning():
    assert lru_reuse(requests([1, 2, 3, 4], [1, 2, 3, 4]), 10, 2).num_hit_blocks == 2


def slow_lru_hits(rows, num_cached):
    """The same by ages: the block used longest ago goes, of one request the last first."""
    last_use: dict[int, tuple[int, int]] = {}
    hits = 0
    for now, ids in enumerate(rows):
        missing = [place for place, block in enumerate(ids) if block not in last_use]
        hits += missing[0] if missing else len(ids)
        last_use |= {block: (now, -place) for place, block in enumerate(ids)}
        while len(last_use) > num_cached:
            del last_use[min(last_use, key=last_use.__getitem__)]
    return hits


def test_it_agrees_with_a_slower_way():
    source = random.Random(5)
    users = [source.randrange(6) for _ in range(300)]
    rows = [[10 * user + place for place in range(source.randint(1, 5))] for user in users]
    unbounded = unbounded_reuse(requests(*rows), 10).num_hit_blocks
    assert unbounded == slow_lru_hits(rows, 10**9)
    hits = [lru_reuse(requests(*rows), 10, num).num_hit_blocks for num in range(40)]
    assert hits == [slow_lru_hits(rows, num) for num in range(40)]
    assert hits[0] == 0
    assert hits[30] == unbounded
    assert 0 < hits[10] < unbounded
