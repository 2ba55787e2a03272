"""The sampler: exact filters, exact distribution, a token that depends on nothing but its row."""

import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import SamplingArrays
from engine.kernels import native
from engine.kernels.rows import NativeRows
from engine.rows import TorchRows
from engine.sampler import SamplingRows, _log_exponential, sample

CPU = torch.device("cpu")
INF = float("inf")


class SamplingRow(NamedTuple):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0


def build(rows):
    columns = {
        f"{name}_S": np.array(
            [getattr(row, name) for row in rows],
            dtype=np.float32 if name in ("temperature", "top_p", "min_p") else np.int64,
        )
        for name in SamplingRow._fields
    }
    return SamplingRows.build(SamplingArrays(**columns), CPU)


@pytest.fixture(scope="module", autouse=True, params=["torch", native.levels()[-1]])
def kernels(request):
    """Torch's sampler, and the native one of this machine."""
    global sample
    if request.param != "torch":
        sample = NativeRows(native.extension().Machine(request.param, 2, False)).sample
    yield
    sample = TorchRows().sample


def draw(logits, rows):
    return sample(torch.as_tensor(logits, dtype=torch.float32), build(rows)).tolist()


def kept_by_definition(logits, row):
    """The filters in plain Python over the float32 values given to the sampler: `{id: p}`."""
    raw = torch.tensor(logits, dtype=torch.float32)
    scores = ((raw - raw.max()) / torch.tensor(row.temperature, dtype=torch.float32)).tolist()
    top_p, min_p = torch.tensor([row.top_p, row.min_p], dtype=torch.float32).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    odds = {i: math.exp(scores[i]) for i in order}
    kept = [i for i in order if odds[i] >= min_p]
    if row.top_k > 0:
        kept = kept[: row.top_k]
    if row.top_p < 1.0:
        total, mass = math.fsum(odds[i] for i in kept), 0.0
        head: list[int] = []
        for i in kept:
            if mass >= top_p * total and head:
                break
            head.append(i)
            mass += odds[i]
        kept = head
    total = math.fsum(odds[i] for i in kept)
    return {i: odds[i] / total for i in kept}


def many_draws(logits, n, **row):
    """`n` draws of one distribution, at other seeds, choices and positions."""
    rows = [SamplingRow(seed=1000 + i // 100, choice=i % 4, position=i, **row) for i in range(n)]
    batch = torch.tensor(logits, dtype=torch.float32).expand(n, len(logits))
    return sample(batch, build(rows))


# --- greedy ---------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = torch.full((3, 70_001), -1.0)
    logits[0, [9, 40_000, 70_000]] = 2.0
    logits[1, 70_000] = 2.0
    assert draw(logits, [SamplingRow(temperature=0.0)] * 3) == [9, 70_000, 0]


def test_greedy_tie_of_zeros_ignores_the_sign():
    assert draw([[-1.0, -0.0, 0.0]], [SamplingRow(temperature=0.0)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1e-8, 9e-6, 1e-30])
def test_tiny_temperature_is_greedy(temperature):
    assert draw(
        [[1.0, 1.0001, 1.00009]], [SamplingRow(temperature=temperature, top_p=0.5, top_k=2)]
    ) == [1]


def test_low_temperature_stays_exact():
    """Large logits over a low temperature: two tokens one apart at T = 1 keep their odds."""
    logits = [1000.0, 1000.0 - 2.0**-13, -50.0]
    temperature = 2.0**-13
    ids = many_draws(logits, 4000, temperature=temperature)
    share = float((ids == 0).double().mean())
    assert abs(share - 1 / (1 + math.exp(-1))) < 5 * (0.2 / 4000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = build([SamplingRow(temperature=t, top_p=0.9) for t in (0.0, 1.0, 0.7, 0.0)])
    assert torch.equal(sample(logits, rows), sample(logits.float(), rows))


# --- filters --------------------------------------------------------------------------------------


@st.composite
def filtered_rows(draw_):
    vocab_size = draw_(st.integers(1, 12))
    # Halves make ties; the odd value makes masses that do not.
    logit = st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.floats(-9, 9, width=16))
    logits = draw_(st.lists(logit, min_size=vocab_size, max_size=vocab_size))
    row = SamplingRow(
        temperature=draw_(st.sampled_from([0.3, 0.7, 1.0, 1.7])),
        top_p=draw_(st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.61, 0.37, 0.01])),
        top_k=draw_(st.sampled_from([0, 0, 1, 2, 3, 5, 100])),
        min_p=draw_(st.sampled_from([0.0, 0.0, 0.02, 0.11, 0.53, 1.0])),
        seed=draw_(st.integers(-(2**63), 2**63 - 1)),
        position=draw_(st.integers(0, 2**20)),
    )
    return logits, row


def is_decidable(logits, row):
    """False where the definition itself hangs on a rounding: a cut within 1e-5 of a boundary."""

    def shifted(name, by):
        return kept_by_definition(
            logits, row._replace(**{name: getattr(row, name) * (1 + by)})
        ).keys()

    names = [name for name in ("top_p", "min_p") if 0.0 < getattr(row, name) < 1.0]
    return all(shifted(name, -1e-5) == shifted(name, 1e-5) for name in names)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(filtered_rows(), min_size=1, max_size=4))
def test_filters_match_their_definition(cases):
    """The set of tokens that ever come up in many draws is what the definition keeps."""
    cases = [case for case in cases if is_decidable(*case)]
    for logits, row in cases:
        kept = kept_by_definition(logits, row)
        # n draws miss a token of probability p with (1 - p)^n: look only for the likely ones.
        seen = set(
            many_draws(
                logits,
                200,
                temperature=row.temperature,
                top_p=row.top_p,
                top_k=row.top_k,
                min_p=row.min_p,
            ).tolist()
        )
        assert seen <= kept.keys()
        assert {i for i, p in kept.items() if p > 0.05} <= seen


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(filtered_rows(), min_size=1, max_size=6))
def test_a_filtered_draw_is_the_unfiltered_draw_over_what_is_kept(cases):
    """Filtering is forbidding: the same noise, over logits of -inf outside the definition's set."""
    cases = [case for case in cases if is_decidable(*case)]
    width = max((len(logits) for logits, _ in cases), default=1)
    logits = torch.full((len(cases), width), -INF)
    forbidden = logits.clone()
    for i, (row_logits, row) in enumerate(cases):
        logits[i, : len(row_logits)] = torch.tensor(row_logits)
        for token_id in kept_by_definition(row_logits, row):
            forbidden[i, token_id] = row_logits[token_id]
    rows = [row for _, row in cases]
    plain = [row._replace(top_p=1.0, top_k=0, min_p=0.0) for row in rows]
    assert draw(logits, rows) == draw(forbidden, plain)


def test_ties_at_a_cut_keep_the_lowest_ids():
    logits = [0.0, 1.0, 1.0, 1.0, 1.0, -INF]
    assert set(many_draws(logits, 400, top_k=2).tolist()) == {1, 2}
    # Four equal shares of about 0.228: the third crosses 0.5.
    assert set(many_draws(logits, 400, top_p=0.5).tolist()) == {1, 2, 3}
    assert set(many_draws(logits, 400, top_k=3, top_p=0.5).tolist()) == {1, 2}


def test_a_likelier_token_behind_the_tie_is_kept():
    logits = [0.0, 0.0, 0.0, 2.0]
    assert set(many_draws(logits, 400, top_k=2).tolist()) == {0, 3}


@pytest.mark.parametrize(
    "row", [{"top_p": 1e-9}, {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"min_p": 2.0}]
)
def test_one_token_always_remains(row):
    assert set(many_draws([0.0, 3.0, 2.9, -INF], 200, **row).tolist()) == {1}


def test_filters_at_real_vocabulary_size():
    """Every draw of 60 rows of 49,152 tokens is the draw over the definition's set."""
    logits = torch.randn(60, 49_152, generator=torch.Generator().manual_seed(5)) * 3
    rng = random.Random(5)
    rows = [
        SamplingRow(
            temperature=rng.choice([0.6, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.95, 0.5]),
            top_k=rng.choice([0, 20, 1000]),
            min_p=rng.choice([0.0, 0.01]),
            seed=i,
            position=i,
        )
        for i in range(6)
    ]
    forbidden = torch.full((6, 49_152), -INF)
    for i, row in enumerate(rows):
        kept = list(kept_by_definition(logits[i].tolist(), row))
        forbidden[i, kept] = logits[i, kept]
    copies = 10
    tiled = [
        row._replace(position=100 * row.position + copy) for copy in range(copies) for row in rows
    ]
    plain = [row._replace(top_p=1.0, top_k=0, min_p=0.0) for row in tiled]
    assert draw(logits[:6].repeat(copies, 1), tiled) == draw(forbidden.repeat(copies, 1), plain)


# --- distribution ---------------------------------------------------------------------------------

LOGITS = [2.0, 1.5, 1.5, 0.7, 0.0, -0.4, -1.0, -2.0, 1.1, -INF]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.8},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.1, "top_k": 7, "top_p": 0.9},
    ],
)
def test_draws_follow_the_exact_distribution(row):
    """Chi-square of 20,000 draws; the seed is fixed, so this passes always or never."""
    n = 20_000
    expected = kept_by_definition(LOGITS, SamplingRow(**row))
    expected = {i: p for i, p in expected.items() if p > 0}
    counts = torch.bincount(many_draws(LOGITS, n, **row), minlength=len(LOGITS)).tolist()
    assert all(i in expected for i, count in enumerate(counts) if count)
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_rare_tokens_come_up_as_often_as_they_should():
    """The tail of the noise: 1,000 equal tokens against one that is e^9 likelier."""
    logits = [0.0] * 1000 + [9.0]
    n = 20_000
    p = 1000 / (1000 + math.exp(9.0))
    rare = int((many_draws(logits, n) < 1000).sum())
    assert abs(rare - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_noise_is_finite_and_falls_as_the_word_grows():
    """At the ends: v = 2^-33, where E = v, and v = 1 - 2^-24, where E = 24 log 2."""
    noise = -_log_exponential(torch.tensor([0, 1, 255, 1 << 20, 1 << 31, (1 << 32) - 1]))
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)
    assert float(noise[0]) == pytest.approx(33 * math.log(2), rel=1e-6)
    assert float(noise[4]) == pytest.approx(-math.log(math.log(2)), rel=1e-6)
    assert float(noise[-1]) == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


# --- what decides a draw --------------------------------------------------------------------------


def test_seed_choice_and_position_decide():
    logits = torch.zeros(1, 5000)
    base = SamplingRow(seed=3, choice=1, position=17)
    first = draw(logits, [base])
    assert draw(logits, [base]) == first
    others = [
        base._replace(seed=4),
        base._replace(choice=0),
        base._replace(position=18),
        base._replace(seed=3 + (1 << 32)),
    ]
    assert len({first[0], *(draw(logits, [row])[0] for row in others)}) == 5


def test_pinned_draws():
    """A replay on another version must draw the same: change these and running requests change."""
    logits = torch.linspace(-1, 1, 1000).expand(6, -1)
    rows = [
        SamplingRow(seed=42, position=i, choice=i % 2, top_p=0.9 if i % 3 else 1.0)
        for i in range(6)
    ]
    assert draw(logits, rows) == [608, 431, 605, 821, 751, 547]


def mixed_batch(num_rows, vocab_size):
    rng = random.Random(vocab_size)
    rows = [
        SamplingRow(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            top_k=rng.choice([0, 0, 3, 40]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.getrandbits(64) - 2**63,
            choice=rng.randrange(3),
            position=rng.randrange(5000),
        )
        for _ in range(num_rows)
    ]
    # Rounded, so that cuts meet ties; flat, so that a lost bit of a score changes a token.
    logits = (
        torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 8
    ).round() / 8
    return logits, rows


@pytest.mark.parametrize("vocab_size", [7, 1001, 33_003])
def test_a_token_does_not_depend_on_the_batch(vocab_size):
    logits, rows = mixed_batch(24, vocab_size)
    before = logits.clone()
    whole = draw(logits, rows)
    assert torch.equal(logits, before)
    assert [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(24)] == whole
    rng = random.Random(0)
    for size in (2, 5, 13, 24):
        for _ in range(3):
            subset = rng.sample(range(24), size)
            assert draw(logits[subset], [rows[i] for i in subset]) == [whole[i] for i in subset]


def test_a_filter_that_is_off_changes_nothing_when_others_use_it():
    """Far tokens whose weight underflows are still drawn when their row has its filters off."""
    logits = torch.zeros(2, 400)
    logits[:, 0] = 12.0
    plain = [SamplingRow(temperature=1.0, seed=i, position=i) for i in range(300)]
    filtered = SamplingRow(top_p=0.5, top_k=3, min_p=0.1)
    alone = draw(logits[:1].expand(300, -1), plain)
    beside = draw(logits[:1].expand(301, -1), [*plain, filtered])
    half_on = draw(
        logits[:1].expand(301, -1), [*(row._replace(top_k=400) for row in plain), filtered]
    )
    assert beside[:300] == alone
    assert half_on[:300] == alone


def test_elementwise_functions_give_a_value_its_bits_wherever_it_lies():
    """Batch independence rests on this: vector body, scalar tail, thread boundary, alignment."""
    values = torch.rand(100_003, generator=torch.Generator().manual_seed(2)) + 2.0**-33
    for function, argument in (
        (torch.log, values),
        (torch.log1p, -values * 0.999),
        (torch.exp, -30 * values),
    ):
        whole = function(argument)
        for start in (0, 1, 3, 17):
            for length in (1, 5, 16, 33, 1003, 49_152):
                part = slice(start, start + length)
                assert torch.equal(function(argument[part]), whole[part])
                assert torch.equal(function(argument[part].clone()), whole[part])


# --- degenerate rows ------------------------------------------------------------------------------


def test_no_rows():
    assert draw(torch.zeros(0, 5), []) == []


def test_a_forbidden_token_is_never_drawn():
    assert set(many_draws([-INF, 0.0, -INF, 0.0], 300).tolist()) == {1, 3}
    assert set(
        many_draws([-INF, 0.0, -INF, 0.0], 300, top_k=4, top_p=0.999, min_p=1e-6).tolist()
    ) == {1, 3}


@pytest.mark.parametrize(
    "bad", [[math.nan] * 4, [0.0, math.nan, 1.0, 2.0], [-INF] * 4, [INF, 0.0, INF, 1.0]]
)
def test_broken_logits_give_an_id_and_leave_the_neighbours_alone(bad):
    good = [0.0, 1.0, 2.0, 1.5]
    for row in (
        SamplingRow(temperature=0.0),
        SamplingRow(),
        SamplingRow(top_k=2, top_p=0.9, min_p=0.1),
    ):
        ids = draw([good, bad, good], [row, row, row._replace(position=1)])
        assert 0 <= ids[1] < 4
        assert [ids[0]] == draw([good], [row])
        assert [ids[2]] == draw([good], [row._replace(position=1)])
