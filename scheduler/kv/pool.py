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
        "_claims",
        "_is_free",
        "_num_claimed_blocks",
        "_runs",
        "_runs_by_length",
        "_start_of",
        "num_blocks",
        "num_free_blocks",
        "num_stolen_blocks",
    )

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks
        self.num_stolen_blocks = 0  # taken from claims of others, ever
        self._is_free = bytearray(b"\1" * num_blocks)  # by block
        self._claims: dict[int, int] = {}  # start of a claimed run -> its length; last used last
        self._num_claimed_blocks = 0
        self._runs: dict[int, int] = {}  # start of an unclaimed run -> its length
        self._runs_by_length: list[tuple[int, int]] = []  # (length, start) ascending, unclaimed
        self._start_of: dict[int, int] = {}  # end of a run or claim -> its start
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
        if self.length_at(after):
            assert after is not None
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
        if not 0 <= start < end <= self.num_blocks or 1 in self._is_free[start:end]:
            raise InvariantError(f"{group} is not allocated in this pool")
        self._is_free[start:end] = b"\1" * (end - start)
        self.num_free_blocks += end - start
        end += self._remove(end)  # a claim, or a run
        end += self._remove(end)  # the run behind the claim
        before = self._start_of.get(start)
        if before in self._runs:  # not the claim of another, whose table ends there
            start -= self._remove(before)
        self._insert(start, end - start)

    def unclaim(self, start: int) -> None:
        """Give up the claim that begins at this block, if there is one."""
        if start in self._claims:
            end = start + self._remove(start)
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
        if start is None:
            return 0
        return self._claims.get(start) or self._runs.get(start, 0)

    def claim_at(self, start: int | None) -> int:
        return self._claims.get(start, 0) if start is not None else 0

    def free_runs(self) -> tuple[BlockGroup, ...]:
        """Return the free runs by position, claims as runs of their own."""
        return tuple(BlockGroup(*run) for run in sorted({**self._runs, **self._claims}.items()))

    def claims(self) -> tuple[BlockGroup, ...]:
        return tuple(BlockGroup(*run) for run in sorted(self._claims.items()))

    def _take_elsewhere(self, num_blocks: int, slack: int) -> BlockGroup:
        if self._runs_by_length:
            index = bisect_left(self._runs_by_length, (num_blocks + slack, 0))
            _, start = self._runs_by_length[min(index, len(self._runs_by_length) - 1)]
            return self._take_head(start, num_blocks)
        # The far end of the claim that was used last: its owner needs it later than all others.
        start, length = next(reversed(self._claims.items()))
        self._remove(start)
        taken = min(length, num_blocks)
        if taken < length:
            self._insert(start, length - taken, claim=True)
        self.num_stolen_blocks += taken
        return self._taken(start + length - taken, taken)

    def _take_head(self, start: int, num_blocks: int) -> BlockGroup:
        """Cut up to `num_blocks` blocks off the head of the run or claim that begins at `start`."""
        claim = start in self._claims
        length = self._remove(start)
        taken = min(length, num_blocks)
        if taken < length:
            self._insert(start + taken, length - taken, claim=claim)
        return self._taken(start, taken)

    def _taken(self, start: int, num_blocks: int) -> BlockGroup:
        self._is_free[start : start + num_blocks] = bytes(num_blocks)
        self.num_free_blocks -= num_blocks
        return BlockGroup(start, num_blocks)

    def _claim(self, start: int, num_blocks: int) -> None:
        """Claim the head of the run that begins at `start`, unless there is none or it is one."""
        if start in self._runs:
            length = self._remove(start)
            taken = min(length, num_blocks)
            self._insert(start, taken, claim=True)
            if taken < length:
                self._insert(start + taken, length - taken)

    def _insert(self, start: int, length: int, *, claim: bool = False) -> None:
        self._start_of[start + length] = start
        if claim:
            self._claims[start] = length
            self._num_claimed_blocks += length
        else:
            self._runs[start] = length
            insort(self._runs_by_length, (length, start))

    def _remove(self, start: int) -> int:
        """Forget the run or claim that begins here; return its length, 0 without one."""
        length = self._claims.pop(start, 0)
        if length:
            self._num_claimed_blocks -= length
        else:
            length = self._runs.pop(start, 0)
            if not length:
                return 0
            del self._runs_by_length[bisect_left(self._runs_by_length, (length, start))]
        del self._start_of[start + length]
        return length
