"""The real model against transformers, in small; `python -m tests.exact` is the whole proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.backend import load_best
from tests.exact.measure import (
    BF16_MEAN_FACTOR,
    BF16_P999_FACTOR,
    FP32_LIMIT,
    GREEDY_DIFFERENCES,
    GREEDY_GAP,
    bf16_excess,
    logit_errors,
    logprob_errors,
    partings,
)
from tests.exact.reference import Reference, prose
from tests.exact.teacher import Played, Script, Stage, play, teach

pytestmark = pytest.mark.realmodel

LENGTHS = (255, 130, 64, 17, 3, 400)
NUM_FORCED = 16
# All six need 242 blocks; with these, two are preempted. Blocks are small so that 16 tokens are
# several blocks of growth, more than the watermark of admission keeps free.
STAGE = Stage(budget=64, max_num_running=6, num_blocks=128, block_size=4)


class Right(NamedTuple):
    """What transformers says in fp32: its greedy tokens, and the logits behind them."""

    scripts: list[Script]
    logits_NPV: Tensor


@pytest.fixture(params=["torch", "native"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Choose the kernels; native ones know blocks of 16 tokens, too large for preemptions here."""
    if request.param == "native":
        return replace(STAGE, num_blocks=32, block_size=16)
    monkeypatch.setenv("HOCKET_KERNELS", "torch")
    return STAGE


@pytest.fixture(scope="module")
def right(real_model: Path) -> Right:
    reference = Reference(real_model, torch.float32)
    prompts = prose(real_model, LENGTHS, seed=0)
    scripts = [Script(prompt, reference.greedy(prompt, NUM_FORCED)[0]) for prompt in prompts]
    return Right(scripts, torch.stack([reference.whole(script) for script in scripts]))


def test_fp32_logits_are_those_of_transformers(
    real_model: Path, right: Right, stage: Stage
) -> None:
    logits_NPV, played = teach(load_best(real_model, "float32")[0], right.scripts, stage)
    _was_rough(played, stage)
    assert logit_errors(logits_NPV, right.logits_NPV).max <= FP32_LIMIT


def test_bf16_is_no_further_from_fp32_than_transformers_bf16(
    real_model: Path, right: Right, stage: Stage
) -> None:
    reference = Reference(real_model, torch.bfloat16)
    whole_NPV = torch.stack([reference.whole(script) for script in right.scripts])
    theirs = logprob_errors(whole_NPV, right.logits_NPV)
    logits_NPV, played = teach(load_best(real_model, "bfloat16")[0], right.scripts, stage)
    _was_rough(played, stage)
    mean, p999 = bf16_excess(logprob_errors(logits_NPV, right.logits_NPV), theirs)
    assert mean <= BF16_MEAN_FACTOR
    assert p999 <= BF16_P999_FACTOR


def test_free_running_greedy_texts_are_those_of_transformers(
    real_model: Path, right: Right, stage: Stage
) -> None:
    prompts = [script.prompt for script in right.scripts]
    played = play(load_best(real_model, "float32")[0], prompts, NUM_FORCED, stage)
    _was_rough(played, stage)
    texts = [script.forced for script in right.scripts]
    found = partings(played.tokens, texts, right.logits_NPV)
    assert len(found) <= GREEDY_DIFFERENCES
    assert all(parting.gap < GREEDY_GAP for parting in found)


def _was_rough(played: Played, stage: Stage) -> None:
    """Or the comparison would say little."""
    assert played.num_mixed_steps > 0
    assert played.num_preemptions > 0 or stage.block_size == 16
