"""Attention over keys in splits of one fixed size: the parts, their merge, and their proof.

The bits of a part, which is what one query row makes of one split, depend on that row's q and on
the split's visible keys and values, and on nothing else: both matrix products have row counts that
were proven alike, the inner sizes are constants, and everything else is elementwise, exact, or a
sum over a row of constant length. Knows no blocks, requests or cache. All in fp32.

Shape legend: W splits of one call, Y = W G with G key heads, L query rows, S keys of a split, D
head size, P probe rows, I items of a merge, J splits of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.errors import NotReproducible
from engine.row_ladder import (
    NUM_PROBES,
    SIZES,
    check_elementwise,
    elementwise_probes,
    tiles,
    verify,
)

_LOWEST = torch.finfo(torch.float32).min
_PROBE_COUNTS = (1, 2, 5, 32)  # matrices of one call: fewer than threads, uneven, many


class Parts(NamedTuple):
    """Of each row and split: the largest score, the sum of exp(score - largest), weighted values.

    Where every key is masked: the lowest finite number, 0 and 0.
    """

    max_YL: Tensor
    sum_YL: Tensor
    out_YLD: Tensor


def attend_split(
    q_YLD: Tensor, k_YSD: Tensor, v_YSD: Tensor, hidden_WLS: Tensor, ladder: Sequence[int]
) -> Parts:
    """Return the parts; q is scaled already, and `hidden_WLS` is true where a key does not count.

    A weight of an uncounted key is exactly 0, and so is its term, as long as v is finite.
    """
    score_YLS = _by_rows(q_YLD, k_YSD.transpose(1, 2), ladder)
    score_WGLS = torch.unflatten(score_YLS, 0, (len(hidden_WLS), -1))
    score_WGLS.masked_fill_(hidden_WLS[:, None], -torch.inf)
    # -inf would make NaN of -inf - -inf; the lowest number makes exp(-inf) = 0 of it.
    max_YL = score_YLS.amax(dim=-1).clamp_min_(_LOWEST)
    weight_YLS = score_YLS.sub_(max_YL[..., None]).exp_()
    out_YLD = _by_rows(weight_YLS, v_YSD, ladder)
    return Parts(max_YL, weight_YLS.sum(dim=-1), out_YLD)


def merge(parts: Parts, index_IJ: Tensor, num_splits_I: Tensor) -> Tensor:
    """Return the attention output of each item, its parts merged in the order of J.

    `index_IJ` chooses parts along their first dimension, which may be followed by others. Past
    `num_splits_I` any index will do. Such a part, and one that is masked throughout, gets weight 0
    and changes nothing: x + 0 = x and 1 * x = x, exactly.
    """
    max_IJ_, sum_IJ_ = parts.max_YL[index_IJ], parts.sum_YL[index_IJ]
    split_J = torch.arange(index_IJ.shape[1], device=index_IJ.device)
    is_absent_IJ = split_J >= num_splits_I[:, None]
    is_absent_IJ_ = is_absent_IJ.view(*is_absent_IJ.shape, *[1] * (max_IJ_.dim() - 2))
    weight_IJ_ = (max_IJ_ - max_IJ_.amax(dim=1, keepdim=True)).exp_()
    weight_IJ_.masked_fill_(is_absent_IJ_, 0.0)
    sum_IJ_.mul_(weight_IJ_)
    # One rounding for each product and sum: a fused multiply-add would round once for both, and
    # whether torch fuses depends on where in a vector an element lies.
    total_I_ = sum_IJ_[:, 0]
    out_I_D = parts.out_YLD[index_IJ[:, 0]] * weight_IJ_[:, 0, ..., None]
    for j in range(1, index_IJ.shape[1]):
        total_I_ = total_I_ + sum_IJ_[:, j]
        out_I_D += parts.out_YLD[index_IJ[:, j]] * weight_IJ_[:, j, ..., None]
    return out_I_D.div_(total_I_[..., None])


def _by_rows(a_YLK: Tensor, b_YKN: Tensor, ladder: Sequence[int]) -> Tensor:
    """Return a @ b, in calls whose row counts are of the ladder."""
    cut = tiles(a_YLK.shape[1], ladder)
    if len(cut) == 1 and cut[0].size == cut[0].end:
        return torch.bmm(a_YLK, b_YKN)
    out = []
    for start, end, size in cut:
        a_YMK = a_YLK.new_zeros(len(a_YLK), size, a_YLK.shape[2])
        a_YMK[:, : end - start] = a_YLK[:, start:end]
        out.append(torch.bmm(a_YMK, b_YKN)[:, : end - start])
    return torch.cat(out, dim=1)


def verified_ladder(
    head_dim: int, split: int, device: torch.device, sizes: Sequence[int] = SIZES
) -> tuple[int, ...]:
    """Return the row counts at which this machine gives a row the same parts in any company.

    Raises NotReproducible if parts depend on the place of a row, or on how many matrices a call
    holds. A quarter of the keys is masked, others for each row.
    """
    check_elementwise(torch.exp, elementwise_probes(5.0, device).abs().neg())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    probes_PD = normal(NUM_PROBES, head_dim)
    k_YSD, v_YSD = (normal(_PROBE_COUNTS[-1], split, head_dim) for _ in range(2))

    def parts(rows_LD: Tensor, num_matrices: int, ladder: Sequence[int]) -> Tensor:
        q_YLD = rows_LD.repeat(num_matrices, 1, 1)
        # Which keys a row sees goes by its first element, so that it moves with the row.
        first_YL1 = (q_YLD[..., :1] * 1000).to(torch.int64)
        keys_S = torch.arange(split, device=device)
        hidden_WLS = (keys_S + first_YL1) % 4 == 0
        args = q_YLD, k_YSD[:num_matrices], v_YSD[:num_matrices], hidden_WLS, ladder
        found = attend_split(*args)
        return torch.cat((found.out_YLD, found.max_YL[..., None], found.sum_YL[..., None]), dim=-1)

    def of_first(rows_LD: Tensor) -> Tensor:
        return parts(rows_LD, 1, (len(rows_LD),))[0]

    ladder = verify("attention", of_first, probes_PD, sizes)
    for size in ladder:
        rows_LD = probes_PD[torch.arange(size, device=device) % NUM_PROBES]
        right = parts(rows_LD, _PROBE_COUNTS[-1], (size,))
        for count in _PROBE_COUNTS:
            found = parts(rows_LD, count, (size,))
            if not torch.equal(found, right[:count]):
                raise NotReproducible(
                    f"batch invariance: attention gives other bits in a call of {count} matrices",
                    "leave out --batch-invariant, or use another build of torch",
                )
    return ladder
