"""Two schedules over the same slices: nano-batching by hand gives the sequential executor's logits.

Shape legend: S rows that sample, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.protocol import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.batch import ForwardBatch, PersistentBatch
from engine.executors.sequential import SequentialExecutor
from engine.kv.cache import KVCache
from engine.models.registry import load_model
from engine.models.slices import DenseSlices
from engine.sampler import SamplingRows
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams
from tests.exact.measure import logit_errors
from tests.tiny_llama import LLAMA3, VOCAB_SIZE, write_model

FP32_TOLERANCE = 1e-5  # of the row's largest magnitude
BLOCK_SIZE = 4
# How many tokens each request computes in each step: chunks and single tokens side by side.
STEPS = {
    "a": (9, 1, 1, 5, 1),
    "b": (5, 4, 1, 1, 1),
    "c": (1, 1, 6, 1, 1),
    "d": (20, 1, 1, 3, 1),
    "e": (3, 7, 2, 1, 1),
    "f": (1, 8, 1, 1, 1),
}
NUM_STEPS = 5
HALVES = ("abc", "def")
Logits = list[Tensor]  # logits_SV of each step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the tests only read."""
    return write_model(tmp_path_factory.mktemp("llama"), rope_parameters=LLAMA3)


def plans_of(requests: str) -> Iterator[StepPlan]:
    """The steps of these requests; each leaves and joins again, so that a plan says it all.

    Their blocks are scattered over the pool and never another's. In the third step the chunks end
    before the known tokens do, and do not sample.
    """
    rng = random.Random(0)
    tokens = {name: tuple(rng.randrange(VOCAB_SIZE) for _ in range(40)) for name in STEPS}
    for step in range(NUM_STEPS):
        joins, chunks = [], []
        for name in requests:
            first, behind = ([0, *accumulate(STEPS[name])][i] for i in (step, step + 1))
            known = behind + (step == 2 and behind - first > 1)
            groups = tuple(BlockGroup(ord(name) - ord("a") + 6 * i, 1) for i in range(10))
            params = SamplingParams(max_tokens=99, temperature=0.0)
            joins.append(Join(RequestId(name), tokens[name][:known], 1, first, groups, params))
            if behind - first > 1:
                chunks.append(Chunk(RequestId(name), behind - first))
        leaves = tuple(map(RequestId, requests)) if step else ()
        yield StepPlan(step_id=step, leaves=leaves, joins=tuple(joins), chunks=tuple(chunks))


def make_cache(model: DenseSlices) -> KVCache:
    block_bytes = BLOCK_SIZE * model.shape.kv_token_bytes
    geometry = KVGeometry(block_size=BLOCK_SIZE, num_blocks=60, block_bytes=block_bytes)
    return KVCache(model.shape, geometry)


def make_attention(model: DenseSlices) -> ReferenceAttention:
    return ReferenceAttention(make_cache(model), model.shape)


def make_batch() -> PersistentBatch:
    return PersistentBatch(len(STEPS), 41, BLOCK_SIZE)


def run_together(model: DenseSlices, requests: str) -> Logits:
    """The sequential executor, all of these requests at once."""
    logits: Logits = []

    def note(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        logits.append(logits_SV)
        return logits_SV.argmax(dim=1)

    cache = make_cache(model)
    attention = ReferenceAttention(cache, model.shape)
    executor = SequentialExecutor(model, attention, cache, make_batch(), sampler=note)
    for plan in plans_of(requests):
        executor.submit(plan)
        executor.poll()
    return logits


def run_interleaved(model: DenseSlices) -> tuple[Logits, Logits]:
    """Two halves a stage apart: the attention of one follows the dense slice of the other."""
    attention, batches = make_attention(model), (make_batch(), make_batch())
    logits: tuple[Logits, Logits] = ([], [])
    for plans in zip(*map(plans_of, HALVES), strict=True):
        ahead, behind = (
            stages(model, attention, batch.apply(plan), half)
            for batch, plan, half in zip(batches, plans, logits, strict=True)
        )
        with torch.inference_mode():
            next(ahead)
            while next(behind, "over") != "over":
                next(ahead, None)
    return logits


def stages(
    model: DenseSlices, attention: AttentionBackend, batch: ForwardBatch, logits: Logits
) -> Iterator[str]:
    """One step of one half, a dense slice or an attention at a time."""
    prepared = attention.prepare(batch)
    carry, qkv = model.first(
        torch.from_numpy(batch.token_ids_T), torch.from_numpy(batch.positions_T)
    )
    yield "dense"
    for layer in range(1, model.shape.num_layers):
        attended_THD = attention.attend(layer - 1, *qkv, prepared)
        yield "attention"
        carry, qkv = model.middle(layer, carry, attended_THD)
        yield "dense"
    attended_THD = attention.attend(model.shape.num_layers - 1, *qkv, prepared)
    yield "attention"
    logits.append(model.last(carry, attended_THD, torch.from_numpy(batch.sample_tokens_S)))
    yield "dense"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_schedule_gives_the_same_logits(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype)
    alone = [run_together(model, half) for half in HALVES]
    for one, other in zip(alone, run_interleaved(model), strict=True):
        assert all(map(torch.equal, one, other))


def test_the_whole_batch_gives_the_logits_of_its_halves_within_rounding(folder: Path) -> None:
    halves_SV, whole_SV = halves_and_whole(load_model(folder, "float32"))
    assert logit_errors(whole_SV, halves_SV).max <= FP32_TOLERANCE
    # What bf16 may cost is measured, not guessed: the company that a request keeps must not move
    # its logits as far as bf16 itself moves them from fp32. (Here it moves them a sixth of that:
    # a row's padding changes the order of summation, which now and then flips a rounding.)
    bf16_halves_SV, bf16_whole_SV = halves_and_whole(load_model(folder, "bfloat16"))
    rounding = logit_errors(bf16_halves_SV, halves_SV).max
    assert logit_errors(bf16_whole_SV, bf16_halves_SV).max <= rounding


def halves_and_whole(model: DenseSlices) -> tuple[Tensor, Tensor]:
    """The fp32 logits_SV of all steps in the same order, run by halves and run at once."""
    halves = zip(*(run_together(model, half) for half in HALVES), strict=True)
    whole = run_together(model, "".join(HALVES))
    assert [len(logits_SV) for logits_SV in whole] == [6, 6, 4, 6, 6]
    return torch.cat([torch.cat(step) for step in halves]).float(), torch.cat(whole).float()
