"""What an executor asks about rows of numbers, in native kernels. See `engine.rows`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler import SamplingRows


class NativeRows:
    """See `engine.rows.RowKernels`; an infinity below counts as one above."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine

    def peaks(self, logits_SV: Tensor) -> NDArray[np.float32]:
        return self._peaks_and_ids(logits_SV)[0]

    def sample(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        logits_SV = logits_SV.float().contiguous()
        if len(rows.sampled_rows) == len(logits_SV):
            ids_S = torch.empty(len(logits_SV), dtype=torch.int64)
        else:
            ids_S = torch.from_numpy(self._peaks_and_ids(logits_SV)[1])
        if len(rows.sampled_rows):
            self._machine.draw(
                logits_SV.data_ptr(),
                logits_SV.shape[1],
                rows.sampled_rows.numpy(),
                rows.temperature_S.numpy(),
                rows.top_p_S.numpy(),
                rows.top_k_S.numpy(),
                rows.min_p_S.numpy(),
                rows.seed_S.numpy(),
                rows.choice_S.numpy(),
                rows.position_S.numpy(),
                ids_S.data_ptr(),
            )
        return ids_S

    def are_finite(self, x_TE: Tensor) -> NDArray[np.bool_]:
        assert x_TE.is_contiguous()
        num_rows, size = x_TE.shape
        is_spoiled_T = np.zeros(num_rows, dtype=bool)
        self._machine.find_spoiled(
            x_TE.data_ptr(), num_rows, size, x_TE.itemsize, is_spoiled_T.ctypes.data
        )
        return ~is_spoiled_T

    def _peaks_and_ids(self, scores_SV: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores_SV = scores_SV.contiguous()
        num_rows, size = scores_SV.shape
        peak_S, ids_S = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
        self._machine.argmax(
            scores_SV.data_ptr(), num_rows, size, peak_S.ctypes.data, ids_S.ctypes.data
        )
        return peak_S, ids_S
