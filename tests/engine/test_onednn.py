"""Products over weights that oneDNN packed, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.models.kernels import DEFAULT
from engine.models.onednn import onednn_kernels

CPU = torch.device("cpu")


def test_fp32_keeps_torchs_own() -> None:
    assert onednn_kernels(torch.float32, CPU) is DEFAULT


@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["layer", "head"])
def test_packed_products_are_those_of_the_weights(num_rows: int, dtype: torch.dtype) -> None:
    kernels = onednn_kernels(torch.bfloat16, CPU)
    if kernels is DEFAULT:
        pytest.skip("this torch or processor has no packed products in bf16")
    generator = torch.Generator().manual_seed(num_rows)
    x_TK = torch.randn(num_rows, 72, generator=generator).to(dtype)
    weight_NK = torch.randn(50, 72, generator=generator).to(dtype)
    got_TN = kernels.linear(x_TK, kernels.pack(weight_NK))
    right_TN = F.linear(x_TK.double(), weight_NK.double())
    assert got_TN.dtype == dtype
    torch.testing.assert_close(got_TN.double(), right_TN, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_what_is_missing_keeps_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        """Torch's operators, without oneDNN's."""

    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    assert onednn_kernels(torch.bfloat16, CPU) is DEFAULT
