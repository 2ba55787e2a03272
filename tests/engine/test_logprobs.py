"""Log-probabilities: right, finite, in one order, and the same in any company.

Shape suffixes: S rows, R rows, V vocabulary, M prompt tokens.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from engine.attention.reference import ReferenceAttention
from engine.batch import PersistentBatch, PromptScores, RowRules
from engine.executors.sequential import SequentialExecutor
from engine.kv.cache import KVCache
from engine.logprobs import (
    FLOOR,
    PROMPT_TOKENS_AT_ONCE,
    logprobs,
    prompt_logprobs,
    sampled_logprobs,
)
from engine.models.registry import load_model
from engine.models.slices import DenseSlices
from scheduler.instance.plan import Chunk, Join, SampledToken, StepPlan, StepResult
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, Logprobs, RequestId, SamplingParams
from tests.tiny_llama import VOCAB_SIZE, write_model

INF = math.inf
# exp in fp32 and fixed point of 40 bits.
TOLERANCE = 1e-6


def some_logits(num_rows: int, vocab_size: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(vocab_size)
    return (4 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def some_tokens(num_rows: int, vocab_size: int):
    return torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(0))


def assert_close(found: Logprobs, logits: torch.Tensor, token: int, num_top: int) -> None:
    """Against log_softmax in double and a sort by hand."""
    exact = logits.double().log_softmax(dim=0).tolist()
    order = sorted(range(len(exact)), key=lambda i: (-logits[i].item(), i))[:num_top]
    assert [i for i, _ in found.top] == order
    assert found.chosen == pytest.approx(exact[token], abs=TOLERANCE)
    assert [p for _, p in found.top] == pytest.approx([exact[i] for i in order], abs=TOLERANCE)


# bfloat16 of a real vocabulary is full of ties; 100,003 tokens make slabs of two rows.
@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, torch.float32), (37, torch.float32), (20_011, torch.bfloat16), (100_003, torch.float32)],
)
def test_logprobs_match_log_softmax(vocab_size, dtype):
    logits_SV = some_logits(5, vocab_size, dtype)
    tokens_S = some_tokens(5, vocab_size)
    num_top = [0, 20, 1, 7, 3]
    for i, found in enumerate(logprobs(logits_SV, tokens_S, num_top)):
        assert_close(found, logits_SV[i], int(tokens_S[i]), num_top[i])


def test_a_flat_distribution_is_exact():
    (found,) = logprobs(torch.zeros(1, 65_536), torch.tensor([65_535]), 2)
    assert found == (-16 * math.log(2), ((0, -16 * math.log(2)), (1, -16 * math.log(2))))


def test_ties_go_to_the_lowest_ids():
    logits_SV = torch.full((2, 5000), -3.0)
    logits_SV[0, [4999, 70, 2000]] = 1.0
    logits_SV[1, 11] = -2.0
    ids = [[i for i, _ in found.top] for found in logprobs(logits_SV, torch.tensor([0, 0]), 5)]
    assert ids == [[70, 2000, 4999, 0, 1], [11, 0, 1, 2, 3]]


def test_zeros_are_equal_whatever_their_sign():
    (found,) = logprobs(torch.tensor([[-0.0, 0.0, -1e-30, 1e-30]]), torch.tensor([0]), 4)
    assert [i for i, _ in found.top] == [3, 0, 1, 2]


@pytest.mark.parametrize("num_top", [0, 3, 4, 50])
def test_num_top_may_be_anything(num_top):
    (found,) = logprobs(torch.tensor([[0.0, 2.0, -1.0, 1.0]]), torch.tensor([2]), num_top)
    assert [i for i, _ in found.top] == [1, 3, 0, 2][:num_top]


def test_a_token_has_one_number():
    logits_SV = some_logits(6, 9001, torch.bfloat16)
    for found in logprobs(logits_SV, logits_SV.float().argmax(dim=1), 3):
        assert found.chosen == found.top[0][1]


def test_no_rows():
    assert logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), 3) == []


@pytest.mark.parametrize("vocab_size", [7, 1001, 60_001])
def test_a_row_is_the_same_in_any_company(vocab_size):
    logits_SV, tokens_S = some_logits(7, vocab_size), some_tokens(7, vocab_size)
    num_top = [5, 0, 20, 3, 1, 2, 5]
    alone = [logprobs(logits_SV[i : i + 1], tokens_S[i : i + 1], num_top[i])[0] for i in range(7)]
    rng = random.Random(0)
    for size in (2, 5, 7, 7):
        order = rng.sample(range(7), size)
        found = logprobs(logits_SV[order], tokens_S[order], [num_top[i] for i in order])
        assert found == [alone[i] for i in order]


@pytest.mark.parametrize(
    "broken", [[math.nan] * 3, [0.0, math.nan, 1.0], [-INF] * 3, [INF, 0.0, INF], [INF, -INF, 0.0]]
)
def test_a_broken_row_is_finite_and_leaves_its_neighbours_alone(broken):
    good = [0.5, -1.0, 2.0]
    found = logprobs(torch.tensor([good, broken, good]), torch.tensor([0, 1, 2]), 3)
    assert [found[1].chosen, *(p for _, p in found[1].top)] == [FLOOR] * 4
    assert sorted(i for i, _ in found[1].top) == [0, 1, 2]
    assert found[0] == logprobs(torch.tensor([good]), torch.tensor([0]), 3)[0]
    assert found[2] == logprobs(torch.tensor([good]), torch.tensor([2]), 3)[0]


def test_impossible_tokens_are_at_the_floor():
    (found,) = logprobs(torch.tensor([[-INF, 0.0, -1e6]]), torch.tensor([0]), 3)
    assert found == (FLOOR, ((1, 0.0), (2, FLOOR), (0, FLOOR)))


def test_only_the_rows_that_ask_are_answered():
    logits_SV, tokens_S = some_logits(4, 50), some_tokens(4, 50)

    def rules(index, num_top):
        params = SamplingParams(max_tokens=9, min_tokens=1, logprobs=num_top)
        return RowRules(index, params, np.arange(3), 2)

    found = sampled_logprobs(logits_SV, tokens_S, [rules(3, 2), rules(0, None), rules(1, 0)])
    one, three = logprobs(logits_SV[[1, 3]], tokens_S[[1, 3]], [0, 2])
    assert found == [None, one, None, three]


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 200])
def test_a_prompt_in_parts_is_the_prompt_in_one_call(num_tokens):
    logits_TV = some_logits(2 * num_tokens + 1, 131)
    targets_M = some_tokens(num_tokens, 131)
    calls = []

    def logits_of(tokens_M):
        calls.append(len(tokens_M))
        return logits_TV[tokens_M]

    tokens_M = np.arange(num_tokens) * 2 + 1
    scores = PromptScores(0, RequestId("r"), tokens_M, targets_M.numpy(), 5, 3)
    ((request_id, start, positions),) = prompt_logprobs([scores], logits_of)
    assert (request_id, start) == ("r", 5)
    assert list(positions) == logprobs(logits_TV[tokens_M], targets_M, 3)
    assert max(calls) <= PROMPT_TOKENS_AT_ONCE
    assert sum(calls) == num_tokens


# --- through the executor -------------------------------------------------------------------------

PROMPT = tuple(random.Random(3).randrange(VOCAB_SIZE) for _ in range(100))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DenseSlices:
    return load_model(write_model(tmp_path_factory.mktemp("llama")), "float32")


def run(
    model: DenseSlices,
    params: SamplingParams,
    chunks: tuple[int, ...],
    prompt: tuple[int, ...] = PROMPT,
) -> list[StepResult]:
    """One request, its prompt in these chunks and then a token at a time."""
    geometry = KVGeometry(block_size=4, num_blocks=32, block_bytes=4 * model.shape.kv_token_bytes)
    cache = KVCache(model.shape, geometry)
    attention = ReferenceAttention(cache, model.shape)
    executor = SequentialExecutor(model, attention, cache, PersistentBatch(2, 128, 4))
    name = RequestId("r")
    join = Join(name, prompt, len(prompt), 0, (BlockGroup(0, 32),), params)
    results = []
    for step, num_tokens in enumerate(chunks):
        executor.submit(
            StepPlan(
                step_id=step,
                joins=() if step else (join,),
                chunks=(Chunk(name, num_tokens),) if num_tokens > 1 else (),
            )
        )
        results.append(executor.poll())
    return results


def test_the_executor_scores_a_prompt_in_chunks(model):
    """The chunk of 92 exceeds what is computed at once; every position but the first is there."""
    params = SamplingParams(max_tokens=9, temperature=0.0, prompt_logprobs=2)
    scored = [
        part for result in run(model, params, (7, 1, 92, 1)) for part in result.prompt_logprobs
    ]
    assert [(part.start, len(part.positions)) for part in scored] == [(1, 7), (8, 1), (9, 91)]
    (whole,) = [part for r in run(model, params, (100,)) for part in r.prompt_logprobs]
    assert (whole.start, len(whole.positions)) == (1, 99)
    in_parts = [position for part in scored for position in part.positions]
    # Matrix products of other shapes round differently.
    for one, other in zip(in_parts, whole.positions, strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]


def logprobs_of(sampled: SampledToken) -> Logprobs:
    assert sampled.logprobs is not None
    return sampled.logprobs


def test_reading_a_text_scores_what_writing_it_did(model):
    """Sampled, so that the tokens are not the likeliest ones; a place off would show."""
    writing = SamplingParams(max_tokens=9, seed=5, logprobs=2)
    written = [result.sampled[0] for result in run(model, writing, (100, *[1] * 12))]
    text = (*PROMPT, *(sampled.token_id for sampled in written))
    reading = SamplingParams(max_tokens=9, prompt_logprobs=2)
    (read,) = run(model, reading, (113,), text)[0].prompt_logprobs
    assert len({logprobs_of(sampled).chosen for sampled in written}) > 10
    for sampled, position in zip(written, read.positions[99:], strict=True):
        assert position.chosen == pytest.approx(logprobs_of(sampled).chosen, abs=1e-3)
        assert [i for i, _ in position.top] == [i for i, _ in logprobs_of(sampled).top]


def test_the_executor_applies_rules_and_reports_the_models_own_logprobs(model):
    asked = SamplingParams(max_tokens=9, temperature=0.0, logprobs=2)
    (plain,) = run(model, asked, (100,))[0].sampled
    likeliest, own = plain.token_id, logprobs_of(plain)
    assert own.top[0] == (likeliest, own.chosen)
    banned = SamplingParams(
        max_tokens=9, temperature=0.0, logprobs=2, bad_token_ids=((likeliest,),)
    )
    (ruled,) = run(model, banned, (100,))[0].sampled
    assert ruled.token_id == own.top[1][0]
    assert logprobs_of(ruled) == (own.top[1][1], own.top)
    silent = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=1)
    assert run(model, silent, (100,))[0].sampled[0].logprobs is None
