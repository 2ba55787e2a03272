"""Which blocks hold which computed prefix, and which of them nobody uses at present.

A key names the tokens of a block and everything before them: SHA-256 of (parent key, token ids),
where the first parent is made of the model's revision, the tenant and its salt. So equal keys mean
equal keys and values, and one tenant never finds, or times, the prefixes of another.

A block is *idle* while no table holds it: it stays as a cached prefix until its room is needed.
Idle blocks are evicted by run: adjacent blocks that became idle together, least recently first. The
holes are then as long as the runs were, and tables stay in few groups; evicting single blocks would
leave single holes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from scheduler.kv.blocks import BlockGroup
from scheduler.request import InvariantError

Key = bytes


def root_key(model_revision: str, tenant: str, cache_salt: str) -> Key:
    """Return the parent of a request's first block."""
    digest = hashlib.sha256(b"hocket prefix 1")
    for part in (model_revision, tenant, cache_salt):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # no two triples read the same
    return digest.digest()


def next_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """Return the key of a block of these tokens behind `parent`."""
    return next_keys(parent, token_ids, len(token_ids))[0]


def next_keys(parent: Key, token_ids: Sequence[int], block_size: int) -> list[Key]:
    """Return the keys of the full blocks of these tokens behind `parent`."""
    data = array("q", token_ids).tobytes()
    size = block_size * array("q").itemsize
    keys = []
    for start in range(0, len(data) - size + 1, size):
        parent = hashlib.sha256(parent + data[start : start + size]).digest()
        keys.append(parent)
    return keys


class PrefixIndex:
    """Keys to blocks, and the idle blocks in order of their last use."""

    __slots__ = ("_block_of", "_clock", "_idle", "_keys_of", "num_evicted_blocks")

    def __init__(self) -> None:
        self._block_of: dict[Key, int] = {}
        self._keys_of: dict[int, list[Key]] = {}
        self._idle: dict[int, int] = {}  # block -> when it became idle; least recent first
        self._clock = 0
        self.num_evicted_blocks = 0

    @property
    def num_idle_blocks(self) -> int:
        return len(self._idle)

    def get(self, key: Key) -> int | None:
        return self._block_of.get(key)

    def holds(self, block: int) -> bool:
        """Whether some key leads to this block."""
        return block in self._keys_of

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def insert(self, key: Key, block: int) -> None:
        """Let the key lead to this block, unless it leads to another already."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._keys_of.setdefault(block, []).append(key)

    def forget(self, key: Key) -> int | None:
        """Let the key lead nowhere; return the block that it led to, if any."""
        block = self._block_of.pop(key, None)
        if block is not None:
            self._keys_of[block].remove(key)
            if not self._keys_of[block]:
                del self._keys_of[block]
        return block

    def drop(self, block: int) -> None:
        """Forget what the block holds. An idle block must be taken with `unpark` as well."""
        for key in self._keys_of.pop(block, ()):
            del self._block_of[key]

    def park(self, blocks: Iterable[int]) -> None:
        """These indexed blocks of one table, in token order, are used by nobody now."""
        self._clock += 1
        for block in reversed(list(blocks)):  # the end of a prefix is evicted before its head
            if block in self._idle or block not in self._keys_of:
                raise InvariantError(f"block {block} cannot become idle")
            self._idle[block] = self._clock

    def unpark(self, block: int) -> None:
        """An idle block is used again, or was taken for something else."""
        del self._idle[block]

    def evict(self, max_num_blocks: int) -> BlockGroup | None:
        """Forget at most so many blocks of the least recently used run, its end first.

        Returns them as a group, None if nothing is idle.
        """
        if not self._idle:
            return None
        run = self._run_around(*next(iter(self._idle.items())), max_num_blocks)
        for block in range(run.start, run.end):
            self.unpark(block)
            self.drop(block)
        self.num_evicted_blocks += run.num_blocks
        return run

    def idle_blocks(self) -> tuple[int, ...]:
        """Return them least recently used first."""
        return tuple(self._idle)

    def _run_around(self, block: int, stamp: int, max_num_blocks: int) -> BlockGroup:
        """Return adjacent blocks that became idle with this one, those before it first."""
        start, end = block, block + 1
        while end - start < max_num_blocks and self._idle.get(start - 1) == stamp:
            start -= 1
        while end - start < max_num_blocks and self._idle.get(end) == stamp:
            end += 1
        return BlockGroup(start, end - start)
