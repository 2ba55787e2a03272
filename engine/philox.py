"""Philox4x32-10: random words as a pure function of (seed, choice, position, token id).

Owns the counter layout, which is a contract: a request that is resumed, swapped, migrated or
replayed on another machine draws the words it would have drawn, and no generator state travels.
Never holds state, never draws from torch's generators, never turns words into a distribution
(`engine/sampler.py` does).

Algorithm: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, section
3.3 and table 2 (Philox4x32 with 10 rounds, the recommended number; it passes BigCrush from 7 on).

Shape suffixes: S rows, V vocabulary, Q blocks of four token ids (ceil(V / 4)), 1 a broadcast
dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF
# Multipliers and Weyl key increments of Philox4x32 (the golden ratio and sqrt(3) - 1, section 3.3).
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
# Three rounds carry every counter and key word into words 0 and 2: from here they have full shape.
_DENSE_FROM_ROUND = 3
# Fourth counter word: "Hoc1". Another use of the same seed must take another value and so never
# share a word.
DOMAIN_TOKEN_NOISE = 0x486F6331

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]
Words2 = tuple[Tensor, Tensor]


def philox4x32(counter: Words4, key: Words2) -> Words4:
    """Ten rounds over int64 tensors that hold 32-bit words; operands broadcast against each other.

    A 32 x 32 bit product wraps modulo 2^64 in int64 and its bit pattern is exact, so the high word
    is `(p >> 32) & WORD_MASK`. The shift is arithmetic, but everything it smears lies above bit 31.

    Words 1 and 3 and the keys are only ever XORed in, so whatever they carry above bit 31 dies when
    the XOR's result is masked: they stay whole products and unreduced sums. Words 0 and 2, the
    factors, must be clean.
    """
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for round_index in range(_ROUNDS):
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        dense = round_index >= _DENSE_FROM_ROUND
        word_0 = _mix(product_1 >> 32, word_1, key_0, dense=dense)
        word_2 = _mix(product_0 >> 32, word_3, key_1, dense=dense)
        word_1, word_3 = product_1, product_0
        key_0 = key_0 + _WEYL_0
        key_1 = key_1 + _WEYL_1
    return word_0, word_1 & WORD_MASK, word_2, word_3 & WORD_MASK


def _mix(high: Tensor, word: Tensor, key: Tensor, *, dense: bool) -> Tensor:
    """`high ^ word ^ key` cut to 32 bits; in `high`, which the caller gives up, once it is dense.

    The counter words of a batch are mostly one value a row: with the small operands combined first,
    the rounds before that cost almost nothing.
    """
    if dense:
        return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(WORD_MASK)
    return (word ^ key).bitwise_xor(high).bitwise_and_(WORD_MASK)


def uniform_bits(
    seeds_S: Tensor, choices_S: Tensor, positions_S: Tensor, vocab_size: int
) -> Tensor:
    """Independent uniform words `bits_SV` (int64, 0 <= bits < 2^32), one per row and token id.

    key = the 64-bit seed, low word first (a negative int64 is its two's complement);
    counter = (token_id // 4, position, choice, DOMAIN_TOKEN_NOISE); word = token_id % 4.
    """
    num_rows = seeds_S.shape[0]
    num_blocks = (vocab_size + 3) // 4
    device = seeds_S.device
    seeds_S1 = seeds_S.unsqueeze(1)
    words = philox4x32(
        (
            torch.arange(num_blocks, dtype=torch.int64, device=device).unsqueeze(0),
            positions_S.unsqueeze(1) & WORD_MASK,
            choices_S.unsqueeze(1) & WORD_MASK,
            torch.full((1, 1), DOMAIN_TOKEN_NOISE, dtype=torch.int64, device=device),
        ),
        (seeds_S1 & WORD_MASK, (seeds_S1 >> 32) & WORD_MASK),
    )
    bits_SQ4 = torch.stack([word_SQ.expand(num_rows, num_blocks) for word_SQ in words], dim=-1)
    return bits_SQ4.view(num_rows, num_blocks * 4)[:, :vocab_size]
