"""The operators of a model whose bits may depend on the rows around a row, as a choice.

A family takes its `Kernels` when it is loaded and never asks which they are. The other operators
that it uses (norms, RoPE, embedding, sums) treat each row by itself; a test says so.

Shape legend: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]  # x_TK, packed weight_NK -> TN


@dataclass(frozen=True, slots=True)
class Kernels:
    """By default torch's own.

    `pack` brings a weight, once, into the layout that `linear` reads, and does not keep the old.
    """

    linear: Linear = F.linear
    silu: Callable[[Tensor], Tensor] = F.silu
    pack: Callable[[Tensor], Tensor] = lambda weight_NK: weight_NK


DEFAULT = Kernels()
