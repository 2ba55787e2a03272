"""A model on the best kernels there are for it, and what goes with its slices: KV memory, the
attention that reads it, the way through both, kernels for rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention.invariant import InvariantAttention
from engine.attention.native import NativeAttention
from engine.attention.protocol import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.forward import Forward
from engine.kernels.llama import NativeLlama, NotForNative
from engine.kernels.native import NativeKernels, NoKernels, choose
from engine.kernels.rows import NativeRows
from engine.kv.cache import KVCache
from engine.models.invariant import invariant_kernels, meet_weights
from engine.models.kernels import Kernels
from engine.models.onednn import onednn_kernels
from engine.models.registry import load_model, read_config, resolve_dtype
from engine.models.slices import DenseSlices
from engine.rows import RowKernels, TorchRows
from scheduler.types import KVGeometry


def load_best(
    folder: Path,
    dtype: str = "auto",
    device: str = "cpu",
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    batch_invariant: bool = False,
) -> tuple[DenseSlices, str]:
    """Return the model, and which kernels it runs on or why they are torch's, in words.

    Raises CannotStart, ModelFormatError, and NotReproducible where torch is to be invariant.
    """
    chosen = choose(torch.get_num_threads()) if device == "cpu" else NoKernels("")
    if isinstance(chosen, NativeKernels):
        try:
            model = load_model(folder, dtype, device, on_layer, chosen)
        except NotForNative as error:
            chosen = NoKernels(str(error))
        else:
            return model, f"native, {chosen.level}"
    kernels = torch_kernels(folder, dtype, device, batch_invariant=batch_invariant)
    model = load_model(folder, dtype, device, on_layer, kernels)
    return model, f"torch: {chosen.reason}" if chosen.reason else "torch"


def torch_kernels(
    folder: Path, dtype: str = "auto", device: str = "cpu", *, batch_invariant: bool = False
) -> Kernels:
    """Return the products to load the model with. Raises ModelFormatError and NotReproducible."""
    where = torch.device(device)
    if batch_invariant:
        return invariant_kernels(where)
    return onednn_kernels(resolve_dtype(dtype, read_config(folder), where), where)


@dataclass(frozen=True, slots=True)
class Backend:
    """Parts that agree with each other on where and how keys and values lie."""

    cache: KVCache
    attention: AttentionBackend
    rows: RowKernels
    forward: Forward | None = None  # faster than slice by slice, where there is such a way


def backend_of(
    model: DenseSlices, geometry: KVGeometry, *, batch_invariant: bool = False
) -> Backend:
    """Native kernels are batch-invariant whether asked or not; torch's have to be proven, which
    raises NotReproducible where it fails.
    """
    if isinstance(model, NativeLlama):
        cache = KVCache(model.shape, geometry, is_packed=True)
        native = NativeAttention(cache, model)
        return Backend(cache, native, NativeRows(model.machine), native.forward)
    cache = KVCache(model.shape, geometry)
    if batch_invariant:
        meet_weights(model)
        return Backend(cache, InvariantAttention(cache, model.shape), TorchRows())
    return Backend(cache, ReferenceAttention(cache, model.shape), TorchRows())
