"""Steps of one kind, made by hand, for measuring: an executor, its memory, and requests in it.

Owns what all measurements of steps share. Serves nobody: contexts are claimed computed, and hold
random keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.backend import Backend
from engine.batch import PersistentBatch
from engine.config import BLOCK_SIZE
from engine.executors.sequential import Sampler, SequentialExecutor
from engine.models.slices import DenseSlices, ModelShape
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of step: `batch` requests compute `num_tokens` each behind `context` others."""

    batch: int
    context: int
    num_tokens: int = 1

    def __str__(self) -> str:
        if self.num_tokens == 1:
            return f"decode, batch {self.batch}, context {self.context}"
        return f"chunk of {self.num_tokens} behind {self.context}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """One way to compute a model; makes executors with no request in them."""

    model: DenseSlices
    backend: Backend
    num_rows: int
    max_model_len: int

    def join(self, number: int, num_tokens: int, *, computed: int = 0) -> Join:
        """A request that knows `num_tokens`, with blocks for as many as any may have."""
        num_blocks = -(-self.max_model_len // BLOCK_SIZE)
        return Join(
            request_id=RequestId(str(number)),
            token_ids=tuple(7 + number + index for index in range(num_tokens)),
            num_prompt_tokens=num_tokens,
            num_computed_tokens=computed,
            groups=(BlockGroup(number * num_blocks, num_blocks),),
            params=SamplingParams(max_tokens=self.max_model_len, temperature=0.0, seed=number),
        )

    def executor(self, sampler: Sampler | None = None) -> SequentialExecutor:
        return SequentialExecutor(
            self.model,
            self.backend.attention,
            self.backend.cache,
            PersistentBatch(self.num_rows, self.max_model_len, BLOCK_SIZE),
            rows=self.backend.rows,
            forward=self.backend.forward,
            sampler=sampler,
        )


class Steps:
    """Steps of one kind, one after another: decodes go on, chunks come anew."""

    def __init__(self, stand: Stand, case: Case, sampler: Sampler | None = None) -> None:
        self._stand = stand
        self._executor = stand.executor(sampler)
        self._case = case
        self._present: tuple[Join, ...] = ()
        self.step()

    def step(self) -> float:
        """Compute one; return its seconds."""
        if self._present and self._case.num_tokens == 1:
            return submit(self._executor, StepPlan(step_id=0))
        leaves = tuple(join.request_id for join in self._present)
        self._present = tuple(self._join(number) for number in range(self._case.batch))
        chunks = tuple(
            Chunk(join.request_id, self._case.num_tokens)
            for join in self._present
            if self._case.num_tokens > 1
        )
        plan = StepPlan(step_id=0, leaves=leaves, joins=self._present, chunks=chunks)
        return submit(self._executor, plan)

    def _join(self, number: int) -> Join:
        known = self._case.context + self._case.num_tokens
        return self._stand.join(number, known, computed=self._case.context)


def geometry(shape: ModelShape, num_rows: int, max_model_len: int) -> KVGeometry:
    """Return room for so many requests of that length."""
    return KVGeometry(
        block_size=BLOCK_SIZE,
        num_blocks=num_rows * -(-max_model_len // BLOCK_SIZE),
        block_bytes=BLOCK_SIZE * shape.kv_token_bytes,
    )


def fill(backend: Backend, seed: int) -> None:
    """Let every block hold random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    for block in backend.cache.blocks():
        block.copy_(torch.randn(block.shape, generator=generator))


def submit(executor: SequentialExecutor, plan: StepPlan) -> float:
    """Run one step; return its seconds."""
    executor.submit(plan)
    result = executor.poll()
    assert not result.failures, result.failures[0].cause
    return result.duration_s
