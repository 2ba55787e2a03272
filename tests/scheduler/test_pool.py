"""The pool of block groups against a set of free block numbers and the claims on them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from scheduler.kv.blocks import BlockGroup, BlockTable, to_groups
from scheduler.kv.pool import BlockPool
from scheduler.request import InvariantError

NUM_BLOCKS = 24


def blocks_of(groups):
    return [block for group in groups for block in range(group.start, group.end)]


class PoolMachine(RuleBasedStateMachine):
    """The reference model: the free blocks, and which of them are claimed behind which block."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.free = set(range(NUM_BLOCKS))
        self.claims: dict[int, int] = {}  # first block -> how many
        self.num_stolen = 0

    def claimed(self) -> set[int]:
        return {block for start, num in self.claims.items() for block in range(start, start + num)}

    def unclaimed_runs(self) -> tuple[BlockGroup, ...]:
        return to_groups(sorted(self.free - self.claimed()))

    @rule(target=tables, num_blocks=st.integers(1, NUM_BLOCKS), slack=st.integers(0, 6))
    def allocate(self, num_blocks: int, slack: int) -> BlockTable:
        longest = max((run.num_blocks for run in self.unclaimed_runs()), default=0)
        groups = self.take(BlockTable(), num_blocks, slack)
        if groups and num_blocks <= longest:
            assert len(groups) == 1, "an unclaimed run would have held it all"
        return BlockTable(blocks_of(groups))

    @rule(table=tables, num_blocks=st.integers(1, 8), slack=st.integers(0, 6))
    def grow(self, table: BlockTable, num_blocks: int, slack: int) -> None:
        end = table.end
        claim = 0 if end is None else self.claims.get(end, 0)
        in_place = end in self.free
        num_groups = len(table.groups)
        groups = self.take(table, num_blocks, slack)
        if groups:
            taken = blocks_of(groups)
            assert not in_place or taken[0] == end, "room behind the table was passed over"
            own = min(num_blocks, claim)
            assert taken[:own] == list(range(taken[0], taken[0] + own)), "its own claim comes first"
        table.extend(groups)
        if groups and in_place and len(groups) == 1:
            assert len(table.groups) == num_groups

    def take(self, table: BlockTable, num_blocks: int, slack: int) -> tuple[BlockGroup, ...]:
        """Allocate behind a table, follow it in the model, and return what came, maybe nothing."""
        groups = self.pool.allocate(num_blocks, after=table.end, slack=slack)
        if num_blocks > len(self.free):
            assert groups is None
            return ()
        assert groups is not None, "a claim has cost somebody a block"
        blocks = blocks_of(groups)
        assert len(blocks) == num_blocks == len(set(blocks))
        assert self.free.issuperset(blocks)
        self.free.difference_update(blocks)
        self.follow_claims(table.end, blocks)
        end = groups[-1].end
        behind = [run for run in self.unclaimed_runs() if run.start <= end < run.end]
        if slack and behind:
            assert behind[0].start == end
            self.claims[end] = min(slack, behind[0].num_blocks)
        return groups

    def follow_claims(self, end: int | None, blocks: list[int]) -> None:
        """Cut what was taken out of the claims: the head of one's own, the far end of others'."""
        taken = set(blocks)
        num_stolen = 0
        for start, num in [*self.claims.items()]:
            lost = taken & set(range(start, start + num))
            if not lost:
                continue
            del self.claims[start]
            kept = num - len(lost)
            if start == end:
                assert lost == {*range(start, start + len(lost))}
                start += len(lost)
            else:
                num_stolen += len(lost)
                assert lost == {*range(start + kept, start + num)}, "not from the far end"
            if kept:
                self.claims[start] = kept
        if num_stolen:
            assert not self.unclaimed_runs(), "stolen while unclaimed blocks were left"
        self.num_stolen += num_stolen

    @rule(table=tables)
    def unclaim(self, table: BlockTable) -> None:
        if table.end is not None:
            self.pool.unclaim(table.end)
            self.claims.pop(table.end, None)

    @rule(table=consumes(tables))
    def release(self, table: BlockTable) -> None:
        for group in table.groups:
            self.pool.release(group)
            self.free.update(range(group.start, group.end))
            self.claims.pop(group.end, None)

    @invariant()
    def free_runs_are_the_free_blocks(self) -> None:
        claims = {BlockGroup(*claim) for claim in self.claims.items()}
        assert self.pool.claims() == tuple(sorted(claims))
        runs = self.pool.free_runs()
        assert runs == tuple(sorted(claims.union(self.unclaimed_runs())))
        assert self.pool.num_free_blocks == len(self.free)
        for a, b in pairwise(runs):
            assert a.end < b.start or (a.end == b.start and {a, b} & claims), "runs touch"

    @invariant()
    def stolen_blocks_are_counted(self) -> None:
        assert self.pool.num_stolen_blocks == self.num_stolen


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


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


def test_a_new_group_takes_the_shortest_run_that_holds_it_with_its_slack():
    pool = BlockPool(12)
    pool.allocate(12)
    for group in (BlockGroup(0, 6), BlockGroup(7, 2), BlockGroup(10, 1)):
        pool.release(group)
    assert pool.allocate(1, slack=1) == (BlockGroup(7, 1),)
    assert pool.allocate(1) == (BlockGroup(10, 1),)


def test_a_table_grows_into_its_claim_and_others_go_past_it():
    pool = BlockPool(10)
    assert pool.allocate(2, slack=3) == (BlockGroup(0, 2),)
    assert pool.claims() == (BlockGroup(2, 3),)
    assert pool.allocate(2) == (BlockGroup(5, 2),)
    assert pool.allocate(2, after=2) == (BlockGroup(2, 2),)
    assert pool.claims() == (BlockGroup(4, 1),)
    assert pool.num_stolen_blocks == 0


def test_the_far_end_of_the_claim_used_last_is_stolen_when_nothing_else_is_free():
    pool = BlockPool(10)
    pool.allocate(2, slack=4)  # blocks 0 and 1, claims 2 to 5
    pool.allocate(2, slack=2)  # blocks 6 and 7, claims 8 and 9
    assert pool.allocate(1) == (BlockGroup(9, 1),)
    assert pool.claims() == (BlockGroup(2, 4), BlockGroup(8, 1))
    pool.allocate(1, after=2)  # now the first was used last
    assert pool.allocate(1) == (BlockGroup(5, 1),)
    assert pool.claims() == (BlockGroup(3, 2), BlockGroup(8, 1))
    assert pool.num_stolen_blocks == 2
    assert pool.allocate(4) is None
    assert pool.num_stolen_blocks == 2, "what fails changes nothing"


def test_a_claim_that_is_given_up_joins_the_run_behind_it():
    pool = BlockPool(10)
    pool.allocate(2, slack=3)
    assert pool.free_runs() == (BlockGroup(2, 3), BlockGroup(5, 5))
    pool.unclaim(5)  # no claim begins there
    pool.unclaim(2)
    assert pool.free_runs() == (BlockGroup(2, 8),)
    assert pool.claims() == ()


def test_a_claim_goes_with_the_group_before_it():
    pool = BlockPool(10)
    (group,) = pool.allocate(2, slack=3) or ()
    pool.release(group)
    assert pool.free_runs() == (BlockGroup(0, 10),)
    assert pool.claims() == ()
