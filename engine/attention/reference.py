"""Paged attention in plain torch operators: the oracle of every faster backend.

Keys and values are gathered through the block table and go through one SDPA call: one for each
group of requests that compute a single token and are of similar length, padded to the longest of
the group, and one per piece of a chunk.

Shape legend: T tokens, H query heads, G key/value heads, N = H / G query heads of one of those, D
head size, C context (keys), R requests with a single token, B blocks, Z slots of a block, M
tokens of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import ForwardBatch
from engine.kv.cache import KVCache

# Query rows of one SDPA call. A piece sees only the keys up to its own end, so small pieces skip
# more of the masked triangle and bound the mask: 256 x 8192 booleans are 2 MiB.
PIECE = 256
# A group's longest request has at most this many times the blocks of its shortest, so padding at
# most doubles the keys read. One group for all lengths took ten times as long on 3 to 3,000 tokens.
SPREAD = 1.5


@dataclass(frozen=True, slots=True)
class _Singles:
    """Requests of similar length that compute one token."""

    tokens_R: Tensor  # indices into T
    blocks_RB: Tensor
    mask_R11C: Tensor  # true where a key counts


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to PIECE consecutive tokens of one request."""

    start: int  # into T
    end: int
    blocks_B: Tensor  # as many as hold its keys
    mask_MC: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """One step, on the device."""

    write_blocks_T: Tensor
    write_offsets_T: Tensor
    singles: list[_Singles]
    pieces: list[_Piece]


class ReferenceAttention:
    """See `engine.attention.protocol`."""

    capturable = False  # the shapes depend on the context lengths

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self._cache = cache
        self._device = device
        self._block_size = cache.geometry.block_size

    def prepare(self, batch: ForwardBatch) -> Prepared:
        length_R = np.diff(batch.query_start_R1)
        singles = np.flatnonzero(length_R == 1)
        chunked = np.flatnonzero(length_R > 1)
        blocks_T, offsets_T = np.divmod(batch.slots_T, self._block_size)
        return Prepared(
            write_blocks_T=self._to_device(blocks_T),
            write_offsets_T=self._to_device(offsets_T),
            singles=[
                self._prepare_singles(batch, rows_R) for rows_R in self._alike(batch, singles)
            ],
            pieces=[piece for row in chunked.tolist() for piece in self._pieces(batch, row)],
        )

    def attend(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, prepared: Prepared
    ) -> Tensor:
        key_cache, value_cache = self._cache.write(
            layer, prepared.write_blocks_T, prepared.write_offsets_T, k_TGD, v_TGD
        )
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for s in prepared.singles:
            k_RGCD, v_RGCD = (
                cache[s.blocks_RB].transpose(1, 2).flatten(2, 3)
                for cache in (key_cache, value_cache)
            )
            q_RGND = _by_group(q_THD[s.tokens_R], k_TGD.shape[1])
            attended_RGND = F.scaled_dot_product_attention(q_RGND, k_RGCD, v_RGCD, s.mask_R11C)
            out_THD[s.tokens_R] = attended_RGND.flatten(1, 2)
        for piece in prepared.pieces:
            out_THD[piece.start : piece.end] = _attend_piece(
                q_THD[piece.start : piece.end], key_cache, value_cache, piece
            )
        return out_THD

    def _alike(self, batch: ForwardBatch, rows_R: np.ndarray) -> list[np.ndarray]:
        """Split rows into groups of similar length."""
        rows_R = rows_R[np.argsort(batch.seq_len_R[rows_R], kind="stable")]
        num_blocks_R = -(-batch.seq_len_R[rows_R] // self._block_size)
        groups, start = [], 0
        while start < len(rows_R):
            longest = int(SPREAD * num_blocks_R[start])
            end = int(np.searchsorted(num_blocks_R, longest, side="right"))
            groups.append(rows_R[start:end])
            start = end
        return groups

    def _prepare_singles(self, batch: ForwardBatch, rows_R: np.ndarray) -> _Singles:
        seq_len_R = batch.seq_len_R[rows_R]
        num_blocks_R = -(-seq_len_R // self._block_size)
        # Past a row's own blocks the table is stale: repeat its last block there (masked anyway).
        columns_RB = np.minimum(np.arange(num_blocks_R.max()), num_blocks_R[:, None] - 1)
        blocks_RB = np.take_along_axis(batch.block_table_RB[rows_R], columns_RB, axis=1)
        positions_C = np.arange(num_blocks_R.max() * self._block_size)
        return _Singles(
            tokens_R=self._to_device(batch.query_start_R1[rows_R]),
            blocks_RB=self._to_device(blocks_RB),
            mask_R11C=self._to_device((positions_C < seq_len_R[:, None])[:, None, None]),
        )

    def _pieces(self, batch: ForwardBatch, row: int) -> list[_Piece]:
        first, behind = batch.query_start_R1[row : row + 2].tolist()
        pieces = []
        for start in range(first, behind, PIECE):
            end = min(start + PIECE, behind)
            seq_len = int(batch.seq_len_R[row]) - (behind - end)
            num_blocks = -(-seq_len // self._block_size)
            positions_M1 = np.arange(seq_len - (end - start), seq_len)[:, None]
            mask_MC = np.arange(num_blocks * self._block_size) <= positions_M1
            pieces.append(
                _Piece(
                    start=start,
                    end=end,
                    blocks_B=self._to_device(batch.block_table_RB[row, :num_blocks]),
                    mask_MC=self._to_device(mask_MC),
                )
            )
        return pieces

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _attend_piece(q_MHD: Tensor, key_cache: Tensor, value_cache: Tensor, piece: _Piece) -> Tensor:
    """Return MHD. The N query heads of a key head become its rows, so no key is copied."""
    k_GCD, v_GCD = (
        cache[piece.blocks_B].transpose(0, 1).flatten(1, 2) for cache in (key_cache, value_cache)
    )
    num_groups = k_GCD.shape[0]
    q_GXD = _by_group(q_MHD, num_groups).permute(1, 2, 0, 3).flatten(1, 2)  # X = N M
    mask_XC = piece.mask_MC.repeat(q_MHD.shape[1] // num_groups, 1)
    attended_GXD = F.scaled_dot_product_attention(q_GXD[None], k_GCD[None], v_GCD[None], mask_XC)[0]
    attended_GNMD = attended_GXD.view(num_groups, -1, *q_MHD.shape[::2])
    return attended_GNMD.permute(2, 0, 1, 3).flatten(1, 2)


def _by_group(q_THD: Tensor, num_groups: int) -> Tensor:
    """Split the query heads by the key head that they read: THD to TGND."""
    num_tokens, num_heads, head_dim = q_THD.shape
    return q_THD.reshape(num_tokens, num_groups, num_heads // num_groups, head_dim)
