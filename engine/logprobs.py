"""Log-probabilities of tokens, and of the likeliest ones, under the model's own distribution.

Owns how logits become the numbers that a client reads: the normaliser, the order of ties, the floor
that keeps them finite. Never samples, never knows a rule or a filter, keeps no state.

No row's numbers depend, bitwise, on which other rows share the batch. The normaliser is a sum in
fixed point, which is exact in any order, as in `engine/sampler.py`; the likeliest tokens are sorted
by a key that no two tokens share, so no kernel has a tie to break; the rest is elementwise or, the
logarithm, one number at a time.

Precision: exp in fp32 and 40 bits of fixed point put a log-probability within about 1e-6.

Shape suffixes: S rows, R rows of one slab, V vocabulary, K the most likely ones, M prompt tokens
that predict the next, 1 a kept dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.batch import Ints, PromptScores, RowRules
from engine.sampler import FIXED_POINT_ONE, slab_rows
from scheduler.types import Logprobs, PromptLogprobs

# Instead of -inf, which JSON cannot carry; vLLM's API says the same number.
FLOOR = -9999.0
# Prompt tokens whose logits exist at once: 64 of a vocabulary of 151,936 are 39 MB in fp32, where a
# chunk of 512 would be 311 MB; and a matrix product of 64 rows is already bound by arithmetic.
PROMPT_TOKENS_AT_ONCE = 64


def logprobs(
    logits_SV: Tensor, token_ids_S: Tensor, num_top: int | Sequence[int]
) -> list[Logprobs]:
    """Each row's log-probability of its token, and of its `num_top` likeliest.

    Of equal tokens the lowest id comes first. `num_top` is one number for all rows or one a row; of
    a smaller vocabulary it is the whole. The token ids must be in the vocabulary. A row with NaN or
    +inf has no distribution: all its numbers are `FLOOR`.
    """
    num_rows, vocab_size = logits_SV.shape
    num_top_S = [num_top] * num_rows if isinstance(num_top, int) else list(num_top)
    token_ids_S = token_ids_S.to(logits_SV.device)
    slab = slab_rows(vocab_size, logits_SV.device)
    found = []
    for start in range(0, num_rows, slab):
        part = slice(start, start + slab)
        found += _slab_logprobs(logits_SV[part].float(), token_ids_S[part], num_top_S[part])
    return found


def sampled_logprobs(
    logits_SV: Tensor, token_ids_S: Tensor, rules: Sequence[RowRules]
) -> list[Logprobs | None]:
    """One entry a row: the log-probabilities of the sampled token where the request wants them.

    `logits_SV` are the model's, before any rule.
    """
    found: list[Logprobs | None] = [None] * len(logits_SV)
    num_top_of = {
        row.index: row.params.logprobs for row in rules if row.params.logprobs is not None
    }
    if num_top_of:
        wanted = list(num_top_of)
        tokens = token_ids_S[wanted]
        of_wanted = logprobs(logits_SV[wanted], tokens, list(num_top_of.values()))
        for index, row_logprobs in zip(wanted, of_wanted, strict=True):
            found[index] = row_logprobs
    return found


def prompt_logprobs(
    scores: Sequence[PromptScores], logits_of: Callable[[Ints], Tensor]
) -> tuple[PromptLogprobs, ...]:
    """The log-probabilities of prompt tokens; `logits_of` computes the logits of some of T."""
    return tuple(
        PromptLogprobs(row.request_id, row.start, tuple(_positions(row, logits_of)))
        for row in scores
    )


def _positions(row: PromptScores, logits_of: Callable[[Ints], Tensor]) -> list[Logprobs]:
    positions: list[Logprobs] = []
    for start in range(0, len(row.tokens_M), PROMPT_TOKENS_AT_ONCE):
        part = slice(start, start + PROMPT_TOKENS_AT_ONCE)
        targets_M = torch.from_numpy(row.targets_M[part])
        positions += logprobs(logits_of(row.tokens_M[part]), targets_M, row.num_top)
    return positions


def _slab_logprobs(
    logits_RV: Tensor, token_ids_R: Tensor, num_top_R: Sequence[int]
) -> list[Logprobs]:
    peak_R1 = logits_RV.amax(dim=1, keepdim=True)
    mass_RV = (logits_RV - peak_R1).exp_().mul_(FIXED_POINT_ONE).to(torch.int64)
    ids_RK = torch.cat((token_ids_R.unsqueeze(1), _likeliest(logits_RV, max(num_top_R))), dim=1)
    below_peak_RK = logits_RV.gather(1, ids_RK).double() - peak_R1.double()
    rows = zip(
        below_peak_RK.tolist(), mass_RV.sum(dim=1).tolist(), ids_RK.tolist(), num_top_R, strict=True
    )
    found = []
    for below_peak, mass, ids, num_top in rows:
        # The peak alone weighs 1, so the maximum only catches rows that are not finite.
        log_total = math.log(max(mass / FIXED_POINT_ONE, 1.0))
        chosen, *top = (_finite(value - log_total) for value in below_peak[: num_top + 1])
        found.append(Logprobs(chosen, tuple(zip(ids[1:], top, strict=False))))
    return found


def _finite(logprob: float) -> float:
    """No less than the floor, which NaN becomes too: it compares false."""
    return logprob if logprob > FLOOR else FLOOR


def _likeliest(logits_RV: Tensor, num_top: int) -> Tensor:
    """Ids of the likeliest tokens of each row, equal ones by id: `ids_RK`.

    `topk` alone may return any of the equal ones. The bits of a float order as a signed integer
    does once the magnitude of the negative ones is inverted; below them goes the inverted id.
    """
    num_rows, vocab_size = logits_RV.shape
    if num_top == 0:
        return torch.empty(num_rows, 0, dtype=torch.int64, device=logits_RV.device)
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the zeros become equal
    order_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
    inverted_V = torch.arange(vocab_size - 1, -1, -1, device=logits_RV.device)
    key_RV = (order_RV.to(torch.int64) << 32).bitwise_or_(inverted_V)
    return key_RV.topk(min(num_top, vocab_size), dim=1).indices
