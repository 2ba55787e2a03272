"""Paged attention in torch's operators: the oracle of every faster backend.

Blocks are gathered into one scratch memory, which SDPA reads in place. Requests that compute a
single token go through one call for each group of similar length, padded to the group's longest;
a chunk is gathered once and goes through one call for each piece of it.

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
from engine.models.slices import ModelShape

# Query rows of one SDPA call. A piece sees only the keys up to its own end, so small pieces skip
# more of the masked triangle and bound the mask: 256 x 8192 numbers are 4 MiB in bf16.
PIECE = 256
# A group's longest request has at most this many times the blocks of its shortest, so padding at
# most doubles the keys read. One group for all lengths took ten times as long on 3 to 3,000 tokens.
SPREAD = 1.5


@dataclass(frozen=True, slots=True)
class _Singles:
    """Requests of similar length that compute one token."""

    tokens_R: Tensor | slice  # indices into T; a slice is read in place
    blocks_RB: Tensor
    mask_R11C: Tensor  # 0 where a key counts, else -inf


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to PIECE consecutive tokens of one request."""

    start: int  # into T
    end: int
    num_keys: int  # up to its own last
    mask_MC: Tensor | None  # None: causal, from the request's first token


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A request that computes several tokens."""

    blocks_1B: Tensor
    pieces: list[_Piece]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One step, on the device."""

    write_blocks_T: Tensor
    write_offsets_T: Tensor
    singles: list[_Singles]
    chunks: list[_Chunk]


class ReferenceAttention:
    """See `engine.attention.protocol`."""

    capturable = False  # the shapes depend on the context lengths

    def __init__(self, cache: KVCache, shape: ModelShape) -> None:
        self._cache = cache
        self._shape = shape
        self._block_size = cache.geometry.block_size
        self._scratch = torch.empty(0, dtype=shape.dtype, device=shape.device)

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
            chunks=[self._prepare_chunk(batch, row) for row in chunked.tolist()],
        )

    def attend(
        self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, prepared: Prepared
    ) -> Tensor:
        kv = self._cache.write(
            layer, prepared.write_blocks_T, prepared.write_offsets_T, k_TGD, v_TGD
        )
        q_TGND = torch.unflatten(q_THD, 1, (k_TGD.shape[1], -1))
        out_TGND = torch.empty_like(q_TGND, memory_format=torch.contiguous_format)
        for s in prepared.singles:
            k_RGCD, v_RGCD = self._gather(kv, s.blocks_RB)
            # The query heads of a key head are its rows.
            out_TGND[s.tokens_R] = F.scaled_dot_product_attention(
                q_TGND[s.tokens_R], k_RGCD, v_RGCD, s.mask_R11C
            )
        for chunk in prepared.chunks:
            k_1GCD, v_1GCD = self._gather(kv, chunk.blocks_1B)
            for piece in chunk.pieces:
                # The query heads of a key head are a batch, all of which see the same keys.
                q_NGMD = q_TGND[piece.start : piece.end].permute(2, 1, 0, 3)
                k_NGCD, v_NGCD = (
                    x_1GCD[:, :, : piece.num_keys].expand(len(q_NGMD), -1, -1, -1)
                    for x_1GCD in (k_1GCD, v_1GCD)
                )
                attended_NGMD = F.scaled_dot_product_attention(
                    q_NGMD, k_NGCD, v_NGCD, piece.mask_MC, is_causal=piece.mask_MC is None
                )
                out_TGND[piece.start : piece.end] = attended_NGMD.permute(2, 1, 0, 3)
        return out_TGND.flatten(1, 2)

    def _gather(self, kv: Tensor, blocks_RB: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each RGCD, in memory that the next call overwrites.

        Fresh memory is why this does not allocate: a new page costs more than what is copied there.
        """
        size = (blocks_RB.numel(), *kv.shape[1:])
        num_elements = torch.Size(size).numel()
        if num_elements > len(self._scratch):
            self._scratch = self._scratch.new_empty(1 << (num_elements - 1).bit_length())
        gathered = self._scratch[:num_elements].view(size)
        torch.index_select(kv, 0, blocks_RB.flatten(), out=gathered)
        gathered_RC2GD = gathered.view(len(blocks_RB), -1, *kv.shape[2:])
        k_RGCD, v_RGCD = gathered_RC2GD.permute(2, 0, 3, 1, 4)
        return k_RGCD, v_RGCD

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
        tokens_R = batch.query_start_R1[rows_R]
        is_run = bool((np.diff(tokens_R) == 1).all())
        return _Singles(
            tokens_R=slice(int(tokens_R[0]), int(tokens_R[-1]) + 1)
            if is_run
            else self._to_device(tokens_R),
            blocks_RB=self._to_device(blocks_RB),
            mask_R11C=self._mask(positions_C < seq_len_R[:, None])[:, None, None],
        )

    def _prepare_chunk(self, batch: ForwardBatch, row: int) -> _Chunk:
        first, behind = batch.query_start_R1[row : row + 2].tolist()
        seq_len = int(batch.seq_len_R[row])
        pieces = []
        for start in range(first, behind, PIECE):
            end = min(start + PIECE, behind)
            num_keys = seq_len - (behind - end)
            mask_MC = None
            if num_keys > end - start:
                positions_M1 = np.arange(num_keys - (end - start), num_keys)[:, None]
                mask_MC = self._mask(np.arange(num_keys) <= positions_M1)
            pieces.append(_Piece(start, end, num_keys, mask_MC))
        num_blocks = -(-seq_len // self._block_size)
        blocks_1B = self._to_device(batch.block_table_RB[row : row + 1, :num_blocks])
        return _Chunk(blocks_1B, pieces)

    def _mask(self, counts: np.ndarray) -> Tensor:
        """Return what SDPA would make of a mask of booleans, in every layer anew."""
        shape = self._shape
        mask = torch.zeros(counts.shape, dtype=shape.dtype, device=shape.device)
        return mask.masked_fill_(self._to_device(~counts), -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(
            self._shape.device, non_blocking=True
        )
