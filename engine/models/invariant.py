"""Linear layers and SiLU that give a row the same bits in any company.

Owns the padding of rows to a ladder of counts, and its proof on this machine: each weight's shape,
strides, dtype and alignment is tried when it is first met, and `meet_weights` is that meeting.
It chooses no kernel itself and never changes what torch would compute but in the last bits.

Shape legend: T rows, K inputs, N outputs, P probe rows, h = K / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.kernels import Kernels
from engine.models.slices import DenseSlices
from engine.row_ladder import (
    ALIGNMENT,
    NUM_PROBES,
    SIZES,
    check_elementwise,
    elementwise_probes,
    tiles,
    verify,
)

# What decides which kernel a product uses, as far as the weight does.
_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], int]
_PROBE_COLUMNS = 256  # different columns of a probe weight; more would only cost time


def invariant_kernels(device: torch.device, sizes: Sequence[int] = SIZES) -> Kernels:
    """Raises NotReproducible if the elementary functions depend on their neighbours here."""
    check_elementwise(torch.exp, elementwise_probes(5.0, device))
    # Angles of RoPE: positions times frequencies.
    check_elementwise(torch.cos, elementwise_probes(1000.0, device))
    check_elementwise(torch.sin, elementwise_probes(1000.0, device))
    return Kernels(InvariantLinear(sizes), silu)


def meet_weights(model: DenseSlices) -> None:
    """Run a token through every slice, so that no weight is tried later, within a step.

    Raises NotReproducible.
    """
    nothing_T = torch.zeros(1, dtype=torch.int64, device=model.shape.device)
    with torch.inference_mode():
        carry, qkv = model.first(nothing_T, nothing_T)
        for layer in range(1, model.shape.num_layers):
            carry, qkv = model.middle(layer, carry, qkv.q_THD)  # any numbers do for attention's
        model.last(carry, qkv.q_THD, nothing_T)


def silu(x_TK: Tensor) -> Tensor:
    """x / (1 + exp(-x)), in fp32.

    F.silu computes the end of a run that fills no whole vector by a scalar exp with other bits
    (measured: 2 to 4 % of fp32 elements differ there), and where runs end depends on the number of
    rows and threads. torch.exp has no such seam, and the other steps round as IEEE 754 says.
    """
    x = x_TK.to(torch.float32)
    return (x / x.neg().exp_().add_(1.0)).to(x_TK.dtype)


class InvariantLinear:
    """`F.linear` in calls whose row counts were proven alike."""

    def __init__(self, sizes: Sequence[int] = SIZES) -> None:
        self._sizes = sizes
        self.ladders: dict[_Kind, tuple[int, ...]] = {}

    def __call__(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ladder = self._ladder(weight_NK)
        num_rows = len(x_TK)
        x_TK = x_TK.contiguous()
        cut = tiles(num_rows, ladder)
        if len(cut) == 1:
            return F.linear(_rows(x_TK, 0, cut[0].size), weight_NK)[:num_rows]
        out_TN = x_TK.new_empty(num_rows, len(weight_NK))
        for start, end, size in cut:
            out_TN[start:end] = F.linear(_rows(x_TK, start, size), weight_NK)[: end - start]
        return out_TN

    def _ladder(self, weight_NK: Tensor) -> tuple[int, ...]:
        offset = weight_NK.data_ptr() % ALIGNMENT
        kind = (weight_NK.dtype, weight_NK.shape, weight_NK.stride(), offset)
        if kind not in self.ladders:
            probes_PK, like_NK = _probes(weight_NK, offset)
            name = f"the product with a {tuple(weight_NK.shape)} matrix"
            self.ladders[kind] = verify(
                name, lambda x_TK: F.linear(x_TK, like_NK), probes_PK, self._sizes
            )
        return self.ladders[kind]


def _rows(x_TK: Tensor, start: int, size: int) -> Tensor:
    """Return `size` rows from `start`, in memory of their own unless they lie as it would."""
    x_MK = x_TK[start : start + size]
    if len(x_MK) < size:
        return F.pad(x_MK, (0, 0, 0, size - len(x_MK)))
    return x_MK if x_MK.data_ptr() % ALIGNMENT == 0 else x_MK.clone()


def _probes(weight_NK: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return rows and a weight like this one in kind, whose products are nothing but rounding.

    Each input has a twin with the same weights and the opposite value, at a random distance. All
    sums are zero but for what rounding leaves, which another order of summation changes nearly
    always. With plain random numbers a bfloat16 result hides it: the sum is rounded from 24 bits
    to 8, and one in thousands shows.
    """
    num_outputs, num_inputs = weight_NK.shape
    half = num_inputs // 2
    generator = torch.Generator().manual_seed(0)

    def twins(values_Rh: Tensor, sign: float) -> Tensor:
        out_RK = torch.zeros(len(values_Rh), num_inputs)
        out_RK[:, order_K[:half]] = values_Rh
        out_RK[:, order_K[half : 2 * half]] = sign * values_Rh
        return out_RK.to(device=weight_NK.device, dtype=weight_NK.dtype)

    order_K = torch.randperm(num_inputs, generator=generator)
    columns = min(num_outputs, _PROBE_COLUMNS)
    some_NK = twins(0.05 * torch.randn(columns, half, generator=generator), 1.0)
    # Powers of two from 2^-6 to 2^6 make short bfloat16 mantissas overlap, so that sums do round.
    spread_Ph = torch.randint(-6, 7, (NUM_PROBES, half), generator=generator).exp2()
    probes_PK = twins(spread_Ph * torch.randn(NUM_PROBES, half, generator=generator), -1.0)
    span = sum((n - 1) * s for n, s in zip(weight_NK.shape, weight_NK.stride(), strict=True)) + 1
    skipped = offset // weight_NK.element_size()
    memory = weight_NK.new_empty(skipped + span)
    like_NK = memory.as_strided(weight_NK.shape, weight_NK.stride(), skipped)
    like_NK.copy_(some_NK[torch.arange(num_outputs, device=some_NK.device) % columns])
    return probes_PK, like_NK
