"""Keys of prefixes, which idle block is evicted first, and what is copied: by example."""

from __future__ import annotations

import pytest

from scheduler.kv.blocks import BlockGroup
from scheduler.kv.manager import Hit, KVManager
from scheduler.kv.prefix import (
    PrefixIndex,
    next_key,
    root_key,
)
from scheduler.request import InvariantError
from scheduler.types import RequestId
from tests.factories import BLOCK_SIZE as SIZE
from tests.factories import make_geometry

# --- keys ---


def test_a_key_names_the_tokens_and_all_before_them():
    root = root_key("", "x", "")
    once = next_key(root, (1, 2))
    assert once == next_key(root, [1, 2])
    others = [next_key(root, (2, 1)), next_key(root, (1,)), next_key(root, (1, 2, 0)), root]
    assert len({once, next_key(once, (1, 2)), *others}) == 6


def test_no_two_of_revision_tenant_and_salt_read_the_same():
    triples = {("abc"[:i], "abc"[i:j], "abc"[j:]) for i in range(4) for j in range(i, 4)}
    triples |= {("", "ab", "c"), ("", "a", "bc"), ("x", "", ""), ("", "x", ""), ("", "", "x")}
    assert len({root_key(*triple) for triple in triples}) == len(triples)


# --- which of the idle blocks is evicted ---


def make_index(*tables):
    """Return an index in which each of these tables became idle, the first one first."""
    index = PrefixIndex()
    for table in tables:
        for block in table:
            index.insert(str(block).encode(), block)
        index.park(table)
    return index


def test_the_least_recently_used_run_is_evicted_as_a_whole():
    index = make_index((4, 5, 6), (0, 1))
    assert index.evict(9) == BlockGroup(4, 3)
    assert index.get(b"4") is None
    assert index.get(b"0") == 0
    assert index.num_evicted_blocks == 3


def test_what_is_used_again_is_evicted_later():
    index = make_index((0, 1), (4, 5))
    for block in (0, 1):
        index.unpark(block)
    index.park((0, 1))
    assert index.evict(9) == BlockGroup(4, 2)


def test_adjacent_blocks_that_became_idle_at_different_times_are_two_runs():
    index = make_index((2, 3), (0, 1))
    assert index.evict(9) == BlockGroup(2, 2)
    assert index.evict(9) == BlockGroup(0, 2)


def test_the_end_of_a_prefix_is_evicted_before_its_head():
    assert make_index((5, 2, 9)).evict(9) == BlockGroup(9, 1)
    index = make_index(range(40))
    assert index.evict(8) == BlockGroup(32, 8)
    assert index.evict(8) == BlockGroup(24, 8)


def test_when_nothing_is_idle_nothing_is_evicted():
    index = make_index((0, 1), (3,))
    assert [index.evict(9) for _ in range(3)] == [BlockGroup(0, 2), BlockGroup(3, 1), None]
    assert index.num_idle_blocks == 0


def test_only_what_can_be_found_becomes_idle_and_only_once():
    index = make_index((0,))
    for block in (0, 1):
        with pytest.raises(InvariantError, match=f"block {block} cannot become idle"):
            index.park((block,))


# --- a block is copied in part ---


def keys_of(prompt):
    keys, parent = [], root_key("", "x", "")
    for start in range(0, len(prompt), SIZE):
        parent = next_key(parent, prompt[start : start + SIZE])
        keys.append(parent)
    tail = keys.pop() if len(prompt) % SIZE else None
    return keys, tail


def make_kv(prompt):
    """Return a manager that has computed a prompt and let it go."""
    kv = KVManager(make_geometry(8, SIZE))
    kv.cover(RequestId("a"), len(prompt), len(prompt))
    keys, tail = keys_of(prompt)
    for index, key in enumerate([*keys, *([tail] if tail else [])]):
        kv.publish(RequestId("a"), index, key)
    kv.release(RequestId("a"))
    return kv


@pytest.mark.parametrize(
    ("num_tokens", "hit"),
    [
        (6, Hit((0,), 1, 5)),  # the last token is computed, for its logits
        (8, Hit((0,), 1, 7)),  # so a full block is copied as well
        (5, Hit((0,), None, 4)),  # a copy of no token gains nothing
        (1, Hit((), None, 0)),
    ],
)
def test_the_last_block_of_a_prompt_is_copied_but_for_its_last_token(num_tokens, hit):
    prompt = tuple(range(num_tokens))
    kv = make_kv(prompt)
    assert kv.find(*keys_of(prompt), num_tokens) == hit
    assert hit.without_copy(SIZE) == Hit(hit.blocks, None, len(hit.blocks) * SIZE)


def test_the_block_to_be_copied_is_held_until_the_step_has_completed():
    prompt = tuple(range(6))
    kv = make_kv(prompt)
    kv.adopt(RequestId("b"), Hit((0,), 1, 5), step_id=3)
    assert kv.num_idle_blocks == 0
    assert kv.cover(RequestId("b"), 6 * SIZE + 1, 99) == (BlockGroup(2, 6),)
    assert kv.cover(RequestId("b"), 7 * SIZE + 1, 99) is None
    kv.step_completed(3)
    assert kv.cover(RequestId("b"), 7 * SIZE + 1, 99) == (BlockGroup(1, 1),)
    with pytest.raises(InvariantError, match="b holds blocks already"):
        kv.adopt(RequestId("b"), Hit(), step_id=4)
