"""From tokens to the attention of the last layer: the slices of a model in turn, whole batches.

Owns the plain way of it. Kernels that know both a model and its attention bring one of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.attention.protocol import AttentionBackend
from engine.models.slices import Carry, DenseSlices

# Of token_ids_T, positions_T and what `AttentionBackend.prepare` returned: what `last` takes.
Forward = Callable[[Tensor, Tensor, Any], tuple[Carry, Tensor]]


def by_slices(model: DenseSlices, attention: AttentionBackend) -> Forward:
    """Return a way that calls each slice and each layer's attention by itself."""

    def forward(token_ids_T: Tensor, positions_T: Tensor, prepared: Any) -> tuple[Carry, Tensor]:
        carry, qkv = model.first(token_ids_T, positions_T)
        attended_THD = attention.attend(0, *qkv, prepared)
        for layer in range(1, model.shape.num_layers):
            carry, qkv = model.middle(layer, carry, attended_THD)
            attended_THD = attention.attend(layer, *qkv, prepared)
        return carry, attended_THD

    return forward
