"""Which request owns which blocks. The only writer of block tables and pools.

I1  the blocks of all tables, the retired ones and the free blocks are disjoint and are all blocks.
I2  a retired block becomes free only when the step that touches it last has completed.
"""

from __future__ import annotations

from scheduler.kv.blocks import BlockGroup, BlockTable
from scheduler.kv.pool import BlockPool
from scheduler.types import KVGeometry, RequestId


class KVManager:
    """The device tier of one instance."""

    __slots__ = ("_pool", "_retired", "_tables", "geometry", "num_retired_blocks")

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry
        self._pool = BlockPool(geometry.num_blocks)
        self._tables: dict[RequestId, BlockTable] = {}
        self._retired: dict[int, list[BlockTable]] = {}  # by the step that touches them last
        self.num_retired_blocks = 0

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.geometry.block_size)

    def cover(self, request_id: RequestId, num_tokens: int) -> tuple[BlockGroup, ...] | None:
        """Grow the request's table until it holds `num_tokens` tokens.

        Returns the blocks added, in order (none when they fit already), or None when the pool
        lacks them, and then nothing has changed.
        """
        missing = self.missing_blocks(request_id, num_tokens)
        if not missing:
            return ()
        table = self._tables.get(request_id)
        groups = self._pool.allocate(missing, after=table.end if table else None)
        if groups is None:
            return None
        if table is None:
            table = self._tables[request_id] = BlockTable()
        table.extend(groups)
        return groups

    def release(self, request_id: RequestId) -> None:
        """Give all blocks of the request back; a request without blocks is no error."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._free(table)

    def retire(self, request_id: RequestId, step_id: int) -> None:
        """Take all blocks from the request; they are free when the step has completed."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._retired.setdefault(step_id, []).append(table)
            self.num_retired_blocks += table.num_blocks

    def step_completed(self, step_id: int) -> None:
        """Free what was retired until this step."""
        for table in self._retired.pop(step_id, ()):
            self.num_retired_blocks -= table.num_blocks
            self._free(table)

    def groups(self, request_id: RequestId) -> tuple[BlockGroup, ...]:
        """Return the request's blocks in token order."""
        return self._tables[request_id].groups

    def tables(self) -> dict[RequestId, tuple[BlockGroup, ...]]:
        """Return every table's groups, for dumps and for the tests of I1."""
        return {request_id: table.groups for request_id, table in self._tables.items()}

    def retired(self) -> tuple[BlockGroup, ...]:
        """Return the groups that nobody owns and that steps in flight still touch."""
        tables = (table for tables in self._retired.values() for table in tables)
        return tuple(group for table in tables for group in table.groups)

    def missing_blocks(self, request_id: RequestId, num_tokens: int) -> int:
        """Return how many blocks the request lacks to hold `num_tokens` tokens."""
        table = self._tables.get(request_id)
        return max(0, self.blocks_for(num_tokens) - (table.num_blocks if table else 0))

    def _free(self, table: BlockTable) -> None:
        for group in table.groups:
            self._pool.release(group)

    def free_runs(self) -> tuple[BlockGroup, ...]:
        return self._pool.free_runs()
