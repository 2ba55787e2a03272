"""Bitwise equal logits whatever the company, the chunks, the prefix found and the preemptions.

Executors are driven by plans made here, so that each road to a token is exactly what it says.

Shape legend: P positions behind the prompt, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.invariant import InvariantAttention
from engine.attention.reference import ReferenceAttention
from engine.batch import PersistentBatch
from engine.bench.invariant import Choices
from engine.bench.invariant import main as measure
from engine.build import build_engine
from engine.config import EngineConfig
from engine.executors.sequential import SequentialExecutor
from engine.kernels.native import levels
from engine.kv.cache import KVCache
from engine.models.invariant import InvariantLinear, invariant_kernels, silu
from engine.models.kernels import Kernels
from engine.models.registry import load_model
from engine.models.slices import DenseSlices
from engine.row_ladder import SIZES
from engine.sampler import SamplingRows
from engine.startup import CannotStart, StartupTimes
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams
from serving.progress import NoProgress
from tests.tiny_llama import write_model

CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")
NUM_OUTPUTS = 12
LENGTHS = (43, 3, 57, 16, 29, 70, 1, 35)  # of prompts; the first one's logits are compared
MAX_LENGTH = 120  # company goes on while the first request recomputes
NUM_REGIONS = len(LENGTHS) + 2  # a region of blocks for each request and two more


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three query heads read one key head, as in SmolLM2: rows have to be padded."""
    return write_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
    )


# --- roads to a token ----------------------------------------------------------------------------


@cache
def sequence(number: int, vocab_size: int) -> tuple[int, ...]:
    """All that request `number` reads and says."""
    rng = random.Random(number)
    return tuple(rng.randrange(vocab_size) for _ in range(MAX_LENGTH))


@dataclass
class Stage:
    """An executor, and a sampler that writes logits down and dictates the tokens."""

    model: DenseSlices
    invariant: bool
    block_size: int = 4
    split: int = 16  # the first request's 55 tokens lie in four
    sizes: tuple[int, ...] = SIZES
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.model.shape
        self.region = -(-MAX_LENGTH // self.block_size)
        geometry = KVGeometry(
            block_size=self.block_size,
            num_blocks=NUM_REGIONS * self.region,
            block_bytes=self.block_size * shape.kv_token_bytes,
        )
        memory = KVCache(shape, geometry)
        attention = (
            InvariantAttention(memory, shape, split=self.split, sizes=self.sizes)
            if self.invariant
            else ReferenceAttention(memory, shape)
        )
        batch = PersistentBatch(NUM_REGIONS, self.region * self.block_size, self.block_size)
        self.executor = SequentialExecutor(self.model, attention, memory, batch, sampler=self)
        self.known: dict[RequestId, int] = {}
        self.to_compute: dict[RequestId, int] = {}

    def __call__(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        said = []
        for row_V, number, position in zip(
            logits_SV, rows.seed_S.tolist(), rows.position_S.tolist(), strict=True
        ):
            self.logits[number, position] = row_V.clone()
            said.append(sequence(number, self.model.shape.vocab_size)[position])
        return torch.tensor(said)

    def blocks(self, region: int) -> list[int]:
        """Scattered: where a block lies is nobody's business."""
        blocks = list(range(region * self.region, (region + 1) * self.region))
        random.Random(region).shuffle(blocks)
        return blocks

    def join(
        self,
        number: int,
        *,
        known: int,
        computed: int = 0,
        blocks: list[int] | None = None,
        name: str = "",
    ) -> Join:
        request_id = RequestId(name or str(number))
        self.known[request_id], self.to_compute[request_id] = known, known - computed
        blocks = self.blocks(number) if blocks is None else blocks
        return Join(
            request_id,
            sequence(number, self.model.shape.vocab_size)[:known],
            LENGTHS[number],
            computed,
            tuple(BlockGroup(block, 1) for block in blocks),
            SamplingParams(max_tokens=NUM_OUTPUTS, temperature=0.0, seed=number),
        )

    def step(
        self, joins: tuple[Join, ...] = (), leaves: tuple[str, ...] = (), chunk: int = 1000
    ) -> None:
        """Everyone computes; who has more than one token left takes `chunk` of them at most."""
        ids = tuple(RequestId(leave) for leave in leaves)
        for request_id in ids:
            del self.to_compute[request_id]
        chunks = []
        for request_id, left in self.to_compute.items():
            num_tokens = min(left, chunk)
            self.to_compute[request_id] = max(1, left - num_tokens)
            if num_tokens > 1:
                chunks.append(Chunk(request_id, num_tokens))
        self.executor.submit(StepPlan(step_id=0, joins=joins, leaves=ids, chunks=tuple(chunks)))
        assert not self.executor.poll().failures

    def play(self, number: int = 0, *, until: int = NUM_OUTPUTS, chunk: int = 1000) -> None:
        """Step until the request has `until` outputs."""
        while (number, LENGTHS[number] + until - 1) not in self.logits:
            self.step(chunk=chunk)

    def outputs(self) -> Tensor:
        """Return the logits_PV behind the first request's prompt."""
        return torch.stack([self.logits[0, LENGTHS[0] + index] for index in range(NUM_OUTPUTS)])


def alone(stage: Stage) -> None:
    stage.step((stage.join(0, known=LENGTHS[0]),))
    stage.play()


def in_chunks_of(chunk: int) -> Callable[[Stage], None]:
    def play(stage: Stage) -> None:
        stage.step((stage.join(0, known=LENGTHS[0]),), chunk=chunk)
        stage.play(chunk=chunk)

    return play


def in_company(stage: Stage) -> None:
    """Five are at it when the request comes, two come while it decodes; one leaves early."""
    stage.step(tuple(stage.join(number, known=LENGTHS[number]) for number in (1, 2, 3, 4, 5)))
    stage.step((stage.join(0, known=LENGTHS[0]),), chunk=5)
    stage.play(until=3, chunk=5)
    stage.step(tuple(stage.join(number, known=LENGTHS[number]) for number in (6, 7)), ("3",))
    stage.play(chunk=9)


def behind_a_prefix_of(num_tokens: int) -> Callable[[Stage], None]:
    """The blocks were computed for another request, in company and in chunks of 7."""

    def play(stage: Stage) -> None:
        spare = stage.blocks(NUM_REGIONS - 1)
        first = stage.join(0, known=LENGTHS[0], blocks=spare, name="another")
        stage.step((first, stage.join(4, known=LENGTHS[4])), chunk=7)
        stage.play(until=2, chunk=7)
        stage.logits.clear()
        num_blocks = -(-num_tokens // stage.block_size)
        found = spare[:num_blocks] + stage.blocks(0)[num_blocks:]
        again = stage.join(0, known=LENGTHS[0], computed=num_tokens, blocks=found)
        stage.step((again,), ("another",))
        stage.play()

    return play


def preempted(stage: Stage) -> None:
    """Twice, and computed again from nothing, elsewhere: once whole, once in chunks."""
    stage.step((stage.join(0, known=LENGTHS[0]), stage.join(2, known=LENGTHS[2])))
    stage.play(until=4)
    elsewhere = stage.blocks(NUM_REGIONS - 1)
    again = stage.join(0, known=LENGTHS[0] + 4, blocks=elsewhere, name="again")
    stage.step((again,), ("0",))
    stage.play(until=8)
    once_more = stage.join(0, known=LENGTHS[0] + 8, name="once more")
    stage.step((once_more,), ("again",), chunk=10)
    stage.play(chunk=10)


ROADS = {
    "chunks of 1": in_chunks_of(1),
    "chunks of 3": in_chunks_of(3),
    "chunks of 16": in_chunks_of(16),
    "company": in_company,
    "prefix of one block": behind_a_prefix_of(4),
    "prefix of half": behind_a_prefix_of(24),
    "all but the last token": behind_a_prefix_of(LENGTHS[0] - 1),
    "preempted": preempted,
}


def taken(model: DenseSlices, road: Callable[[Stage], None], **how) -> Tensor:
    stage = Stage(model, **how)
    road(stage)
    return stage.outputs()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_road_leads_to_the_same_bits(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype, kernels=invariant_kernels(CPU))
    right_PV = taken(model, alone, invariant=True)
    for name, road in ROADS.items():
        found_PV = taken(model, road, invariant=True)
        assert torch.equal(found_PV, right_PV), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_mode_does_not_or_the_test_above_would_say_nothing(
    folder: Path, dtype: str
) -> None:
    model = load_model(folder, dtype)
    right_PV = taken(model, alone, invariant=False)
    for road in (in_company, in_chunks_of(1), preempted):
        assert not torch.equal(taken(model, road, invariant=False), right_PV)


@pytest.mark.parametrize("sizes", [(4,), (4, 32), (8, 64)])
def test_a_machine_with_a_shorter_ladder_keeps_the_promise_too(
    folder: Path, sizes: tuple[int, ...]
) -> None:
    kernels = Kernels(InvariantLinear(sizes), silu)
    model = load_model(folder, "float32", kernels=kernels)
    right_PV = taken(model, alone, invariant=True, sizes=sizes)
    assert torch.equal(taken(model, in_company, invariant=True, sizes=sizes), right_PV)


def test_more_heads_than_rows_of_the_ladder(tmp_path: Path) -> None:
    folder = write_model(tmp_path, num_attention_heads=8, num_key_value_heads=1)
    model = load_model(folder, "float32", kernels=invariant_kernels(CPU))
    right_PV = taken(model, alone, invariant=True, sizes=(4,))
    assert torch.equal(taken(model, in_company, invariant=True, sizes=(4,)), right_PV)


def test_the_modes_differ_by_rounding_only(folder: Path) -> None:
    default_PV = taken(load_model(folder, "float32"), alone, invariant=False)
    model = load_model(folder, "float32", kernels=invariant_kernels(CPU))
    found_PV = taken(model, in_company, invariant=True)
    assert (found_PV - default_PV).abs().max() <= 1e-5 * default_PV.abs().max()


@pytest.mark.realmodel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_model_takes_every_road_alike(real_model: Path, dtype: str) -> None:
    model = load_model(real_model, dtype, kernels=invariant_kernels(CPU))
    how = {"invariant": True, "block_size": 16, "split": 32}
    right_PV = taken(model, alone, **how)
    for road in (in_company, behind_a_prefix_of(32)):
        assert torch.equal(taken(model, road, **how), right_PV)


def test_the_bench_tells_the_modes_apart(folder: Path) -> None:
    choices = Choices(batch=(1, 3), context=20, chunk=8, rounds=1, seed=1)
    report = measure(folder, "float32", choices, NoProgress())
    assert "seed 1" in report
    assert report.count("\ndecode, batch") == 2
    assert "\nchunk of 8 behind 20" in report
    assert "\ntorch, invariant: 0 of a request's 8 rows" in report
    assert "\nnative, " + levels()[-1] + ": 0 of" in report
    assert "\ntorch: 0 of" not in report


def test_the_engine_is_built_so_and_refuses_to_start_where_it_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOCKET_KERNELS", "torch")
    config = EngineConfig(
        model_name="tiny",
        model_folder=folder,
        num_threads=2,
        kv_memory_bytes=1 << 20,
        batch_invariant=True,
    )
    times = StartupTimes(NoProgress())
    core, _ = build_engine(config, times, lambda _: None)
    executor: Any = core._executor
    assert isinstance(executor._attention, InvariantAttention)
    assert executor._model._silu is silu
    assert times.seconds["kernels"] > 0
    linear, calls = F.linear, Counter[int]()

    def fickle(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        calls[len(x_TK)] += 1
        product_TN: Tensor = linear(x_TK, weight_NK)
        return product_TN * (1 + calls[len(x_TK)])

    monkeypatch.setattr(F, "linear", fickle)
    with pytest.raises(CannotStart, match="batch invariance"):
        build_engine(config, times, lambda _: None)
