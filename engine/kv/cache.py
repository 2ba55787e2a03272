"""The KV memory of the device tier: one tensor in which a block holds all layers.

Layout `[block, layer, k|v, kv_head, slot, head_dim]`: a block group is one contiguous range of
bytes, so a swap or a migration of a group is one copy; attention sees a strided view per layer.

Shape legend: T tokens, G key/value heads, D head size.
"""

from __future__ import annotations

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

    def __init__(self, shape: ModelShape, geometry: KVGeometry) -> None:
        self.geometry = geometry
        self.scratch_block = geometry.num_blocks
        self._kv = _zeros(
            (
                geometry.num_blocks + 1,
                shape.num_layers,
                2,
                shape.num_kv_heads,
                geometry.block_size,
                shape.head_dim,
            ),
            shape.dtype,
            shape.device,
        )

    def clear(self, groups: Sequence[BlockGroup]) -> None:
        """Set blocks to zero."""
        for start, num_blocks in groups:
            self._kv[start : start + num_blocks].zero_()

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy the first tokens of blocks, in order."""
        for source, target, num_tokens in copies:
            self._kv[target, ..., :num_tokens, :] = self._kv[source, ..., :num_tokens, :]

    def write(
        self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGD: Tensor, v_TGD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put each token's key and value into its slot; return the views of `layer`."""
        key_cache, value_cache = self.layer(layer)
        at = (blocks_T, slice(None), offsets_T)
        key_cache[at] = k_TGD
        value_cache[at] = v_TGD
        return key_cache, value_cache

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of the keys and the values, each [block, kv_head, slot, head_dim]."""
        return self._kv[:, layer, 0], self._kv[:, layer, 1]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU in pages that take memory only when they are first written.

    The zeros matter: attention multiplies slots past a request's end by a weight of zero, and
    zero times the NaN that uninitialised memory may hold is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_elements = torch.Size(size).numel()
    pages = mmap.mmap(-1, num_elements * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype, count=num_elements).view(size)
