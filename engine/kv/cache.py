"""The KV memory of the device tier: one tensor in which a block holds all layers.

Layout `[block, layer, slot, k|v, kv_head, head_dim]`: a block group is one contiguous range of
bytes, so a swap or a migration of a group is one copy. So is a block of one layer, and gathered
blocks are a row of tokens with one stride, which SDPA takes as it is.

Packed, for the native kernels, it is `[block, layer, k|v, kv_head, slot, head_dim]` with the
innermost two put otherwise, so that both products of attention read whole vectors: keys
[D / P][slot][P] and values [slot / P][D][P], where P numbers are 32 bits.

Shape legend: T tokens, G key/value heads, D head size, P numbers of 32 bits.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.slices import ModelShape
from scheduler.instance.plan import BlockCopy
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry


def kv_geometry(shape: ModelShape, block_size: int, num_bytes: int) -> KVGeometry:
    """Return how many blocks of `block_size` tokens fit into `num_bytes`."""
    block_bytes = block_size * shape.kv_token_bytes
    return KVGeometry(
        block_size=block_size, num_blocks=num_bytes // block_bytes, block_bytes=block_bytes
    )


class KVCache:
    """Owns the tensor; who may write which block is decided by the plans.

    One block more than the geometry says: `scratch_block` is no request's, for computing what
    nobody asked for.
    """

    def __init__(self, shape: ModelShape, geometry: KVGeometry, *, is_packed: bool = False) -> None:
        self.geometry = geometry
        self.is_packed = is_packed
        self.scratch_block = geometry.num_blocks
        inner = (2, shape.num_kv_heads, geometry.block_size, shape.head_dim)
        if not is_packed:
            inner = (geometry.block_size, 2, shape.num_kv_heads, shape.head_dim)
        self._kv = _zeros(
            (geometry.num_blocks + 1, shape.num_layers, *inner), shape.dtype, shape.device
        )

    def clear(self, groups: Sequence[BlockGroup]) -> None:
        """Set blocks to zero."""
        for start, num_blocks in groups:
            self._kv[start : start + num_blocks].zero_()

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy the first tokens of blocks, in order."""
        for source, target, num_tokens in copies:
            for from_, to in zip(
                self._tokens(source, num_tokens), self._tokens(target, num_tokens), strict=True
            ):
                to.copy_(from_)

    def write(
        self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGD: Tensor, v_TGD: Tensor
    ) -> Tensor:
        """Put each token's key and value into its slot; return the view of `layer`.

        It is [block, slot, k|v, kv_head, head_dim], contiguous but for the blocks.
        """
        assert not self.is_packed
        kv = self._kv[:, layer]
        kv[blocks_T, offsets_T] = torch.stack((k_TGD, v_TGD), dim=1)
        return kv

    def blocks(self) -> Sequence[Tensor]:
        """Return all of each block's numbers."""
        return self._kv.unbind(0)

    def strides(self) -> tuple[int, int, int, int, int]:
        """Return the address, and the distance in numbers of blocks, layers, k and v, heads."""
        assert self.is_packed
        return self._kv.data_ptr(), *self._kv.stride()[:4]  # type: ignore[return-value]

    def _tokens(self, block: int, num_tokens: int) -> list[Tensor]:
        """Return views that are all of the first tokens of a block."""
        kv = self._kv[block]
        if not self.is_packed:
            return [kv[:, :num_tokens]]
        num_slots, head_dim = kv.shape[-2:]
        pair = 4 // kv.dtype.itemsize
        num_whole, rest = divmod(num_tokens, pair)
        keys_LGX, values_LGX = kv[:, 0].flatten(-2), kv[:, 1].flatten(-2)
        keys = torch.unflatten(keys_LGX, -1, (head_dim // pair, num_slots, pair))
        values = torch.unflatten(values_LGX, -1, (num_slots // pair, head_dim, pair))
        views = [keys[..., :num_tokens, :], values[:, :, :num_whole]]
        if rest:
            views.append(values[:, :, num_whole, :, :rest])
        return views


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU in pages that take memory only when they are first written.

    The zeros matter: attention multiplies slots past a request's end by a weight of zero, and
    zero times the NaN that uninitialised memory may hold is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_elements = torch.Size(size).numel()
    num_bytes = num_elements * dtype.itemsize
    # A block's keys and values of one layer fill a page or two. With pages of 2 MiB the processor
    # finds them without a walk: attention of 32 requests took three quarters of the time.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=num_elements).view(size)
