"""Turns the logits of a batch into one token a row: greedy, or filtered Gumbel-max.

Owns the order and the meaning of the filters (temperature, min_p, top_k, top_p: vLLM's) and how
Philox words become noise. Never draws from torch's generators, keeps no state between calls, knows
no request and no stop rule, and never lets one row's token depend on which other rows share the
batch.

That last promise is kept bitwise, and not by pinning kernels: every reduction here is exact. Maxima
are exact; sums run over integers (counts, and probabilities in fixed point), which are associative;
everything else is elementwise (and tests/engine/test_sampler.py checks that exp, log and log1p give
a value the same bits wherever it lies). A float `softmax` or `cumsum` would not do: on CUDA both
choose their summation order by the shape of the batch.

Gumbel-max: argmax(logit + gumbel) is a draw from softmax(logit) (Gumbel 1954; Maddison, Tarlow,
Minka, "A* sampling", NeurIPS 2014, section 2), so no normalisation and no cumulative search are
needed.

Shape suffixes: S rows of the batch, R sampled (not greedy) rows of one slab, F filtered rows of a
slab, V vocabulary, B buckets, 1 a kept dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import SamplingArrays
from engine.philox import uniform_bits

# Below this a row is greedy (vLLM's _SAMPLING_EPS): the division would only make infinities.
GREEDY_BELOW = 1e-5
# Odds of 1 in fixed point, units of 2^-40: a vocabulary of 2^18 tokens sums to 2^58 at most.
FIXED_POINT_ONE = float(1 << 40)
# A rank of 31 bits is searched in digits of 9, 11 and 11 bits: histograms of 16 KiB a row.
_DIGIT_SHIFTS = (22, 11, 0)
_DIGIT_MASK = (1 << 11) - 1
# Elements of one slab, which bounds the int64 temporaries: 2 MiB each keeps a CPU in its caches; on
# a GPU, 128 MiB each, so that 256 rows of a large vocabulary do not ask for gigabytes.
_SLAB_ELEMENTS_CPU = 1 << 18
_SLAB_ELEMENTS_GPU = 1 << 24
# The largest fp32 below 1: v = 1 would make E infinite.
_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """`SamplingArrays` on the device, with what the host knows about them.

    `sampled_rows` lists the rows that are not greedy, the `num_filtered` that use a filter first,
    so that any slab of it has its filtered rows in front and nothing on the device has to be asked.
    """

    temperature_S: Tensor
    top_p_S: Tensor
    top_k_S: Tensor
    min_p_S: Tensor
    seed_S: Tensor
    choice_S: Tensor
    position_S: Tensor
    sampled_rows: Tensor
    num_filtered: int
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def build(cls, arrays: SamplingArrays, device: torch.device) -> SamplingRows:
        """Copy to the device, asynchronously where that means something."""
        uses_S = arrays.temperature_S >= GREEDY_BELOW
        top_k_S, top_p_S, min_p_S = arrays.top_k_S > 0, arrays.top_p_S < 1.0, arrays.min_p_S > 0.0
        is_filtered_S = uses_S & (top_k_S | top_p_S | min_p_S)
        filtered = np.flatnonzero(is_filtered_S)
        plain = np.flatnonzero(uses_S & ~is_filtered_S)

        def to_device(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            temperature_S=to_device(arrays.temperature_S),
            top_p_S=to_device(arrays.top_p_S),
            top_k_S=to_device(arrays.top_k_S),
            min_p_S=to_device(arrays.min_p_S),
            seed_S=to_device(arrays.seed_S),
            choice_S=to_device(arrays.choice_S),
            position_S=to_device(arrays.position_S),
            sampled_rows=to_device(np.concatenate((filtered, plain))),
            num_filtered=len(filtered),
            any_top_k=bool(top_k_S[filtered].any()),
            any_top_p=bool(top_p_S[filtered].any()),
            any_min_p=bool(min_p_S[filtered].any()),
        )


def sample(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
    """One token id a row (`token_ids_S`, int64). Leaves `logits_SV` as it was.

    -inf forbids a token. A row with NaN or +inf, or with every token forbidden, has no right
    answer: it gets some id of the vocabulary, never an error.
    """
    num_rows, vocab_size = logits_SV.shape
    num_sampled = rows.sampled_rows.shape[0]
    if num_sampled < num_rows:
        token_ids_S = first_argmax(logits_SV.float())
    else:
        token_ids_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    slab = slab_rows(max(vocab_size, _DIGIT_MASK + 1), logits_SV.device)
    for start in range(0, num_sampled, slab):
        slab_R = rows.sampled_rows[start : start + slab]
        num_filtered = min(max(rows.num_filtered - start, 0), slab_R.shape[0])
        token_ids_R = _sample_slab(logits_SV, rows, slab_R, num_filtered)
        token_ids_S.index_copy_(0, slab_R, token_ids_R)
    return token_ids_S


def slab_rows(row_elements: int, device: torch.device) -> int:
    """How many rows of int64 temporaries to have at once; at least one."""
    slab_elements = _SLAB_ELEMENTS_CPU if device.type == "cpu" else _SLAB_ELEMENTS_GPU
    return max(1, slab_elements // row_elements)


def _sample_slab(
    logits_SV: Tensor, rows: SamplingRows, slab_R: Tensor, num_filtered: int
) -> Tensor:
    """Draws the rows `slab_R` of the batch, of which the first `num_filtered` use a filter."""
    scores_RV = logits_SV.index_select(0, slab_R).float()
    # Below the peak instead of absolute: the same distribution, and the likely tokens keep their
    # precision when a low temperature makes the logits large.
    scores_RV = scores_RV - scores_RV.amax(dim=1, keepdim=True)
    scores_RV.div_(rows.temperature_S[slab_R].unsqueeze(1))
    if num_filtered:
        _filter(scores_RV[:num_filtered], rows, slab_R[:num_filtered])
    bits_RV = uniform_bits(
        rows.seed_S[slab_R], rows.choice_S[slab_R], rows.position_S[slab_R], logits_SV.shape[1]
    )
    return first_argmax(scores_RV.sub_(_log_exponential(bits_RV)))


def first_argmax(scores_SV: Tensor) -> Tensor:
    """Index of each row's maximum, the lowest id of a tie on every device and for every shape."""
    vocab_size = scores_SV.shape[1]
    ids_V = torch.arange(vocab_size, dtype=torch.int32, device=scores_SV.device)
    is_peak_SV = scores_SV == scores_SV.amax(dim=1, keepdim=True)
    first_S = torch.where(is_peak_SV, ids_V, vocab_size - 1).amin(dim=1)  # NaN: the last id
    return first_S.to(torch.int64)


def _log_exponential(bits_RV: Tensor) -> Tensor:
    """log(E) of a unit exponential E per word; minus this is standard Gumbel noise.

    E = -log1p(-v) with v = (bits + 0.5) / 2^32. Large noise comes from small v, where fp32 is
    dense: the largest is log(2^33) = 22.9, where the textbook -log(-log(u)) in fp32 would stop at
    log(2^24) = 16.6.
    """
    v_RV = bits_RV.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=_BELOW_ONE)
    return v_RV.neg_().log1p_().neg_().log_()


def _filter(scores_FV: Tensor, rows: SamplingRows, slab_F: Tensor) -> None:
    """Sets the scores of dropped tokens to -inf. min_p, then top_k, then top_p over what is left.

    A filter that some rows leave off must not touch them, so each off value keeps the whole row by
    construction and not by arithmetic that happens to round well.

    `scores_FV` are distances below the peak (<= 0), so the bits of their magnitudes are integers
    that rank the tokens, likeliest first, equal scores equal.
    """
    rank_FV = scores_FV.abs().view(torch.int32).to(torch.int64)
    odds_FV = scores_FV.exp()  # against the likeliest token, whose odds are 1
    keep_FV = torch.ones_like(scores_FV, dtype=torch.bool)
    if rows.any_min_p:
        keep_FV = odds_FV >= rows.min_p_S[slab_F].clamp(max=1.0).unsqueeze(1)
    if rows.any_top_k:
        top_k_F1 = rows.top_k_S[slab_F].unsqueeze(1)
        count_FV = keep_FV.to(torch.int64)
        keep_FV &= _head(rank_FV, count_FV, top_k_F1) | (top_k_F1 <= 0)
    if rows.any_top_p:
        top_p_F1 = rows.top_p_S[slab_F].unsqueeze(1)
        mass_FV = (odds_FV * FIXED_POINT_ONE).to(torch.int64).mul_(keep_FV)
        target_F1 = (mass_FV.sum(dim=1, keepdim=True) * top_p_F1.double()).ceil_().to(torch.int64)
        keep_FV &= _head(rank_FV, mass_FV, target_F1) | (top_p_F1 >= 1.0)
    scores_FV.masked_fill_(keep_FV.logical_not_(), float("-inf"))


def _head(rank_FV: Tensor, weight_FV: Tensor, target_F1: Tensor) -> Tensor:
    """Mask of the shortest run of tokens, by rank and then by id, whose weight reaches the target.

    At least one token is kept and at most all; of one rank, tokens weigh the same or nothing, and
    those that weigh nothing are for the caller to drop. No sort: the rank at which the running
    weight crosses the target is found digit by digit in histograms (radix selection), which integer
    weights make exact. On a CPU that is a third of the time of sorting the vocabulary.
    """
    target_F1 = torch.minimum(target_F1.clamp(min=1), weight_FV.sum(dim=1, keepdim=True))
    edge_F1 = torch.zeros_like(target_F1)
    edge_weight_FV = weight_FV.clone()
    digit_FV = torch.empty_like(rank_FV)  # one buffer: fresh pages cost more than the arithmetic
    for shift in _DIGIT_SHIFTS:
        torch.bitwise_right_shift(rank_FV, shift, out=digit_FV).bitwise_and_(_DIGIT_MASK)
        digit_F1, target_F1 = _crossing(digit_FV, edge_weight_FV, target_F1)
        edge_weight_FV *= digit_FV == digit_F1
        edge_F1 |= digit_F1 << shift
    # The n-th token of the edge is needed if the n - 1 before it fall short of what is missing.
    token_weight_F1 = edge_weight_FV.amax(dim=1, keepdim=True)
    running_FV = torch.cumsum(edge_weight_FV, dim=1, out=digit_FV)
    is_needed_FV = running_FV < target_F1 + token_weight_F1
    is_needed_FV &= rank_FV == edge_F1
    is_needed_FV |= rank_FV < edge_F1
    return is_needed_FV


def _crossing(digit_FV: Tensor, weight_FV: Tensor, target_F1: Tensor) -> tuple[Tensor, Tensor]:
    """The digit at which the running weight reaches the target, and what is still missing there."""
    weight_FB = weight_FV.new_zeros(weight_FV.shape[0], _DIGIT_MASK + 1)
    weight_FB.scatter_add_(1, digit_FV, weight_FV)
    running_FB = weight_FB.cumsum(dim=1)
    # The clamp is for rows with NaN, whose weights are arbitrary: an index must stay an index.
    digit_F1 = torch.searchsorted(running_FB, target_F1).clamp_(max=_DIGIT_MASK)
    return digit_F1, target_F1 - running_FB.sub_(weight_FB).gather(1, digit_F1)
