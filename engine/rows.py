"""What an executor asks about rows of numbers, and torch's answers.

Shape legend: S rows that sample, V vocabulary, T tokens, E numbers of a token.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler import SamplingRows, sample


class RowKernels(Protocol):
    """A row's answer depends on no other row."""

    def peaks(self, logits_SV: Tensor) -> NDArray[np.float32]:
        """Return each row's largest number; not finite if the row has NaN or an infinity above."""
        ...

    def sample(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        """Return one token id a row, int64; see `engine.sampler.sample`."""
        ...

    def are_finite(self, x_TE: Tensor) -> NDArray[np.bool_]:
        """Return, per row, whether it has neither NaN nor infinities."""
        ...


class TorchRows:
    """See `RowKernels`."""

    def peaks(self, logits_SV: Tensor) -> NDArray[np.float32]:
        peak_S: NDArray[np.float32] = logits_SV.float().amax(dim=1).cpu().numpy()  # NaN wins
        return peak_S

    def sample(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        return sample(logits_SV, rows)

    def are_finite(self, x_TE: Tensor) -> NDArray[np.bool_]:
        is_finite_T: NDArray[np.bool_] = x_TE.abs().amax(dim=1).isfinite().cpu().numpy()
        return is_finite_T
