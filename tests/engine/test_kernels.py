"""The native kernels, at every level of this machine: right, alike in any company, never late.

Shape legend: N requests, P forced positions, V vocabulary; T tokens, H query heads, G key heads, D
head size.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.kernels.native as native
from engine.attention.native import NativeAttention
from engine.backend import backend_of
from engine.batch import PersistentBatch, SamplingArrays
from engine.build import build_engine
from engine.config import EngineConfig
from engine.kernels.llama import NativeLlama
from engine.kernels.native import NativeKernels, NoKernels, choose
from engine.kernels.rows import NativeRows
from engine.kv.cache import KVCache
from engine.models.registry import load_model
from engine.models.slices import ModelShape
from engine.rows import TorchRows
from engine.sampler import SamplingRows
from engine.startup import CannotStart, StartupTimes
from scheduler.instance.plan import BlockCopy, Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams
from serving.progress import NoProgress
from tests.exact.teacher import Script, Stage, play, teach
from tests.tiny_llama import VOCAB_SIZE, write_model

LEVELS = native.levels()
DTYPES = ("float32", "bfloat16")
# Three query heads to a key head and one to one; heads of 1, 3 and 5 vectors; sizes that fill no
# panel of 32 columns.
SHAPES: dict[str, Any] = {
    "grouped": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "each its own": {"num_attention_heads": 4, "head_dim": 48, "intermediate_size": 80},
    "one for all": {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 80},
    "large heads": {"num_attention_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
}
LENGTHS = (5, 40, 300, 17, 620, 64)  # of prompts; parts of 256 keys are merged in two of them
NUM_FORCED = 5
CROWD = Stage(budget=70, max_num_running=4, num_blocks=64, steps_between_arrivals=1)
ALONE = Stage(budget=2048, max_num_running=1, num_blocks=64)


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    change = SHAPES[request.param]
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=1024, **change)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("small"), **SHAPES["grouped"])


def scripts() -> list[Script]:
    generator = torch.Generator().manual_seed(0)

    def tokens(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB_SIZE, (num,), generator=generator).tolist())

    return [Script(tokens(length), tokens(NUM_FORCED)) for length in LENGTHS]


def loaded(folder: Path, level: str, dtype: str = "float32", num_threads: int = 2) -> NativeLlama:
    model = load_model(folder, dtype, kernels=NativeKernels(level, num_threads))
    assert isinstance(model, NativeLlama)
    return model


def geometry(shape: ModelShape, num_blocks: int) -> KVGeometry:
    return KVGeometry(block_size=16, num_blocks=num_blocks, block_bytes=16 * shape.kv_token_bytes)


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_logits_are_those_of_torch(folder: Path, level: str) -> None:
    right_NPV, _ = teach(load_model(folder, "float32"), scripts(), CROWD)
    found_NPV, played = teach(loaded(folder, level), scripts(), CROWD)
    assert played.num_mixed_steps > 0
    assert (found_NPV - right_NPV).abs().max() <= 2e-5 * right_NPV.abs().max()


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_is_as_near_to_fp32_as_torch_is(folder: Path, level: str) -> None:
    right_NPV, _ = teach(load_model(folder, "float32"), scripts(), CROWD)
    torch_NPV, _ = teach(load_model(folder, "bfloat16"), scripts(), CROWD)
    found_NPV, _ = teach(loaded(folder, level, "bfloat16"), scripts(), CROWD)
    assert (found_NPV - right_NPV).abs().mean() <= (torch_NPV - right_NPV).abs().mean()


# --- alike ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_request_has_the_same_bits_in_any_company(folder: Path, level: str, dtype: str) -> None:
    """In chunks, beside others, with a pool too small for all, and on one to five threads."""
    right_NPV, _ = teach(loaded(folder, level, dtype, 1), scripts(), ALONE)
    for num_threads, stage in ((2, CROWD), (5, CROWD), (3, ALONE)):
        found_NPV, _ = teach(loaded(folder, level, dtype, num_threads), scripts(), stage)
        assert torch.equal(found_NPV, right_NPV)


@pytest.mark.parametrize("dtype", DTYPES)
def test_preemption_changes_no_bit(small: Path, dtype: str) -> None:
    prompts = [script.prompt[:90] for script in scripts()]
    model = loaded(small, LEVELS[-1], dtype)
    right = play(model, prompts, 20, Stage(budget=512, max_num_running=1, num_blocks=32))
    tight = Stage(budget=40, max_num_running=6, num_blocks=12)
    found = play(model, prompts, 20, tight)
    assert found.num_preemptions > 0
    assert found.tokens == right.tokens


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_log_sum_exp_is_that_of_all_scores(small: Path, level: str, dtype: str) -> None:
    """One decoding request whose keys make three parts, computed as items of their own."""
    model = loaded(small, level, dtype)
    shape = model.shape
    num_keys, num_blocks = 600, 38
    backend = backend_of(model, geometry(shape, num_blocks))
    attention = backend.attention
    assert isinstance(attention, NativeAttention)
    generator = torch.Generator().manual_seed(1)
    persistent = PersistentBatch(1, 1024, 16)
    join = Join(
        RequestId("a"),
        (0,) * num_keys,
        num_keys,
        0,
        (BlockGroup(0, num_blocks),),
        SamplingParams(max_tokens=9),
    )
    sizes = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
    qkv_TXD = torch.randn(num_keys, sum(sizes), shape.head_dim, generator=generator)
    qkv_TXD = qkv_TXD.to(model.activation_dtype)
    q_THD, k_TGD, v_TGD = torch.split(qkv_TXD, list(sizes), dim=1)
    rest = num_keys - 1
    plans = (
        StepPlan(step_id=0, joins=(join,), chunks=(Chunk(RequestId("a"), rest),)),
        StepPlan(step_id=1),
    )
    for plan, tokens in zip(plans, (slice(0, rest), slice(rest, num_keys)), strict=True):
        prepared = attention.prepare(persistent.apply(plan))
        part = q_THD[tokens], k_TGD[tokens], v_TGD[tokens]
        lse_TH = torch.full(part[0].shape[:2], math.nan)
        out_THD = attention.attend(0, *part, prepared, lse_TH=lse_TH)
        k_GCD, v_GCD = (
            x.to(shape.dtype).float().repeat_interleave(shape.num_heads // shape.num_kv_heads, 1)
            for x in (k_TGD, v_TGD)
        )
        score_HTC = torch.einsum("thd,chd->htc", part[0].float(), k_GCD) / shape.head_dim**0.5
        position_T = torch.arange(num_keys)[tokens]
        score_HTC.masked_fill_(torch.arange(num_keys) > position_T[:, None], -math.inf)
        right_THD = torch.einsum("htc,chd->thd", score_HTC.softmax(-1), v_GCD)
        near = 1e-5 if dtype == "float32" else 2e-2
        assert (out_THD.float() - right_THD).abs().max() <= near
        assert (lse_TH - score_HTC.logsumexp(-1).T).abs().max() <= near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_tokens_of_a_packed_block_are_copied_and_no_others(dtype: torch.dtype) -> None:
    shape = ModelShape(
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=8,
        max_model_len=64,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    pair = 4 // dtype.itemsize
    cache = KVCache(shape, geometry(shape, 2), is_packed=True)
    kv = cache._kv
    for num_tokens in range(17):
        kv[0], kv[1] = 1.0, 2.0
        cache.copy((BlockCopy(0, 1, num_tokens),))
        keys = kv[1, :, 0].reshape(2, 2, 16 // pair, 16, pair).transpose(2, 3).flatten(3)
        values = kv[1, :, 1].reshape(2, 2, 16 // pair, 16, pair).transpose(3, 4).flatten(2, 3)
        for slots in (keys, values):
            assert (slots[:, :, :num_tokens] == 1.0).all()
            assert (slots[:, :, num_tokens:] == 2.0).all()


# --- rows ----------------------------------------------------------------------------------------


def sampling_rows(temperatures: list[float]) -> SamplingRows:
    num = len(temperatures)
    arrays = SamplingArrays(
        temperature_S=np.array(temperatures, dtype=np.float32),
        top_p_S=np.ones(num, dtype=np.float32),
        top_k_S=np.zeros(num, dtype=np.int64),
        min_p_S=np.zeros(num, dtype=np.float32),
        seed_S=np.arange(num),
        choice_S=np.zeros(num, dtype=np.int64),
        position_S=np.arange(num) + 5,
    )
    return SamplingRows.build(arrays, torch.device("cpu"))


@pytest.mark.parametrize("level", LEVELS)
def test_draws_are_those_of_torch(level: str) -> None:
    """Of the same words; that logarithms differ in their last bits decides none of these."""
    rows = NativeRows(native.extension().Machine(level, 2, False))
    logits_SV = torch.randn(60, 49152, generator=torch.Generator().manual_seed(3)) * 6
    how = sampling_rows([0.3 + 0.03 * index for index in range(60)])
    assert torch.equal(rows.sample(logits_SV, how), TorchRows().sample(logits_SV, how))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1, 15, 127, 128, 1000, 49152])
def test_rows_are_judged_as_torch_judges_them(level: str, size: int) -> None:
    machine = native.extension().Machine(level, 2, False)
    rows, torchs = NativeRows(machine), TorchRows()
    scores_SV = torch.randint(-3, 3, (9, size), generator=torch.Generator().manual_seed(size))
    scores_SV = scores_SV.float()  # full of ties
    scores_SV[1] = -math.inf
    greedy = sampling_rows([0.0] * 9)
    assert torch.equal(rows.sample(scores_SV, greedy), torchs.sample(scores_SV, greedy))
    scores_SV[1] = 0.0
    assert np.array_equal(rows.peaks(scores_SV), torchs.peaks(scores_SV))
    for row, poison in ((2, math.nan), (3, math.inf)):
        scores_SV[row, size // 2] = poison
        scores_SV[row + 3, -1] = poison
    assert np.isfinite(rows.peaks(scores_SV)).tolist() == [
        row not in (2, 3, 5, 6) for row in range(9)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x_TE = scores_SV.to(dtype)
        assert np.array_equal(rows.are_finite(x_TE), torchs.are_finite(x_TE))


# --- threads -------------------------------------------------------------------------------------


def test_more_threads_than_cores_lose_no_item() -> None:
    """Stages of a few microseconds, so that threads come late to most of them."""
    machine = native.extension().Machine(LEVELS[-1], 9, False)
    rows = NativeRows(machine)
    generator = torch.Generator().manual_seed(0)
    scores_SV = torch.randn(40, 300, generator=generator)
    right_S = scores_SV.amax(dim=1).numpy()
    for count in itertools.islice(itertools.cycle(range(1, 41)), 4000):
        assert np.array_equal(rows.peaks(scores_SV[:count]), right_S[:count])


# --- which ---------------------------------------------------------------------------------------


def test_the_best_level_is_chosen_and_any_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(3) == NativeKernels(LEVELS[-1], 3)
    for level in LEVELS:
        monkeypatch.setenv(native.VARIABLE, level)
        assert choose(1) == NativeKernels(level, 1)
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert choose(1) == NoKernels("HOCKET_KERNELS=torch")
    monkeypatch.setenv(native.VARIABLE, "sse")
    with pytest.raises(CannotStart) as caught:
        choose(1)
    assert all(name in caught.value.remedy for name in ("torch", *LEVELS))


def build(folder: Path, **change) -> tuple[object, str]:
    config = EngineConfig(
        model_name="tiny", model_folder=folder, num_threads=2, kv_memory_bytes=1 << 20, **change
    )
    core, ready = build_engine(config, StartupTimes(NoProgress()), lambda _: None)
    return core, ready.kernels


def test_an_engine_says_which_kernels_it_runs_on(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(small)[1] == f"native, {LEVELS[-1]}"
    monkeypatch.setenv(native.VARIABLE, "neon")
    with pytest.raises(CannotStart, match="HOCKET_KERNELS=neon"):
        build(small)


def test_without_a_compiler_torch_serves_and_says_what_was_lost(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("no module _native")

    monkeypatch.setattr(native, "extension", missing)
    assert "without a C++ compiler" in build(small)[1]


def test_a_model_of_other_shapes_runs_on_torch(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_attention_heads=8, head_dim=24)
    assert "head_dim = 24 is no multiple of 16" in build(folder)[1]
