"""Attention whose bits, for one token, depend on that token's own history alone.

Keys are split at fixed positions, whatever the chunk, the batch or the prefix that was found; see
`engine.attention.splits` for the arithmetic. Owns how a step is cut into such work: items of a few
tokens of one request and one split, gathered from the blocks, as many at a time as caches like.
bfloat16 models are attended to in fp32: q, k and v are exact in it, and the output is rounded once.

Shape legend: T tokens, H query heads, G key/value heads, N = H / G, D head size, W items (token
tile and split), X token tiles, C tokens of a tile, L = N C query rows of one key head and some
padding, S keys of a split, B blocks of a split, Z slots of a block, J splits of a tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.splits import Parts, attend_split, merge, verified_ladder
from engine.batch import ForwardBatch
from engine.kv.cache import KVCache
from engine.models.slices import ModelShape
from engine.row_ladder import SIZES, tiles

SPLIT = 256  # keys; 16 blocks of 16
# Elements of the largest tensor of one call, keys or scores: 4 MiB each, which a cache can hold.
_CALL_ELEMENTS = 1 << 20


class _Tile(NamedTuple):
    """Tokens [start, start + length) of T: consecutive ones of one row, from `position`."""

    row: int
    start: int
    length: int
    position: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Tiles that are computed with the same number of tokens; short ones repeat their last."""

    tokens_XC: Tensor  # indices into T
    tile_W: Tensor  # index into X
    blocks_WB: Tensor
    hidden_WCS: Tensor  # true where a key lies behind the token
    index_XJ: Tensor  # the items of a tile, indices into W
    num_splits_X: Tensor
    num_padding: int  # rows that fill up L


@dataclass(frozen=True, slots=True)
class Prepared:
    """One step, on the device."""

    write_blocks_T: Tensor
    write_offsets_T: Tensor
    groups: list[_Group]


class InvariantAttention:
    """See `engine.attention.protocol`."""

    capturable = False  # the shapes depend on the context lengths

    def __init__(
        self, cache: KVCache, shape: ModelShape, *, split: int = SPLIT, sizes: Sequence[int] = SIZES
    ) -> None:
        """Raises NotReproducible where this machine cannot keep the promise."""
        self._cache = cache
        self._device = shape.device
        self._block_size = cache.geometry.block_size
        assert split % self._block_size == 0
        self._split = split
        self._groups = shape.num_kv_heads
        self._scale = shape.head_dim**-0.5
        self.ladder = verified_ladder(shape.head_dim, split, shape.device, sizes)
        # Token counts that fill a size of the ladder with the query heads of one key head.
        self._heads = shape.num_heads // shape.num_kv_heads
        self._capacities = sorted(
            {1, *(size // self._heads for size in self.ladder if size >= self._heads)}
        )

    def prepare(self, batch: ForwardBatch) -> Prepared:
        blocks_T, offsets_T = np.divmod(batch.slots_T, self._block_size)
        alike = defaultdict(list)
        for tile in self._tiles(batch):
            alike[next(c for c in self._capacities if c >= tile.length)].append(tile)
        return Prepared(
            write_blocks_T=self._to_device(blocks_T),
            write_offsets_T=self._to_device(offsets_T),
            groups=[self._group(batch, capacity, same) for capacity, same in sorted(alike.items())],
        )

    def attend(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, prepared: Prepared
    ) -> Tensor:
        kv = self._cache.write(
            layer, prepared.write_blocks_T, prepared.write_offsets_T, k_TGD, v_TGD
        )
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for group in prepared.groups:
            q_XCHD = q_THD[group.tokens_XC].to(torch.float32).mul_(self._scale)
            q_XGLD = F.pad(_rows_of_groups(q_XCHD, self._groups), (0, 0, 0, group.num_padding))
            parts = self._parts(q_XGLD, kv, group)
            out_XGLD = merge(parts, group.index_XJ, group.num_splits_X)
            out_XGLD = out_XGLD[:, :, : q_XGLD.shape[2] - group.num_padding]
            # Repeated tokens are written repeatedly, with the same bits.
            out_THD[group.tokens_XC] = _rows_of_tokens(out_XGLD, q_XCHD).to(q_THD.dtype)
        return out_THD

    def _parts(self, q_XGLD: Tensor, kv: Tensor, group: _Group) -> Parts:
        """Return the parts of every item, each WG..."""
        _, num_groups, num_rows, head_dim = q_XGLD.shape
        item_elements = num_groups * self._split * max(num_rows, head_dim)
        num_items = max(1, _CALL_ELEMENTS // item_elements)
        found = []
        for start in range(0, len(group.tile_W), num_items):
            some = slice(start, start + num_items)
            q_YLD = q_XGLD[group.tile_W[some]].flatten(0, 1)
            k_YSD, v_YSD = _gather(kv, group.blocks_WB[some])
            hidden_WLS = group.hidden_WCS[some].repeat_interleave(self._heads, dim=1)
            hidden_WLS = F.pad(hidden_WLS, (0, 0, 0, group.num_padding))
            found.append(attend_split(q_YLD, k_YSD, v_YSD, hidden_WLS, self.ladder))
        one = found[0] if len(found) == 1 else Parts(*map(torch.cat, zip(*found, strict=True)))
        return Parts(*(torch.unflatten(part, 0, (-1, num_groups)) for part in one))

    def _tiles(self, batch: ForwardBatch) -> list[_Tile]:
        largest = self._capacities[-1]
        return [
            _Tile(row, start, min(largest, behind - start), seq_len - (behind - start))
            for row, (first, behind, seq_len) in enumerate(
                zip(
                    batch.query_start_R1[:-1].tolist(),
                    batch.query_start_R1[1:].tolist(),
                    batch.seq_len_R.tolist(),
                    strict=True,
                )
            )
            for start in range(first, behind, largest)
        ]

    def _group(self, batch: ForwardBatch, capacity: int, same: list[_Tile]) -> _Group:
        row_X, start_X, length_X, position_X = np.array(same).T
        ahead_XC = np.minimum(np.arange(capacity), length_X[:, None] - 1)
        last_X = position_X + length_X - 1
        num_splits_X = last_X // self._split + 1
        behind_X = np.cumsum(num_splits_X)
        first_X = behind_X - num_splits_X
        tile_W = np.repeat(np.arange(len(same)), num_splits_X)
        split_W = np.arange(len(tile_W)) - first_X[tile_W]
        # Past a tile's last block the table may be stale: repeat that block (it is hidden anyway).
        blocks, num_rows = self._split // self._block_size, capacity * self._heads
        column_WB = split_W[:, None] * blocks + np.arange(blocks)
        column_WB = np.minimum(column_WB, (last_X // self._block_size)[tile_W, None])
        key_WS = split_W[:, None] * self._split + np.arange(self._split)
        position_WC = (position_X[:, None] + ahead_XC)[tile_W]
        return _Group(
            tokens_XC=self._to_device(start_X[:, None] + ahead_XC),
            tile_W=self._to_device(tile_W),
            blocks_WB=self._to_device(batch.block_table_RB[row_X[tile_W, None], column_WB]),
            hidden_WCS=self._to_device(key_WS[:, None] > position_WC[:, :, None]),
            index_XJ=self._to_device(
                np.minimum(first_X[:, None] + np.arange(num_splits_X.max()), behind_X[:, None] - 1)
            ),
            num_splits_X=self._to_device(num_splits_X),
            num_padding=sum(t.size for t in tiles(num_rows, self.ladder)) - num_rows,
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _gather(kv: Tensor, blocks_WB: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values in fp32, each YSD with Y = W G."""
    gathered_2WGBZD = kv[blocks_WB].permute(3, 0, 4, 1, 2, 5)
    out_2WGBZD = torch.empty(
        gathered_2WGBZD.shape, dtype=torch.float32, device=gathered_2WGBZD.device
    ).copy_(gathered_2WGBZD)
    k_YSD, v_YSD = out_2WGBZD.flatten(3, 4).flatten(1, 2)
    return k_YSD, v_YSD


def _rows_of_groups(q_XCHD: Tensor, num_groups: int) -> Tensor:
    """Let the query heads of one key head become its rows: XGLD."""
    return torch.unflatten(q_XCHD, 2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)


def _rows_of_tokens(out_XGLD: Tensor, like_XCHD: Tensor) -> Tensor:
    """The inverse of `_rows_of_groups`: XCHD."""
    out_XGCND = torch.unflatten(out_XGLD, 2, (like_XCHD.shape[1], -1))
    return out_XGCND.transpose(1, 2).reshape(like_XCHD.shape)
