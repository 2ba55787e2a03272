"""What goes with which slices: KV memory, the attention that reads it, kernels for rows."""

from __future__ import annotations

from dataclasses import dataclass

from engine.attention.invariant import InvariantAttention
from engine.attention.native import NativeAttention
from engine.attention.protocol import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.kernels.llama import NativeLlama
from engine.kernels.rows import NativeRows
from engine.kv.cache import KVCache
from engine.models.invariant import meet_weights
from engine.models.slices import DenseSlices
from engine.rows import RowKernels, TorchRows
from scheduler.types import KVGeometry


@dataclass(frozen=True, slots=True)
class Backend:
    """Parts that agree with each other on where and how keys and values lie."""

    cache: KVCache
    attention: AttentionBackend
    rows: RowKernels


def backend_of(
    model: DenseSlices, geometry: KVGeometry, *, batch_invariant: bool = False
) -> Backend:
    """Native kernels are batch-invariant whether asked or not; torch's have to be proven, which
    raises NotReproducible where it fails.
    """
    if isinstance(model, NativeLlama):
        cache = KVCache(model.shape, geometry, is_packed=True)
        return Backend(cache, NativeAttention(cache, model), NativeRows(model.machine))
    cache = KVCache(model.shape, geometry)
    if batch_invariant:
        meet_weights(model)
        return Backend(cache, InvariantAttention(cache, model.shape), TorchRows())
    return Backend(cache, ReferenceAttention(cache, model.shape.device), TorchRows())
