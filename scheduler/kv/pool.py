"""The free blocks of one tier, as runs of adjacent blocks.

I1  free runs are disjoint and maximal: no two of them touch.
I2  free blocks + allocated blocks == num_blocks.
I3  a block is released only by giving back a group that was allocated and not yet released.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from scheduler.kv.blocks import BlockGroup
from scheduler.request import InvariantError


class BlockPool:
    """Hands out block groups: growth in place first, then from the longest free run."""

    __slots__ = ("_by_length", "_length_at", "_starts", "num_blocks", "num_free_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free_blocks = 0
        self._length_at: dict[int, int] = {}  # start of a free run -> its length
        self._starts: list[int] = []  # ascending
        self._by_length: list[tuple[int, int]] = []  # (length, start) ascending: longest last
        self._insert(0, num_blocks)

    def allocate(self, num_blocks: int, after: int | None = None) -> tuple[BlockGroup, ...] | None:
        """Return groups of `num_blocks` blocks in all, or None, and then nothing has changed.

        `after` is the block behind the caller's last one: a free run that begins there is taken
        first, so that a table grows in place. The rest comes from the longest runs, which leaves
        the new group the most room to grow.
        """
        if num_blocks < 1:
            raise InvariantError(f"cannot allocate {num_blocks} blocks")
        if num_blocks > self.num_free_blocks:
            return None
        groups: list[BlockGroup] = []
        start = after if after in self._length_at else None
        while num_blocks:
            if start is None:
                start = self._by_length[-1][1]
            group = self._take(start, num_blocks)
            groups.append(group)
            num_blocks -= group.num_blocks
            start = None
        return tuple(groups)

    def release(self, group: BlockGroup) -> None:
        """Take a group back and merge it with the free runs beside it."""
        start, end = group
        end += start
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
        if behind == end:
            end += self._remove(behind)
        if before is not None and before + self._length_at[before] == start:
            self._remove(before)
            start = before
        self._insert(start, end - start)

    def free_runs(self) -> tuple[BlockGroup, ...]:
        """Return the free runs by position."""
        return tuple(BlockGroup(start, self._length_at[start]) for start in self._starts)

    def _take(self, start: int, num_blocks: int) -> BlockGroup:
        """Cut up to `num_blocks` blocks off the head of the free run that begins at `start`."""
        length = self._remove(start)
        taken = min(length, num_blocks)
        if taken < length:
            self._insert(start + taken, length - taken)
        return BlockGroup(start, taken)

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        insort(self._starts, start)
        insort(self._by_length, (length, start))
        self.num_free_blocks += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self.num_free_blocks -= length
        return length
