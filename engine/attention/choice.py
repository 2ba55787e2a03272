"""Which attention backend goes with which slices, and the KV memory that the two agree on."""

from __future__ import annotations

from engine.attention.invariant import InvariantAttention
from engine.attention.native import NativeAttention
from engine.attention.protocol import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.kernels.llama import NativeLlama
from engine.kv.cache import KVCache
from engine.models.invariant import meet_weights
from engine.models.slices import DenseSlices
from scheduler.types import KVGeometry


def with_attention(
    model: DenseSlices, geometry: KVGeometry, *, batch_invariant: bool = False
) -> tuple[KVCache, AttentionBackend]:
    """Return KV memory and the backend that reads it.

    Native kernels are invariant whether asked or not; torch's have to be proven, which raises
    NotReproducible where it fails.
    """
    if isinstance(model, NativeLlama):
        cache = KVCache(model.shape, geometry, is_packed=True)
        return cache, NativeAttention(cache, model)
    cache = KVCache(model.shape, geometry)
    if batch_invariant:
        meet_weights(model)
        return cache, InvariantAttention(cache, model.shape)
    return cache, ReferenceAttention(cache, model.shape.device)
