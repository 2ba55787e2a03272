"""Where blocks come from when the pool is full of cached prefixes."""

from __future__ import annotations

import pytest

from scheduler.kv import manager
from scheduler.kv.blocks import BlockGroup
from scheduler.kv.manager import KVManager
from scheduler.types import RequestId
from tests.factories import BLOCK_SIZE, make_geometry

A, B, C, D = (RequestId(name) for name in "abcd")


def grow(kv: KVManager, request_id: RequestId, num_blocks: int, num_later: int = 0):
    num_tokens = num_blocks * BLOCK_SIZE
    return kv.cover(request_id, num_tokens, num_tokens + num_later * BLOCK_SIZE)


def cache(kv: KVManager, request_id: RequestId, num_blocks: int) -> None:
    """Leave so many idle blocks behind."""
    assert grow(kv, request_id, num_blocks) is not None
    for index in range(num_blocks):
        kv.publish(request_id, index, f"{request_id} {index}".encode())
    kv.release(request_id)


def test_idle_prefixes_give_way_before_claims():
    kv = KVManager(make_geometry(10))
    cache(kv, A, 4)
    assert grow(kv, B, 3, num_later=3) == (BlockGroup(4, 3),)  # and claims the 3 behind
    assert grow(kv, C, 2) == (BlockGroup(2, 2),)
    assert kv.counters().num_stolen_blocks == 0
    assert grow(kv, B, 6) == (BlockGroup(7, 3),)


def test_with_nothing_idle_claims_are_used():
    kv = KVManager(make_geometry(8))
    assert grow(kv, A, 5, num_later=3) is not None
    assert grow(kv, B, 2) == (BlockGroup(6, 2),)
    assert kv.counters().num_stolen_blocks == 2
    assert kv.num_free_blocks == 1


@pytest.mark.parametrize(
    ("reserve_part", "groups"),
    [
        (2, (BlockGroup(2, 2),)),  # two blocks of the prefix, though one would have been enough
        (1000, (BlockGroup(7, 1), BlockGroup(3, 1))),
    ],
)
def test_a_prefix_gives_way_for_a_group_in_one_piece(monkeypatch, reserve_part, groups):
    monkeypatch.setattr(manager, "RESERVE_PART", reserve_part)
    kv = KVManager(make_geometry(8))
    cache(kv, A, 4)
    assert grow(kv, B, 3) == (BlockGroup(4, 3),)
    assert grow(kv, C, 2) == groups


def test_the_least_recently_used_prefix_goes_first_and_from_its_end():
    kv = KVManager(make_geometry(8))
    cache(kv, A, 4)
    cache(kv, B, 4)
    assert grow(kv, C, 2) == (BlockGroup(2, 2),)
    assert grow(kv, D, 3) is not None
    found = [kv.find([f"{name} {i}".encode() for i in range(4)], None, 100) for name in (A, B)]
    assert [len(hit.blocks) for hit in found] == [0, 3]
