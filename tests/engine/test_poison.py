"""Requests that break a real model: they end alone, and their neighbours' tokens do not change.

The model is wrapped so that one token id makes its forward pass raise and another fills its rows
with NaN; a seed makes sampling raise. In batch-invariant mode, so that tokens can be compared with
those of running alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backend import backend_of, load_best
from engine.batch import PersistentBatch
from engine.core import EngineCore
from engine.executors.sequential import NOT_FINITE, SequentialExecutor
from engine.messages import Submit
from engine.models.invariant import invariant_kernels
from engine.models.registry import load_model
from engine.models.slices import Carry, DenseSlices, Projected
from engine.sampler import SamplingRows, sample
from scheduler.config import InstanceConfig
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import FinishReason, KVGeometry, RequestId, RequestSpec, SamplingParams
from tests.tiny_llama import write_model

RAISES, IS_NAN = 5, 6  # token ids
BAD_SEED = 666
NUM_BLOCKS = 60


class Poisoned:
    """A model that two tokens break."""

    def __init__(self, inner: DenseSlices) -> None:
        self.inner = inner
        self.shape = inner.shape
        self.middle, self.last = inner.middle, inner.last

    def first(self, token_ids_T: Tensor, positions_T: Tensor) -> tuple[Carry, Projected]:
        if (token_ids_T == RAISES).any():
            raise ValueError("a token that the model cannot take")
        carry, (q, k, v) = self.inner.first(token_ids_T, positions_T)
        is_nan_T = token_ids_T == IS_NAN
        carry.residual_TE[is_nan_T] = torch.nan
        k[is_nan_T], v[is_nan_T] = torch.nan, torch.nan
        return carry, Projected(q, k, v)


def touchy(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
    if ((rows.seed_S == BAD_SEED) & (rows.position_S % 3 == 0)).any():
        raise RuntimeError("a row that cannot be sampled")
    return sample(logits_SV, rows)


def make_instance(model: Poisoned, max_num_running: int, depth: int = 1):
    geometry = KVGeometry(block_size=16, num_blocks=NUM_BLOCKS, block_bytes=1)
    backend = backend_of(model.inner, geometry, batch_invariant=True)
    batch = PersistentBatch(max_num_running, 128, 16)
    executor = SequentialExecutor(
        model, backend.attention, backend.cache, batch, rows=backend.rows, sampler=touchy
    )
    config = InstanceConfig(
        max_model_len=128, max_num_batched_tokens=64, max_num_running=max_num_running
    )
    reports: list = []
    scheduler = InstanceScheduler(config, geometry)
    return (
        EngineCore(scheduler, executor, reports.append, depth=depth),
        scheduler,
        backend.cache,
        reports,
    )


def serve(model: Poisoned, specs: list[RequestSpec], max_num_running: int, depth: int = 1):
    core, scheduler, cache, reports = make_instance(model, max_num_running, depth)
    for spec in specs:
        core.inbox.put(Submit(spec))
    core.turn()
    while scheduler.has_work or core._in_flight:
        core.turn()
    scheduler.check_idle()
    tokens: dict[RequestId, list[int]] = {spec.request_id: [] for spec in specs}
    ends = {end.request_id: end for report in reports for end in report.finished}
    for report in reports:
        for event in report.tokens:
            tokens[event.request_id].append(event.token_id)
    return tokens, ends, scheduler, cache


def make_specs(rng: random.Random, num: int, num_poison: int, vocab_size: int):
    """Return specs and what is wrong with some of them."""
    usable = [token for token in range(vocab_size) if token not in (RAISES, IS_NAN)]
    never = ((RAISES, -100.0), (IS_NAN, -100.0))
    specs: list[RequestSpec] = []
    poison: dict[RequestId, str] = {}
    stem = [rng.choice(usable) for _ in range(40)]
    for index in range(num):
        prompt = stem[: rng.choice([0, 16, 33])] + rng.choices(usable, k=rng.randint(1, 30))
        params: dict[str, Any] = {"logit_bias": never}
        kind = ("prompt raises", "prompt is NaN", "output raises", "output is NaN", "sampling")
        if index < num_poison:
            wrong = kind[index % len(kind)]
            poison[RequestId(str(index))] = wrong
            token = RAISES if "raises" in wrong else IS_NAN
            if wrong.startswith("prompt"):
                prompt.insert(rng.randrange(len(prompt)), token)
            elif wrong.startswith("output"):
                params = {"allowed_token_ids": (token,)}
            else:
                params["seed"] = BAD_SEED
        spec = RequestSpec(
            request_id=RequestId(str(index)),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(
                max_tokens=rng.randint(4, 12), **{"seed": index, "temperature": 0.9, **params}
            ),
        )
        specs.append(spec)
    rng.shuffle(specs)
    return specs, poison


def check(model: DenseSlices, num: int, num_poison: int, depth: int) -> None:
    poisoned = Poisoned(model)
    specs, poison = make_specs(random.Random(depth), num, num_poison, model.shape.vocab_size)
    with torch.inference_mode():
        tokens, ends, scheduler, cache = serve(poisoned, specs, 12, depth)
        well = [spec for spec in specs if spec.request_id not in poison]
        alone, _, _, _ = serve(poisoned, well, 1)  # one after the other
    assert len(poison) == num_poison
    for spec in specs:
        end = ends[spec.request_id]
        if spec.request_id in poison:
            assert end.reason is FinishReason.ERROR, poison[spec.request_id]
            is_nan = "NaN" in poison[spec.request_id]
            assert (end.error == NOT_FINITE) == is_nan
        else:
            assert end.reason is FinishReason.LENGTH, end.error
            assert tokens[spec.request_id] == alone[spec.request_id]
    assert scheduler.view().num_failures == num_poison
    # What is still to be cleared is cleared by the next plan, before anyone else has it.
    dirty = {b for group in scheduler.kv.to_clear() for b in range(group.start, group.end)}
    clean = [block for block in range(NUM_BLOCKS) if block not in dirty]
    assert cache._kv[clean].isfinite().all(), "garbage is left where others will compute"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DenseSlices:
    folder: Path = write_model(tmp_path_factory.mktemp("llama"))
    return load_model(folder, "float32", kernels=invariant_kernels(torch.device("cpu")))


@pytest.mark.parametrize("depth", [1, 2])
def test_ten_poisonous_requests_of_forty_end_alone(tiny: DenseSlices, depth: int) -> None:
    check(tiny, 40, 10, depth)


def test_nan_is_found_in_the_chunk_where_it_is_computed(tiny: DenseSlices) -> None:
    core, scheduler, _, reports = make_instance(Poisoned(tiny), 1)
    prompt = (1, IS_NAN, *[2] * 98)  # two chunks, and the first one samples nothing
    params = SamplingParams(max_tokens=2, temperature=0.0)
    core.inbox.put(
        Submit(RequestSpec(request_id=RequestId("a"), prompt_token_ids=prompt, params=params))
    )
    core.turn()
    assert [end.error for end in reports[-1].finished] == [NOT_FINITE]
    assert scheduler.view().num_steps == 1


class Broken(Poisoned):
    """A model whose last slice cannot be computed for anyone, or is NaN for everyone."""

    def __init__(self, inner: DenseSlices, *, raises: bool) -> None:
        super().__init__(inner)

        def last(carry: Carry, attended_THD: Tensor, tokens_S: Tensor) -> Tensor:
            if raises:
                raise ValueError("the head is gone")
            return inner.last(carry, attended_THD, tokens_S) * torch.nan

        self.last = last


@pytest.mark.parametrize(
    ("raises", "error"), [(True, "the head is gone"), (False, "NaN or infinity whatever")]
)
def test_a_model_that_fails_for_everybody_ends_the_instance(
    tiny: DenseSlices, raises: bool, error: str
) -> None:
    core, _, _, reports = make_instance(Broken(tiny, raises=raises), 4)
    params = SamplingParams(max_tokens=2, temperature=0.0)
    for name in "abc":
        core.inbox.put(
            Submit(RequestSpec(request_id=RequestId(name), prompt_token_ids=(1, 2), params=params))
        )
    with pytest.raises((ValueError, RuntimeError), match=error):
        core.run()
    assert error not in reports[-1].cause
    assert error in reports[-1].trace


@pytest.mark.realmodel
def test_five_poisonous_requests_of_fifty_end_alone_in_a_real_model(real_model: Path) -> None:
    model, _ = load_best(real_model, "bfloat16", batch_invariant=True)
    check(model, 50, 5, depth=2)
