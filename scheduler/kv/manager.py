"""Which request holds which blocks. The only writer of block tables, pools and the prefix index.

I1  every block is held by tables (as often as it is counted), or idle in the prefix index, or
    free, or to be cleared: exactly one of these.
I2  only blocks that one table alone holds are written to; what others find is full, or copied.
I3  a table that was retired is let go when the step that touches it last has completed.
I4  a block that a failed request held is in no index, and is cleared before it is used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scheduler.kv.blocks import BlockGroup, BlockTable, to_groups
from scheduler.kv.pool import BlockPool
from scheduler.kv.prefix import Key, PrefixIndex
from scheduler.load import KVCounters
from scheduler.request import InvariantError
from scheduler.types import KVGeometry, RequestId

# Blocks claimed behind a table for its next tokens: with 16 tokens each, room for 48. Idle prefixes
# give way to claims, so longer ones make longer groups and fewer hits.
SLACK_BLOCKS = 3
# Prefixes are evicted for the sake of long runs until such a part of the pool is free, unclaimed:
# what is free for a while grows together, and a new group finds its place in one piece.
RESERVE_PART = 20


class Hit(NamedTuple):
    """What of a request's tokens is computed already."""

    blocks: tuple[int, ...] = ()  # full ones, to be shared
    partial: int | None = None  # the block after those, to be copied
    num_tokens: int = 0

    def without_copy(self, block_size: int) -> Hit:
        return Hit(self.blocks, None, len(self.blocks) * block_size)


class _Retired(NamedTuple):
    request_id: RequestId
    table: BlockTable


class KVManager:
    """The device tier of one instance."""

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry
        self._pool = BlockPool(geometry.num_blocks)
        self._index = PrefixIndex()
        self._refs = [0] * geometry.num_blocks
        self._tables: dict[RequestId, BlockTable] = {}
        self._retired: dict[int, list[_Retired]] = {}  # by the step that touches them last
        self._dirty: set[int] = set()  # held by failed requests, or by those who shared with them
        self._to_clear: list[int] = []  # dirty, and held by nobody any more
        self._num_copied_blocks = 0
        self._num_cleared_blocks = 0

    # --- how much there is ---

    @property
    def num_free_blocks(self) -> int:
        """Blocks that may be had now; idle prefixes give way."""
        return self._pool.num_free_blocks + self._index.num_idle_blocks

    @property
    def num_idle_blocks(self) -> int:
        return self._index.num_idle_blocks

    @property
    def num_retired_blocks(self) -> int:
        """Blocks that become free when steps in flight complete."""
        return sum(
            self._refs[block] == 1
            for entries in self._retired.values()
            for entry in entries
            for block in entry.table.blocks
        )

    def counters(self) -> KVCounters:
        return KVCounters(
            num_idle_blocks=self._index.num_idle_blocks,
            num_claimed_blocks=self._pool.num_free_blocks - self._pool.num_unclaimed_blocks,
            longest_free_run_blocks=self._pool.longest_run,
            num_stolen_blocks=self._pool.num_stolen_blocks,
            num_evicted_blocks=self._index.num_evicted_blocks,
            num_copied_blocks=self._num_copied_blocks,
            num_cleared_blocks=self._num_cleared_blocks,
        )

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.geometry.block_size)

    def missing_blocks(self, request_id: RequestId, num_tokens: int) -> int:
        """Return how many blocks the request lacks to hold `num_tokens` tokens."""
        table = self._tables.get(request_id)
        return max(0, self.blocks_for(num_tokens) - (len(table.blocks) if table else 0))

    def num_slots(self, request_id: RequestId) -> int:
        """Return how many tokens the request's blocks have room for."""
        return len(self._tables[request_id].blocks) * self.geometry.block_size

    def num_blocks_gained(self, request_id: RequestId, hit: Hit) -> int:
        """Return how many blocks this request's leaving gives to one that finds `hit`."""
        return sum(
            self._refs[block] == 1 and block not in hit.blocks and block != hit.partial
            for block in self._tables[request_id].blocks
        )

    # --- prefixes ---

    def find(self, keys: Sequence[Key], tail: Key | None, num_tokens: int) -> Hit:
        """Return how much of `num_tokens` known tokens is there; at least one is left to compute.

        `keys` are those of the full blocks, `tail` that of the tokens behind them, if it is known.
        """
        size = self.geometry.block_size
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        partial: int | None = None
        if len(blocks) == len(keys):
            if tail is not None:
                partial = self._index.get(tail)
            elif len(blocks) * size == num_tokens:
                # All is there, but the last token's logits are not: it is computed in a copy.
                partial = blocks.pop()
        if partial is None or num_tokens - 1 == len(blocks) * size:  # a copy would gain nothing
            return Hit(tuple(blocks), None, len(blocks) * size)
        return Hit(tuple(blocks), partial, num_tokens - 1)

    def num_idle_in(self, hit: Hit) -> int:
        """Return how many blocks of the hit are idle, and so cannot give way any more."""
        touched = hit.blocks if hit.partial is None else (*hit.blocks, hit.partial)
        return sum(self._index.is_idle(block) for block in touched)

    def adopt(self, request_id: RequestId, hit: Hit, step_id: int) -> None:
        """Begin the request's table with what was found.

        The block to be copied is held until the step that copies it has completed.
        """
        if request_id in self._tables:
            raise InvariantError(f"{request_id} holds blocks already")
        self._hold(hit.blocks)
        self._tables[request_id] = BlockTable(hit.blocks)
        if hit.partial is not None:
            self._hold((hit.partial,))
            self._retire(step_id, request_id, BlockTable((hit.partial,)))
            self._num_copied_blocks += 1

    def publish(self, request_id: RequestId, index: int, key: Key) -> None:
        """Let others find block `index` of the request's table: its tokens are computed."""
        block = self._tables[request_id].blocks[index]
        if block not in self._dirty:
            self._index.insert(key, block)

    def unpublish(self, keys: Iterable[Key]) -> None:
        """Let nobody find what these keys lead to."""
        for key in keys:
            block = self._index.forget(key)
            if block is not None and self._index.is_idle(block) and not self._index.holds(block):
                self._index.unpark(block)
                self._pool.release(BlockGroup(block, 1))

    # --- blocks come and go ---

    def cover(
        self, request_id: RequestId, num_tokens: int, max_num_tokens: int
    ) -> tuple[BlockGroup, ...] | None:
        """Grow the request's table until it holds `num_tokens` of at most `max_num_tokens`.

        Returns the blocks added, in order (none when they fit already), or None when blocks lack,
        and then nothing has changed.
        """
        num_blocks = self.blocks_for(num_tokens)
        table = self._tables.get(request_id) or BlockTable()
        missing = num_blocks - len(table.blocks)
        if missing <= 0:
            return ()
        if missing > self.num_free_blocks:
            return None
        slack = min(SLACK_BLOCKS, self.blocks_for(max_num_tokens) - num_blocks)
        after = table.end
        if not table.has_own and self._pool.claim_at(after):
            after = None  # the claim of the request that the last block was found at
        if self._pool.length_at(after) < missing:
            self._make_room(missing, after, slack)
        groups = self._pool.allocate(missing, after, slack)
        if groups is None:
            raise InvariantError(f"{missing} blocks are free and cannot be had")
        self._tables[request_id] = table
        table.extend(groups)
        for block in table.blocks[-missing:]:
            self._refs[block] = 1
        return groups

    def release(self, request_id: RequestId) -> None:
        """Let the request's blocks go; a request without blocks is no error."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._let_go(table)

    def retire(self, request_id: RequestId, step_id: int) -> None:
        """Take all blocks from the request; they are let go when the step has completed."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._retire(step_id, request_id, table)

    def step_completed(self, step_id: int) -> None:
        """Let go what was retired until this step."""
        for entry in self._retired.pop(step_id, ()):
            self._let_go(entry.table)

    def taint(self, request_id: RequestId) -> None:
        """What the request holds, and what was retired from it, may be garbage (I4)."""
        tables = [
            entry.table
            for entries in self._retired.values()
            for entry in entries
            if entry.request_id == request_id
        ]
        if request_id in self._tables:
            tables.append(self._tables[request_id])
        for table in tables:
            for block in table.blocks:
                self._index.drop(block)
            self._dirty.update(table.blocks)

    def take_clears(self) -> tuple[BlockGroup, ...]:
        """Return what the next step has to set to zero first; it is free from then on."""
        groups = to_groups(sorted(self._to_clear))
        for group in groups:
            self._pool.release(group)
        self._num_cleared_blocks += len(self._to_clear)
        self._to_clear.clear()
        return groups

    def check_idle(self) -> None:
        """Raise InvariantError unless all blocks are free, cached, or free once cleared."""
        num_free = self._pool.num_free_blocks + self._index.num_idle_blocks + len(self._to_clear)
        if self._tables or self._retired or self._dirty or num_free != self.geometry.num_blocks:
            raise InvariantError(
                f"idle, but {len(self._tables)} tables and {len(self._retired)} leases are open, "
                f"and {num_free} of {self.geometry.num_blocks} blocks are accounted for"
            )

    # --- for dumps and tests ---

    def state(self) -> dict[str, Any]:
        return {
            "num_blocks": self.geometry.num_blocks,
            "block_size": self.geometry.block_size,
            "tables": {
                request_id: [list(group) for group in groups]
                for request_id, groups in self.tables().items()
            },
            "leases": {
                str(step_id): [
                    {"request_id": e.request_id, "groups": [list(g) for g in e.table.groups]}
                    for e in entries
                ]
                for step_id, entries in self._retired.items()
            },
            "fragmentation": self._fragmentation(),
            "free_runs": [list(run) for run in self.free_runs()],
            "claims": [list(run) for run in self._pool.claims()],
            "idle": [list(group) for group in self.idle()],
            "to_clear": [list(group) for group in self.to_clear()],
        }

    def groups(self, request_id: RequestId) -> tuple[BlockGroup, ...]:
        """Return the request's blocks in token order."""
        return self._tables[request_id].groups

    def tables(self) -> dict[RequestId, tuple[BlockGroup, ...]]:
        return {request_id: table.groups for request_id, table in self._tables.items()}

    def retired(self) -> tuple[BlockGroup, ...]:
        """Return the groups that steps in flight still touch and that no table holds for them."""
        return tuple(
            group
            for entries in self._retired.values()
            for entry in entries
            for group in entry.table.groups
        )

    def free_runs(self) -> tuple[BlockGroup, ...]:
        return self._pool.free_runs()

    def idle(self) -> tuple[BlockGroup, ...]:
        """Return the cached prefixes that no table holds, by position."""
        return to_groups(sorted(self._index.idle_blocks()))

    def to_clear(self) -> tuple[BlockGroup, ...]:
        return to_groups(sorted(self._to_clear))

    # --- how ---

    def _fragmentation(self) -> dict[str, float]:
        """Return how long groups and free runs are, in blocks."""
        tables = self._tables.values()
        num_groups = sum(len(table.groups) for table in tables)
        num_blocks = sum(len(table.blocks) for table in tables)
        return {
            "num_groups": num_groups,
            "mean_group_blocks": num_blocks / num_groups if num_groups else 0.0,
            "num_free_runs": len(self._pool.free_runs()),
            "longest_free_run_blocks": self._pool.longest_run,
        }

    def _make_room(self, num_blocks: int, after: int | None, slack: int) -> None:
        """Evict idle prefixes until blocks behind `after` can be had, in one run if possible.

        Claims of others are left alone as long as something is idle. Once the reserve is free, in
        runs that are too short, no more is evicted than must be.
        """
        pool = self._pool
        needed = num_blocks - pool.claim_at(after)
        wanted = num_blocks - pool.length_at(after) + slack
        reserve = self.geometry.num_blocks // RESERVE_PART
        while True:
            num_free = pool.num_unclaimed_blocks
            has_reserve = num_free >= reserve
            if num_free >= needed and (has_reserve or pool.longest_run >= wanted):
                return
            run = self._index.evict(needed - num_free if has_reserve else wanted)
            if run is None:
                return
            pool.release(run)

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._index.is_idle(block):
                self._index.unpark(block)
            self._refs[block] += 1

    def _retire(self, step_id: int, request_id: RequestId, table: BlockTable) -> None:
        self._retired.setdefault(step_id, []).append(_Retired(request_id, table))

    def _let_go(self, table: BlockTable) -> None:
        if table.has_own and table.end is not None:
            self._pool.unclaim(table.end)  # others may go on with its last block, not with this
        idle: list[int] = []
        free: list[int] = []
        for block in table.blocks:
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._dirty:
                self._dirty.remove(block)
                self._to_clear.append(block)
            elif self._index.holds(block):
                idle.append(block)
            else:
                free.append(block)
        if idle:
            self._index.park(idle)
        for group in to_groups(free):
            self._pool.release(group)
