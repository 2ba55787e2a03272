"""What the batch-invariant mode costs a step, and that it does what it says.

Owns instances of one model, torch's default one and its invariant one over one KV memory, and the
native one, whose steps alternate A-B-C-C-B-A, so that a slow minute of the machine falls on all.

Shape legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine import machine
from engine.attention.invariant import InvariantAttention
from engine.backend import backend_of, torch_kernels
from engine.bench.steps import Case, Stand, Steps, fill, geometry, submit
from engine.kernels.llama import NotForNative
from engine.kernels.native import NativeKernels, choose
from engine.models.invariant import meet_weights
from engine.models.registry import load_model
from engine.sampler import SamplingRows
from engine.startup import Progress
from scheduler.instance.plan import Chunk, StepPlan

# The check: one request, alone and in company, of so many tokens, decoding so many more.
_CHECK_COMPANY, _CHECK_PROMPT, _CHECK_OUTPUTS = 7, 40, 8


@dataclass(slots=True)
class _Witness:
    """A sampler that keeps the logits of request 0 and lets every row say the same token."""

    rows: list[Tensor] = field(default_factory=list)

    def __call__(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        self.rows += [row_V.clone() for row_V in logits_SV[rows.seed_S == 0]]
        return torch.full((len(logits_SV),), 7)


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
    progress.phase("reading weights, several times", None)
    stands = _stands(folder, dtype, choices)
    shape = stands["torch"].model.shape
    titles = "".join(f"{name:>24}" for name in stands)
    lines = [
        f"{folder.name}, {str(shape.dtype).removeprefix('torch.')}, measured on this CPU"
        f" ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}): torch"
        f" {torch.__version__}, {torch.get_num_threads()} threads, seed {choices.seed};"
        f" {rounds} rounds, there and back",
        "",
        f"{'ms of a step, median (quartiles)':<34}{titles}{'ratio':>8}",
    ]
    progress.phase("measuring", len(cases) * rounds)
    for index, case in enumerate(cases):
        arms = [Steps(stand, case, _Witness()) for stand in stands.values()]
        seconds: list[list[float]] = [[] for _ in arms]
        for turn in range(rounds):
            for arm in (*range(len(arms)), *reversed(range(len(arms)))):
                seconds[arm].append(arms[arm].step())
            progress.advance(index * rounds + turn + 1)
        lines.append(_line(case, seconds))
    progress.phase("comparing logits", None)
    lines += ["", "The ratio is that of torch's two modes; native kernels have one."]
    lines += [
        f"{name}: {_num_different(stand)} of a request's {_CHECK_OUTPUTS} rows of logits"
        f" differ between alone and in company of {_CHECK_COMPANY}"
        for name, stand in stands.items()
    ]
    return "\n".join(lines)


def _stands(folder: Path, dtype: str, choices: Choices) -> dict[str, Stand]:
    """Both modes of torch's operators, over one memory; native kernels where this machine has them.

    The promise costs those nothing: they have but one way to compute a row.
    """
    num_rows, longest = choices.num_rows, choices.max_model_len
    models = [
        load_model(folder, dtype, kernels=torch_kernels(folder, dtype, batch_invariant=invariant))
        for invariant in (False, True)
    ]
    room = geometry(models[0].shape, num_rows, longest)
    default = backend_of(models[0], room)
    meet_weights(models[1])
    invariant = replace(default, attention=InvariantAttention(default.cache, models[1].shape))
    fill(default, choices.seed)
    stands = {"torch": (models[0], default), "torch, invariant": (models[1], invariant)}
    chosen = choose(torch.get_num_threads())
    if isinstance(chosen, NativeKernels):
        with contextlib.suppress(NotForNative):
            model = load_model(folder, dtype, kernels=chosen)
            backend = backend_of(model, room)
            fill(backend, choices.seed)
            stands[f"native, {chosen.level}"] = (model, backend)
    return {
        name: Stand(model=model, backend=backend, num_rows=num_rows, max_model_len=longest)
        for name, (model, backend) in stands.items()
    }


def _num_different(stand: Stand) -> int:
    """Return how many rows of a request's logits have other bits in company than alone."""
    found = []
    for company in (0, _CHECK_COMPANY):
        witness = _Witness()
        executor = stand.executor(witness)
        joins = tuple(
            # Prompts of different lengths, the first one's unchanged.
            stand.join(number, _CHECK_PROMPT - 3 * number)
            for number in range(company + 1)
        )
        chunks = tuple(Chunk(join.request_id, len(join.token_ids)) for join in joins)
        submit(executor, StepPlan(step_id=0, joins=joins, chunks=chunks))
        for _ in range(_CHECK_OUTPUTS - 1):
            submit(executor, StepPlan(step_id=0))
        found.append(witness.rows)
    return sum(not torch.equal(*pair) for pair in zip(*found, strict=True))


def _line(case: Case, seconds: Sequence[list[float]]) -> str:
    cells = []
    for arm in seconds:
        low, median, high = (1000 * value for value in statistics.quantiles(arm, n=4))
        cells.append(f"{median:.1f} ({low:.1f} to {high:.1f})")
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[0])
    return f"{case!s:<34}" + "".join(f"{cell:>24}" for cell in cells) + f"{ratio:>8.2f}"
