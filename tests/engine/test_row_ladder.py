"""Rows that keep their bits in any company: the operators, the ladder of row counts, its proof.

Shape legend: T and M rows, E, K, F and N elements of one, H heads, D head size, P probe rows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.errors import NotReproducible
from engine.models.invariant import InvariantLinear, silu
from engine.models.layers import rotate
from engine.row_ladder import check_elementwise, elementwise_probes, tiles, verify

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def row_functions(num_inputs: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weight_E = torch.rand(num_inputs, generator=generator).to(dtype)

    def rope(x_TE: Tensor) -> Tensor:
        # The angle of a row comes from the row, so that it goes where the row goes.
        angle_T1D = (x_TE[:, None, :1].float() * 1000).expand(-1, 1, num_inputs // 2)
        x_THD = x_TE.view(len(x_TE), 2, -1)
        return rotate(x_THD, angle_T1D.cos().to(dtype), angle_T1D.sin().to(dtype)).flatten(1)

    def gated(x_TE: Tensor) -> Tensor:
        gate_TF, up_TF = x_TE.chunk(2, dim=-1)
        return silu(gate_TF) * up_TF

    return {
        "norm": lambda x_TE: F.rms_norm(x_TE, weight_E.shape, weight_E, 1e-5),
        "rope": rope,
        "gated": gated,
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("num_inputs", [224, 576])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_other_operators_treat_each_row_by_itself(
    dtype: torch.dtype, num_inputs: int, num_threads: int
) -> None:
    """Three threads cut the work where no row, and no vector, ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        generator = torch.Generator().manual_seed(0)
        x_TE = (2 * torch.randn(400, num_inputs, generator=generator)).to(dtype)
        for name, function in row_functions(num_inputs, dtype).items():
            right_TE = function(x_TE)
            for num_rows in (1, 3, 150):
                found_TE = torch.cat([function(x.clone()) for x in torch.split(x_TE, num_rows)])
                assert torch.equal(found_TE, right_TE), (name, num_rows)
    finally:
        torch.set_num_threads(before)


def test_silu_is_torchs_but_for_rounding() -> None:
    x = torch.linspace(-120, 120, 10_001)
    assert torch.allclose(silu(x), F.silu(x), rtol=1e-6, atol=1e-30)
    x_bf16 = x.bfloat16()
    assert torch.allclose(silu(x_bf16).float(), F.silu(x_bf16).float(), rtol=2**-7, atol=1e-30)


def test_tiles_cover_all_rows_once() -> None:
    ladder = (4, 8, 64)
    assert tiles(3, ladder) == [(0, 3, 4)]
    assert tiles(64, ladder) == [(0, 64, 64)]
    assert tiles(133, ladder) == [(0, 64, 64), (64, 128, 64), (128, 133, 8)]
    for num_rows in range(1, 300):
        cut = tiles(num_rows, ladder)
        assert [row for tile in cut for row in range(*tile[:2])] == list(range(num_rows))
        assert all(tile.end - tile.start <= tile.size for tile in cut)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_weight_is_tried_as_it_lies_in_memory(dtype: torch.dtype, place: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(place + 120 * 65, generator=generator).to(dtype)[place:].view(120, 65)
    x_TK = torch.randn(600, 65, generator=generator).to(dtype)
    linear = InvariantLinear()
    right_TN = linear(x_TK, weight_NK)
    assert torch.allclose(right_TN, F.linear(x_TK, weight_NK), rtol=0.05, atol=1e-3)
    for num_rows in (1, 5, 100, 257):
        found_TN = torch.cat([linear(x, weight_NK) for x in torch.split(x_TK, num_rows)])
        assert torch.equal(found_TN, right_TN), num_rows
    assert len(linear.ladders) == 1


# --- machines that are worse than this one -------------------------------------------------------


def test_a_size_that_treats_rows_otherwise_is_dropped() -> None:
    x_PK = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def kernel(x_MK: Tensor) -> Tensor:
        y_MK = x_MK * 2
        if len(x_MK) == 64:
            y_MK[63] += 1e-6  # the last row only, as an edge of a tile would
        return y_MK

    assert verify("a product", kernel, x_PK, (4, 16, 64, 256)) == (4, 16, 256)


def test_a_kernel_in_which_the_place_matters_is_refused() -> None:
    x_PK = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotReproducible, match="a product gives a row other bits") as error:
        verify("a product", lambda x_MK: x_MK + torch.arange(len(x_MK))[:, None] * 1e-6, x_PK)
    assert "--batch-invariant" in error.value.remedy


def test_a_function_in_which_the_place_matters_is_refused() -> None:
    with pytest.raises(NotReproducible, match="silu"):
        check_elementwise(F.silu, elementwise_probes(3.0, CPU))
