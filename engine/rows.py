"""What an executor asks about rows of numbers, and torch's answers.

Shape legend: S rows that sample, V vocabulary, T tokens, E numbers of a token.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler import first_argmax


class RowKernels(Protocol):
    """A row's answer depends on no other row."""

    def peaks(self, logits_SV: Tensor) -> Tensor:
        """Return each row's largest number; not finite if the row has NaN or an infinity above."""
        ...

    def argmax(self, scores_SV: Tensor) -> Tensor:
        """Return the lowest id, int64, of each row's largest number; some id where there is NaN."""
        ...

    def are_finite(self, x_TE: Tensor) -> NDArray[np.bool_]:
        """Return, per row, whether it has neither NaN nor infinities."""
        ...


class TorchRows:
    """See `RowKernels`."""

    def peaks(self, logits_SV: Tensor) -> Tensor:
        return logits_SV.amax(dim=1)  # NaN wins

    def argmax(self, scores_SV: Tensor) -> Tensor:
        return first_argmax(scores_SV)

    def are_finite(self, x_TE: Tensor) -> NDArray[np.bool_]:
        is_finite_T: NDArray[np.bool_] = x_TE.abs().amax(dim=1).isfinite().cpu().numpy()
        return is_finite_T
