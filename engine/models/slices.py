"""What a model is to the engine: L + 1 dense slices with attention between them.

`first` embeds and projects q, k, v of layer 0; `middle` takes the attention output of layer l - 1,
runs its output projection and MLP, and projects q, k, v of layer l; `last` ends in logits. RoPE
belongs to the slices; keys and values are written by the attention stage, so the same slices serve
local and remote attention. Every way of running a model is a schedule over these three calls.

Shape legend: T tokens, E hidden size, H query heads, G key/value heads, D head size, S sampled
rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the rest of the engine must know of a model's dimensions."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Carry(Protocol):
    """What one slice hands to the next, for the same tokens: a family's own affair but for this."""

    @property
    def residual_TE(self) -> Tensor: ...  # noqa: N802


class Projected(NamedTuple):
    """What a slice hands to attention, RoPE applied."""

    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor


class DenseSlices(Protocol):
    """A model family implements this and nothing else; it never sees attention or KV memory.

    What a call returns may be memory of the model's own, which later calls overwrite: the carry and
    the projections are good until the next call for the same batch, the logits for ever.
    """

    @property
    def shape(self) -> ModelShape: ...

    def first(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Carry, Projected]:
        """Embed, and project layer 0."""
        ...

    def middle(self, layer: int, carry: Any, attended_THD: Tensor) -> tuple[Carry, Projected]:
        """Finish layer - 1 with its attention output, and project `layer` (1 to L - 1)."""
        ...

    def last(self, carry: Any, attended_THD: Tensor, tokens_S: Tensor) -> Tensor:
        """Finish layer L - 1 and return fp32 logits_SV of the tokens with these indices into T.

        They may lie in memory that the next call uses again.
        """
        ...
