"""Philox against published vectors and a scalar reference; the counter layout is pinned."""

import random

import pytest
import torch

from engine.philox import DOMAIN_TOKEN_NOISE, philox4x32, uniform_bits

MASK = 0xFFFFFFFF


def philox_scalar(counter, key):
    """Salmon et al., SC'11, figure 4, one block at a time in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def bits_scalar(seed, choice, position, token_id):
    counter = (token_id // 4, position, choice, DOMAIN_TOKEN_NOISE)
    return philox_scalar(counter, (seed & MASK, (seed >> 32) & MASK))[token_id % 4]


def column(values):
    return torch.tensor(values, dtype=torch.int64)


# Random123, tests/kat_vectors, the lines "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    counter, key, expected = (
        [int(w, 16) for w in text.split()] for text in (counter, key, expected)
    )
    words = philox4x32(tuple(column([w]) for w in counter), tuple(column([w]) for w in key))
    assert [int(w) for w in words] == expected
    assert list(philox_scalar(counter, key)) == expected


def test_random_words_match_the_scalar_reference():
    rng = random.Random(1)
    cases = [[rng.getrandbits(32) for _ in range(6)] for _ in range(500)]
    operands = [column([case[i] for case in cases]) for i in range(6)]
    words = torch.stack(philox4x32(tuple(operands[:4]), tuple(operands[4:])), dim=1)
    assert words.tolist() == [list(philox_scalar(case[:4], case[4:])) for case in cases]


@pytest.mark.parametrize("wide", range(6))
def test_any_operand_may_be_the_one_that_broadcasts(wide):
    rng = random.Random(wide)
    operands = [[rng.getrandbits(32)] for _ in range(6)]
    operands[wide] = [rng.getrandbits(32) for _ in range(7)]
    tensors = [column(words) for words in operands]
    before = [tensor.clone() for tensor in tensors]
    words = philox4x32(tuple(tensors[:4]), tuple(tensors[4:]))
    for i in range(7):
        case = [words_[i % len(words_)] for words_ in operands]
        got = [int(word[i % word.shape[0]]) for word in words]
        assert got == list(philox_scalar(case[:4], case[4:]))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 130])
def test_layout_of_counter_and_key(vocab_size):
    rng = random.Random(vocab_size)
    rows = [
        (rng.getrandbits(64) - (1 << 63), rng.getrandbits(31), rng.getrandbits(31))
        for _ in range(4)
    ]
    rows += [(-1, 0, 0), (0, 0, 0), (1 << 62, 1, 2)]
    seeds, choices, positions = (column(values) for values in zip(*rows, strict=True))
    bits = uniform_bits(seeds, choices, positions, vocab_size)
    assert bits.shape == (len(rows), vocab_size)
    assert bits.tolist() == [
        [bits_scalar(*row, token_id) for token_id in range(vocab_size)] for row in rows
    ]


def test_a_row_does_not_depend_on_the_batch():
    seeds, choices, positions = column(list(range(9))), column([0, 1, 2] * 3), column([5] * 9)
    whole = uniform_bits(seeds, choices, positions, 1001)
    for row in range(9):
        assert torch.equal(
            uniform_bits(seeds[row : row + 1], choices[row : row + 1], positions[:1], 1001)[0],
            whole[row],
        )
    assert torch.equal(uniform_bits(seeds, choices, positions, 77), whole[:, :77])


def test_no_rows():
    empty = column([])
    assert uniform_bits(empty, empty, empty, 10).shape == (0, 10)


def test_words_are_uniform():
    """Bytes of 200,000 words: chi-square of 255 degrees of freedom, sigma sqrt(2 * 255)."""
    bits = uniform_bits(column([7, 8]), column([0, 0]), column([3, 3]), 100_000).flatten()
    assert bits.min() >= 0
    assert bits.max() <= MASK
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
        expected = bits.numel() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 5 * 510**0.5


def test_neighbouring_counters_are_uncorrelated():
    """Of n pairs of words half the 32 bits differ: mean 16, sigma of the mean sqrt(8 / n)."""
    n = 60_000
    base = uniform_bits(column([7]), column([0]), column([3]), n)
    for neighbour in ((8, 0, 3), (7, 1, 3), (7, 0, 4)):
        seed, choice, position = neighbour
        other = uniform_bits(column([seed]), column([choice]), column([position]), n)
        differing = sum(int((((base ^ other) >> i) & 1).sum()) for i in range(32)) / n
        assert abs(differing - 16) < 5 * (8 / n) ** 0.5
