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


class BlockTable:
    """The groups of one request in token order; adjacent groups are merged as they are added."""

    __slots__ = ("_groups", "num_blocks")

    def __init__(self) -> None:
        self._groups: list[BlockGroup] = []
        self.num_blocks = 0

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        return tuple(self._groups)

    @property
    def end(self) -> int | None:
        """The block after the last one, where the table could grow in place."""
        return self._groups[-1].end if self._groups else None

    def extend(self, groups: Iterable[BlockGroup]) -> None:
        for group in groups:
            if self._groups and self._groups[-1].end == group.start:
                last = self._groups.pop()
                group = BlockGroup(last.start, last.num_blocks + group.num_blocks)
                self.num_blocks -= last.num_blocks
            self._groups.append(group)
            self.num_blocks += group.num_blocks
