"""How far logits are from the right ones: two measures, and where greedy texts part.

Shape legend: N requests, P positions, V vocabulary, X all entries of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# fp32: error of a logit against its row's largest magnitude.
FP32_LIMIT = 1e-4
# bf16: against transformers' own bf16 error. Two orders of summation round differently, so equal
# is not to be had; a lost position, a wrong mask or a rounding too many is far more than a fifth.
BF16_MEAN_FACTOR, BF16_P999_FACTOR = 1.2, 1.5
# A free-running text may leave the reference's only where the reference itself is undecided.
GREEDY_GAP, GREEDY_DIFFERENCES = 1e-3, 1


class Errors(NamedTuple):
    mean: float
    p999: float
    max: float


class Parting(NamedTuple):
    """The first position at which a text differs, and how sure the reference was there."""

    request: int
    at: int
    gap: float  # between the reference's two largest logits


def logit_errors(logits_NPV: Tensor, right_NPV: Tensor) -> Errors:
    """Errors of logits, each in units of its row's largest right magnitude."""
    scale_NP1 = right_NPV.abs().amax(dim=-1, keepdim=True)
    return _summary((logits_NPV - right_NPV).abs_().div_(scale_NP1))


def logprob_errors(logits_NPV: Tensor, right_NPV: Tensor) -> Errors:
    """Errors of log-probabilities, both sides normalised in fp32."""
    return _summary(
        (torch.log_softmax(logits_NPV, dim=-1) - torch.log_softmax(right_NPV, dim=-1)).abs_()
    )


def bf16_excess(errors: Errors, theirs: Errors) -> tuple[float, float]:
    """Mean and 99.9th percentile of the errors, in units of their bf16 run's."""
    return errors.mean / theirs.mean, errors.p999 / theirs.p999


def partings(
    tokens: Sequence[Sequence[int]], right: Sequence[Sequence[int]], logits_NPV: Tensor
) -> list[Parting]:
    """Where each text leaves the right one; `logits_NPV` are those behind the right texts."""
    found = []
    for request, (ours, theirs) in enumerate(zip(tokens, right, strict=True)):
        differs = [a != b for a, b in zip(ours, theirs, strict=True)]
        if any(differs):
            at = differs.index(True)
            first, second = logits_NPV[request, at].topk(2).values.tolist()
            found.append(Parting(request, at, first - second))
    return found


def _summary(error_NPV: Tensor) -> Errors:
    error_X = error_NPV.flatten()
    assert error_X.isfinite().all()
    rank = max(1, -(-len(error_X) * 999 // 1000))
    return Errors(
        error_X.mean(dtype=torch.float64).item(),
        error_X.kthvalue(rank).values.item(),
        error_X.max().item(),
    )
