"""The blocks claimed behind a request, when others share its prefix."""

from __future__ import annotations

from scheduler.kv.blocks import BlockGroup
from scheduler.kv.manager import Hit, KVManager
from scheduler.types import RequestId
from tests.factories import make_geometry

A, B = RequestId("a"), RequestId("b")


def make_kv():
    """Return a manager in which a holds blocks 0 and 1, and has claimed 2, 3 and 4."""
    kv = KVManager(make_geometry(num_blocks=32, block_size=4))
    assert kv.cover(A, 8, 20) == (BlockGroup(0, 2),)
    assert kv._pool.claims() == (BlockGroup(2, 3),)
    return kv


def test_one_that_shares_a_prefix_does_not_grow_into_the_claim_behind_it():
    kv = make_kv()
    kv.adopt(B, Hit((0, 1), None, 8), step_id=0)
    groups = kv.cover(B, 9, 20)
    assert groups is not None
    assert groups[0].start >= 5, "27 blocks are free that nobody has claimed"
    assert kv.cover(A, 9, 20) == (BlockGroup(2, 1),)


def test_a_claim_outlasts_those_who_copied_the_block_before_it():
    kv = make_kv()
    kv.adopt(B, Hit((0,), 1, 7), step_id=0)
    assert kv.cover(B, 8, 8) == (BlockGroup(5, 1),)
    kv.step_completed(0)
    assert kv._pool.claims() == (BlockGroup(2, 3),)


def test_a_claim_goes_with_its_owner_though_others_hold_the_block_before_it():
    kv = make_kv()
    kv.adopt(B, Hit((0, 1), None, 8), step_id=0)
    kv.release(A)
    assert kv._pool.claims() == ()
    assert kv.cover(B, 9, 20) == (BlockGroup(2, 1),), "it may grow there now"


def test_a_request_that_leaves_takes_no_claim_of_the_one_it_shared_with():
    kv = make_kv()
    kv.adopt(B, Hit((0, 1), None, 8), step_id=0)
    kv.release(B)
    assert kv._pool.claims() == (BlockGroup(2, 3),)
