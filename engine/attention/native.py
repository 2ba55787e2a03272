"""Attention over blocks in place, in native kernels: nothing is gathered or padded.

The keys of a row are taken in parts at fixed positions and merged in order, so what a row becomes
depends on nobody else, bit for bit.

Shape legend: as in `engine.attention.protocol`; T tokens, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.kernels.llama import NativeCarry, NativeLlama
from engine.kernels.native import extension
from engine.kv.cache import KVCache


@dataclass(frozen=True, slots=True)
class Prepared:
    """The work of one step, cut up, and the memory of its output."""

    plan: Any
    out_THD: Tensor


class NativeAttention:
    """See `engine.attention.protocol`."""

    capturable = False

    def __init__(self, cache: KVCache, model: NativeLlama) -> None:
        assert cache.is_packed
        self._cache = cache  # known to the kernels by address
        self._model = model
        self._shape = shape = model.shape
        self._dtype = model.activation_dtype
        address, block, layer, value, head = cache.strides()
        self._attention = extension().PagedAttention(
            model.machine,
            address,
            block,
            layer,
            value,
            head,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
        )

    def prepare(self, batch: ForwardBatch) -> Prepared:
        plan = self._attention.prepare(
            batch.query_start_R1,
            batch.seq_len_R,
            batch.slots_T,
            np.ascontiguousarray(batch.block_table_RB),
        )
        shape = self._shape
        size = len(batch.slots_T), shape.num_heads, shape.head_dim
        return Prepared(plan, torch.empty(size, dtype=self._dtype))

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        prepared: Prepared,
        *,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        """Fills `lse_TH`, fp32, with the log-sum-exp of the scores where it is given."""
        out_THD = prepared.out_THD
        self._attention.attend(
            layer,
            prepared.plan,
            q_THD.data_ptr(),
            k_TGD.data_ptr(),
            v_TGD.data_ptr(),
            q_THD.stride(0),
            out_THD.data_ptr(),
            0 if lse_TH is None else lse_TH.data_ptr(),
        )
        return out_THD

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, prepared: Prepared
    ) -> tuple[NativeCarry, Tensor]:
        """See `engine.forward`: all slices and the attention between them in one call."""
        carry = self._model.forward(
            token_ids_T, positions_T, self._attention, prepared.plan, prepared.out_THD
        )
        return carry, prepared.out_THD
