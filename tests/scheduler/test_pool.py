"""The pool of block groups against a set of free block numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from scheduler.kv.blocks import BlockGroup, BlockTable
from scheduler.kv.pool import BlockPool
from scheduler.request import InvariantError

NUM_BLOCKS = 24


class PoolMachine(RuleBasedStateMachine):
    """The reference model is the set of free blocks."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.free = set(range(NUM_BLOCKS))

    def take(self, groups: tuple[BlockGroup, ...] | None, num_blocks: int) -> bool:
        if num_blocks > len(self.free):
            assert groups is None
            return False
        assert groups is not None
        blocks = [block for group in groups for block in range(group.start, group.end)]
        assert len(blocks) == num_blocks == len(set(blocks))
        assert self.free.issuperset(blocks)
        self.free.difference_update(blocks)
        return True

    @rule(target=tables, num_blocks=st.integers(1, NUM_BLOCKS))
    def allocate(self, num_blocks: int) -> BlockTable:
        table = BlockTable()
        groups = self.pool.allocate(num_blocks)
        if self.take(groups, num_blocks):
            table.extend(groups or ())
        return table

    @rule(table=tables, num_blocks=st.integers(1, 4))
    def grow(self, table: BlockTable, num_blocks: int) -> None:
        end = table.end
        in_place = end in self.free
        num_groups = len(table.groups)
        groups = self.pool.allocate(num_blocks, after=end)
        if self.take(groups, num_blocks):
            assert groups is not None
            assert not in_place or groups[0].start == end, "room behind the table was passed over"
            table.extend(groups)
            if in_place and len(groups) == 1:
                assert len(table.groups) == num_groups

    @rule(table=consumes(tables))
    def release(self, table: BlockTable) -> None:
        for group in table.groups:
            self.pool.release(group)
            self.free.update(range(group.start, group.end))

    @invariant()
    def free_runs_are_the_free_blocks(self) -> None:
        runs = self.pool.free_runs()
        assert {block for run in runs for block in range(run.start, run.end)} == self.free
        assert self.pool.num_free_blocks == len(self.free)
        assert all(a.end < b.start for a, b in pairwise(runs)), "runs touch"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("start", "num_blocks"), [(0, 1), (2, 3), (3, 3), (7, 2), (5, 0)])
def test_what_is_not_allocated_cannot_be_released(start, num_blocks):
    pool = BlockPool(8)
    assert pool.allocate(5) == (BlockGroup(0, 5),)
    pool.release(BlockGroup(0, 3))
    with pytest.raises(InvariantError):
        pool.release(BlockGroup(start, num_blocks))


def test_a_new_group_takes_the_longest_free_run():
    pool = BlockPool(10)
    whole = pool.allocate(10)
    assert whole is not None
    pool.release(BlockGroup(0, 2))
    pool.release(BlockGroup(4, 5))
    assert pool.allocate(3) == (BlockGroup(4, 3),)
    assert pool.allocate(4) == (BlockGroup(7, 2), BlockGroup(0, 2))
