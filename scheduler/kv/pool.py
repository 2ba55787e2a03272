"""The free blocks of one tier, as runs of adjacent blocks.

A run behind a table's last block may be *claimed* for it: it stays free, but others take it only
when nothing else is free. So tables grow in place, and nobody waits for a block that is claimed.

I1  free runs are disjoint, and no two unclaimed ones touch.
I2  free blocks + allocated blocks == num_blocks.
I3  a block is released only by giving back a group that was allocated and not yet released.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from scheduler.kv.blocks import BlockGroup
from scheduler.request import InvariantError


class BlockPool:
    """Hands out block groups: growth in place, then unclaimed runs, then the tails of claims."""

    __slots__ = (
        "_claims_by_length",
        "_is_claim",
        "_length_at",
        "_num_claimed_blocks",
        "_runs_by_length",
        "_starts",
        "num_blocks",
        "num_free_blocks",
        "num_stolen_blocks",
    )

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free_blocks = 0
        self.num_stolen_blocks = 0  # taken from claims of others, ever
        self._num_claimed_blocks = 0
        self._length_at: dict[int, int] = {}  # start of a free run -> its length
        self._is_claim: set[int] = set()  # starts of claimed runs
        self._starts: list[int] = []  # of all free runs, ascending
        self._runs_by_length: list[tuple[int, int]] = []  # (length, start) ascending, unclaimed
        self._claims_by_length: list[tuple[int, int]] = []
        self._insert(0, num_blocks)

    def allocate(
        self, num_blocks: int, after: int | None = None, slack: int = 0
    ) -> tuple[BlockGroup, ...] | None:
        """Return groups of `num_blocks` blocks in all, or None, and then nothing has changed.

        `after` is the block behind the caller's last one: a free run that begins there is taken
        first, so that a table grows in place. The rest comes from the shortest run that holds it
        with its slack, else from the longest; behind the last block up to `slack` blocks become a
        claim of the caller.
        """
        if num_blocks < 1:
            raise InvariantError(f"cannot allocate {num_blocks} blocks")
        if num_blocks > self.num_free_blocks:
            return None
        groups: list[BlockGroup] = []
        if after in self._length_at:
            groups.append(self._take_head(after, num_blocks))
            num_blocks -= groups[-1].num_blocks
        while num_blocks:
            group = self._take_elsewhere(num_blocks, slack)
            groups.append(group)
            num_blocks -= group.num_blocks
        if slack:
            self._claim(groups[-1].end, slack)
        return tuple(groups)

    def release(self, group: BlockGroup) -> None:
        """Take a group back, with the claim behind it, and merge it with the runs beside it."""
        start, end = group.start, group.end
        index = bisect_left(self._starts, start)
        before = self._starts[index - 1] if index else None
        behind = self._starts[index] if index < len(self._starts) else None
        if (
            group.num_blocks < 1
            or start < 0
            or end > self.num_blocks
            or (before is not None and before + self._length_at[before] > start)
            or (behind is not None and behind < end)
        ):
            raise InvariantError(f"{group} is not allocated in this pool")
        while end in self._length_at:  # a claim, and the run behind it
            end += self._remove(end)
        if (
            before is not None
            and before + self._length_at[before] == start
            and before not in self._is_claim  # of another, whose table ends there
        ):
            self._remove(before)
            start = before
        self._insert(start, end - start)

    def unclaim(self, start: int) -> None:
        """Give up the claim that begins at this block, if there is one."""
        if start in self._is_claim:
            end = start + self._remove(start)
            if end in self._length_at:
                end += self._remove(end)
            self._insert(start, end - start)

    @property
    def longest_run(self) -> int:
        """Blocks of the longest unclaimed run."""
        return self._runs_by_length[-1][0] if self._runs_by_length else 0

    @property
    def num_unclaimed_blocks(self) -> int:
        return self.num_free_blocks - self._num_claimed_blocks

    def length_at(self, start: int | None) -> int:
        """Return the length of the free run or claim that begins at this block, 0 without one."""
        return self._length_at.get(start, 0) if start is not None else 0

    def claim_at(self, start: int | None) -> int:
        return self.length_at(start) if start in self._is_claim else 0

    def free_runs(self) -> tuple[BlockGroup, ...]:
        """Return the free runs by position, claims as runs of their own."""
        return tuple(BlockGroup(start, self._length_at[start]) for start in self._starts)

    def claims(self) -> tuple[BlockGroup, ...]:
        return tuple(BlockGroup(start, self._length_at[start]) for start in sorted(self._is_claim))

    def _take_elsewhere(self, num_blocks: int, slack: int) -> BlockGroup:
        if self._runs_by_length:
            index = bisect_left(self._runs_by_length, (num_blocks + slack, 0))
            _, start = self._runs_by_length[min(index, len(self._runs_by_length) - 1)]
            return self._take_head(start, num_blocks)
        # The far end of the longest claim: its owner keeps room to grow for as long as possible.
        length, start = self._claims_by_length[-1]
        self._remove(start)
        taken = min(length, num_blocks)
        if taken < length:
            self._insert(start, length - taken, claim=True)
        self.num_stolen_blocks += taken
        return BlockGroup(start + length - taken, taken)

    def _take_head(self, start: int, num_blocks: int) -> BlockGroup:
        """Cut up to `num_blocks` blocks off the head of the free run that begins at `start`."""
        claim = start in self._is_claim
        length = self._remove(start)
        taken = min(length, num_blocks)
        if taken < length:
            self._insert(start + taken, length - taken, claim=claim)
        return BlockGroup(start, taken)

    def _claim(self, start: int, num_blocks: int) -> None:
        """Claim the head of the run that begins at `start`, unless there is none or it is one."""
        if start in self._length_at and start not in self._is_claim:
            length = self._remove(start)
            taken = min(length, num_blocks)
            self._insert(start, taken, claim=True)
            if taken < length:
                self._insert(start + taken, length - taken)

    def _insert(self, start: int, length: int, *, claim: bool = False) -> None:
        self._length_at[start] = length
        insort(self._starts, start)
        if claim:
            self._is_claim.add(start)
            self._num_claimed_blocks += length
        insort(self._claims_by_length if claim else self._runs_by_length, (length, start))
        self.num_free_blocks += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        claim = start in self._is_claim
        if claim:
            self._is_claim.remove(start)
            self._num_claimed_blocks -= length
        by_length = self._claims_by_length if claim else self._runs_by_length
        del by_length[bisect_left(by_length, (length, start))]
        self.num_free_blocks -= length
        return length
