"""Linear layers by oneDNN, their weights packed once into the layout that its kernels read.

Torch's own linear packs a weight anew in every product, or reads it as it lies. Owns the choice: a
build of torch or a processor without these operators keeps torch's own. They are those that
TorchInductor freezes models with. A product's order of summation depends on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.kernels import DEFAULT, Kernels


def onednn_kernels(dtype: torch.dtype, device: torch.device) -> Kernels:
    """Return what is fastest for a model of `dtype`.

    In fp32 that is torch's own: it takes two thirds of oneDNN's time for one and two rows.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return DEFAULT
    packed = Kernels(linear=_linear, pack=_pack)
    x_TK = torch.ones(2, 64, dtype=dtype)
    try:
        _linear(x_TK, _pack(torch.ones(32, 64, dtype=dtype)))
        _linear(x_TK.float(), _pack(torch.ones(32, 64)))
    except (AttributeError, RuntimeError):  # no such operator; not for this processor
        return DEFAULT
    return packed


def _pack(weight_NK: Tensor) -> Tensor:
    """The layout does not depend on the number of rows."""
    packed_NK: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK)
    return packed_NK


def _linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    out_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, None, "none", [], "")
    return out_TN
