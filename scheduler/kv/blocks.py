"""Block groups and block tables: which blocks hold the tokens of one request, in order.

A block holds the keys and values of `block_size` consecutive tokens for *all* layers, and a block
group is a run of adjacent blocks, so a group is one contiguous range of bytes in its tier.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class BlockGroup(NamedTuple):
    """`num_blocks` adjacent blocks that begin at block `start`."""

    start: int
    num_blocks: int

    @property
    def end(self) -> int:
        return self.start + self.num_blocks


def to_groups(blocks: Iterable[int]) -> tuple[BlockGroup, ...]:
    """Merge blocks that follow each other, in the order given."""
    groups: list[BlockGroup] = []
    start = end = -1
    for block in blocks:
        if block != end:
            if end > start:
                groups.append(BlockGroup(start, end - start))
            start = block
        end = block + 1
    if end > start:
        groups.append(BlockGroup(start, end - start))
    return tuple(groups)


class BlockTable:
    """The blocks of one request in token order; it begins with those that were found."""

    __slots__ = ("blocks", "num_found")

    def __init__(self, found: Iterable[int] = ()) -> None:
        self.blocks = list(found)
        self.num_found = len(self.blocks)

    @property
    def has_own(self) -> bool:
        """Whether its last block is its own, and so what is claimed behind it."""
        return len(self.blocks) > self.num_found

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """Return the blocks as groups; made anew, as only joins and dumps ask."""
        return to_groups(self.blocks)

    @property
    def end(self) -> int | None:
        """The block after the last one, where the table could grow in place."""
        return self.blocks[-1] + 1 if self.blocks else None

    def extend(self, groups: Iterable[BlockGroup]) -> None:
        for start, num_blocks in groups:
            self.blocks.extend(range(start, start + num_blocks))
