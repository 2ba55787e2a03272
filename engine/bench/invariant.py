"""What the batch-invariant mode costs a step, and that it does what it says.

Owns two instances of one model over one KV memory, the default one and the invariant one, whose
steps alternate A-B-B-A, so that a slow minute of the machine falls on both. Serves nobody: contexts
are claimed computed and hold random keys and values.

Shape legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine import machine
from engine.attention.invariant import InvariantAttention
from engine.attention.protocol import AttentionBackend
from engine.attention.reference import ReferenceAttention
from engine.batch import PersistentBatch
from engine.config import BLOCK_SIZE
from engine.executors.sequential import Sampler, SequentialExecutor
from engine.kv.cache import KVCache
from engine.models.invariant import invariant_kernels, meet_weights
from engine.models.registry import load_model
from engine.models.slices import DenseSlices
from engine.sampler import SamplingRows
from engine.startup import Progress
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams

_ABBA = (0, 1, 1, 0)
# The check: one request, alone and in company, of so many tokens, decoding so many more.
_CHECK_COMPANY, _CHECK_PROMPT, _CHECK_OUTPUTS = 7, 40, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of step: `batch` requests compute `num_tokens` each behind `context` others."""

    batch: int
    context: int
    num_tokens: int = 1

    def __str__(self) -> str:
        if self.num_tokens > 1:
            return f"chunk of {self.num_tokens} behind {self.context}"
        return f"decode, batch {self.batch}, context {self.context}"


@dataclass(slots=True)
class _Witness:
    """A sampler that keeps the logits of request 0 and lets every row say the same token."""

    rows: list[Tensor] = field(default_factory=list)

    def __call__(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        self.rows += [row_V.clone() for row_V in logits_SV[rows.seed_S == 0]]
        return torch.full((len(logits_SV),), 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    """One way to compute the model; makes executors with no request in them."""

    name: str
    model: DenseSlices
    attention: AttentionBackend
    cache: KVCache
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

    def executor(self, sampler: Sampler) -> SequentialExecutor:
        batch = PersistentBatch(self.num_rows, self.max_model_len, BLOCK_SIZE)
        return SequentialExecutor(self.model, self.attention, self.cache, batch, sampler=sampler)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What to measure: decodes of each batch size, and one chunk, all behind `context` tokens."""

    batch: Sequence[int] = (1, 8, 32)
    context: int = 256
    chunk: int = 512
    rounds: int = 10
    seed: int = 0

    @property
    def cases(self) -> list[Case]:
        decodes = [Case(batch=size, context=self.context) for size in self.batch]
        return [*decodes, Case(batch=1, context=self.context, num_tokens=self.chunk)]

    @property
    def num_rows(self) -> int:
        return max(*self.batch, _CHECK_COMPANY + 1)

    @property
    def max_model_len(self) -> int:
        # A decode's context grows with each step: two in a round, and a first, which is not
        # counted.
        longest = self.context + max(self.chunk, 2 * self.rounds + 2)
        return max(longest, _CHECK_PROMPT + _CHECK_OUTPUTS) + 1


def main(folder: Path, dtype: str, choices: Choices, progress: Progress) -> str:
    """Measure the model in `folder`; return the report. Raises what loading a model raises."""
    torch.set_num_threads(machine.num_usable_cores())
    rounds, cases = choices.rounds, choices.cases
    progress.phase("reading weights, twice", None)
    modes = _modes(folder, dtype, choices)
    shape = modes[0].model.shape
    lines = [
        f"{folder.name}, {str(shape.dtype).removeprefix('torch.')}, measured on this CPU"
        f" ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}): torch"
        f" {torch.__version__}, {torch.get_num_threads()} threads, seed {choices.seed};"
        f" {rounds} rounds of A-B-B-A",
        "",
        f"{'ms of a step, median (quartiles)':<36}{'default':>28}{'invariant':>28}{'ratio':>8}",
    ]
    progress.phase("measuring", len(cases) * rounds)
    for index, case in enumerate(cases):
        pair = [_Steps(mode, case) for mode in modes]
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            for arm in _ABBA:
                seconds[arm].append(pair[arm].step())
            progress.advance(index * rounds + turn + 1)
        lines.append(_line(case, *seconds))
    progress.phase("comparing logits", None)
    lines.append("")
    lines += [
        f"{mode.name}: {_num_different(mode)} of a request's {_CHECK_OUTPUTS} rows of logits"
        f" differ between alone and in company of {_CHECK_COMPANY}"
        for mode in modes
    ]
    return "\n".join(lines)


def _modes(folder: Path, dtype: str, choices: Choices) -> list[_Mode]:
    num_rows, longest = choices.num_rows, choices.max_model_len
    kernels = invariant_kernels(torch.device("cpu"))
    models = [load_model(folder, dtype), load_model(folder, dtype, kernels=kernels)]
    meet_weights(models[1])
    shape = models[0].shape
    geometry = KVGeometry(
        block_size=BLOCK_SIZE,
        num_blocks=num_rows * -(-longest // BLOCK_SIZE),
        block_bytes=BLOCK_SIZE * shape.kv_token_bytes,
    )
    cache = KVCache(shape, geometry)
    generator = torch.Generator().manual_seed(choices.seed)
    for layer in range(shape.num_layers):
        for memory in cache.layer(layer):
            memory.copy_(torch.randn(memory.shape, generator=generator))
    attentions: list[AttentionBackend] = [
        ReferenceAttention(cache, shape.device),
        InvariantAttention(cache, shape),
    ]
    return [
        _Mode(
            name=name,
            model=model,
            attention=attention,
            cache=cache,
            num_rows=num_rows,
            max_model_len=longest,
        )
        for name, model, attention in zip(("default", "invariant"), models, attentions, strict=True)
    ]


class _Steps:
    """Steps of one kind, one after another: decodes go on, chunks come anew."""

    def __init__(self, mode: _Mode, case: Case) -> None:
        self._mode = mode
        self._executor = mode.executor(_Witness())
        self._case = case
        self._present: tuple[Join, ...] = ()
        self.step()

    def step(self) -> float:
        """Compute one; return its seconds."""
        if self._present and self._case.num_tokens == 1:
            return _submit(self._executor, StepPlan(step_id=0))
        leaves = tuple(join.request_id for join in self._present)
        self._present = tuple(self._join(number) for number in range(self._case.batch))
        chunks = tuple(
            Chunk(join.request_id, self._case.num_tokens)
            for join in self._present
            if self._case.num_tokens > 1
        )
        plan = StepPlan(step_id=0, leaves=leaves, joins=self._present, chunks=chunks)
        return _submit(self._executor, plan)

    def _join(self, number: int) -> Join:
        known = self._case.context + self._case.num_tokens
        return self._mode.join(number, known, computed=self._case.context)


def _num_different(mode: _Mode) -> int:
    """Return how many rows of a request's logits have other bits in company than alone."""
    found = []
    for company in (0, _CHECK_COMPANY):
        witness = _Witness()
        executor = mode.executor(witness)
        joins = tuple(
            # Prompts of different lengths, the first one's unchanged.
            mode.join(number, _CHECK_PROMPT - 3 * number)
            for number in range(company + 1)
        )
        chunks = tuple(Chunk(join.request_id, len(join.token_ids)) for join in joins)
        _submit(executor, StepPlan(step_id=0, joins=joins, chunks=chunks))
        for _ in range(_CHECK_OUTPUTS - 1):
            _submit(executor, StepPlan(step_id=0))
        found.append(witness.rows)
    return sum(not torch.equal(*pair) for pair in zip(*found, strict=True))


def _submit(executor: SequentialExecutor, plan: StepPlan) -> float:
    executor.submit(plan)
    result = executor.poll()
    assert not result.failures, result.failures[0].cause
    return result.duration_s


def _line(case: Case, default_s: list[float], invariant_s: list[float]) -> str:
    cells = []
    for seconds in (default_s, invariant_s):
        low, median, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        cells.append(f"{median:.1f} ({low:.1f} to {high:.1f})")
    ratio = statistics.median(invariant_s) / statistics.median(default_s)
    return f"{case!s:<36}{cells[0]:>28}{cells[1]:>28}{ratio:>8.2f}"
