"""How near steps come to what this machine could do at all.

A step's floor is the longer of two times: its bytes over the fastest reading of memory seen, and
its floating-point operations over the fastest matrix product seen. Both are measured here and now,
on the same threads, between the steps, since shared machines change by the minute. Both limits are
the best of their tries, so the best step says what share the kernels reach, and the median what
share is left of it in company.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import machine
from engine.backend import backend_of, load_best
from engine.bench.steps import Case, Stand, Steps, fill, geometry
from engine.kernels.native import NativeKernels, choose, extension
from engine.models.registry import read_config
from engine.models.slices import ModelShape
from engine.startup import Progress
from engine.work import Work

_READ_BYTES = 512 << 20  # more than caches hold
_GEMM_SIZE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Which steps to measure: decodes of each batch size, and one prompt of `chunk` tokens."""

    batch: Sequence[int] = (1, 8, 32)
    context: int = 256
    chunk: int = 256
    rounds: int = 10
    seed: int = 0

    @property
    def cases(self) -> list[Case]:
        decodes = [Case(batch=size, context=self.context) for size in self.batch]
        return [*decodes, Case(batch=1, context=0, num_tokens=self.chunk)]


@dataclass(slots=True)
class _Limits:
    """The best seen so far, in bytes and floating-point operations a second."""

    read: float = 0.0
    gemm: float = 0.0


def main(folder: Path, dtype: str, choices: Choices, progress: Progress) -> str:
    """Measure the model in `folder`; return the report. Raises what loading a model raises."""
    num_threads = machine.num_usable_cores()
    torch.set_num_threads(num_threads)
    progress.phase("reading weights", None)
    model, kernels = load_best(folder, dtype)
    cases, rounds = choices.cases, choices.rounds
    # A decode's context grows with each step.
    longest = max(choices.context + 3 * rounds + 2, choices.chunk + 1)
    num_rows = max(choices.batch)
    backend = backend_of(model, geometry(model.shape, num_rows, longest))
    fill(backend, choices.seed)
    stand = Stand(model=model, backend=backend, num_rows=num_rows, max_model_len=longest)
    limits, probes = _Limits(), _probes(num_threads)
    seconds: list[list[float]] = [[] for _ in cases]
    steps = [Steps(stand, case) for case in cases]
    progress.phase("measuring", rounds)
    for turn in range(rounds):
        for kind, probe in probes:
            setattr(limits, kind, max(getattr(limits, kind), probe()))
        for index, each in enumerate(steps):
            seconds[index] += [each.step() for _ in range(1 if cases[index].num_tokens > 1 else 3)]
        progress.advance(turn + 1)
    lines = [
        f"{folder.name}, {str(model.shape.dtype).removeprefix('torch.')}, measured on this CPU"
        f" ({platform.machine()}): kernels {kernels}, {num_threads} threads, seed {choices.seed},"
        f" {rounds} rounds",
        "",
        f"reading memory   {limits.read / 1e9:8.1f} GB/s      the best of {rounds},"
        f" {_READ_BYTES >> 20} MiB",
        f"matrix products  {limits.gemm / 1e9:8.1f} GFLOP/s   the best of {rounds},"
        f" {_GEMM_SIZE}^3 in fp32 and bf16, torch's",
        "",
        f"{'step':<34}{'MB':>6}{'GFLOP':>7}{'floor ms':>10}{'best':>9}{'share':>6}"
        f"{'median (quartiles)':>28}{'share':>6}",
    ]
    config = read_config(folder)
    for case, arm in zip(cases, seconds, strict=True):
        lines.append(_line(case, _work(case, config, model.shape), limits, arm))
    return "\n".join(lines)


def _work(case: Case, config: dict[str, Any], shape: ModelShape) -> Work:
    return Work.of(
        config, shape, batch=case.batch, context=case.context, num_tokens=case.num_tokens
    )


def _line(case: Case, work: Work, limits: _Limits, seconds: list[float]) -> str:
    floor_s = max(work.num_bytes / limits.read, work.num_flops / limits.gemm)
    best = min(seconds)
    low, median, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
    return (
        f"{case!s:<34}{work.num_bytes / 1e6:>6.0f}{work.num_flops / 1e9:>7.2f}"
        f"{1000 * floor_s:>10.2f}{1000 * best:>9.2f}{floor_s / best:>6.0%}"
        f"{f'{median:.2f} ({low:.2f} to {high:.2f})':>28}{1000 * floor_s / median:>6.0%}"
    )


def _probes(num_threads: int) -> list[tuple[str, Callable[[], float]]]:
    """Return measurements of the limits, each with the name of the one it is of."""
    memory = torch.zeros(_READ_BYTES // 4)
    chosen = choose(num_threads)
    native = None
    if isinstance(chosen, NativeKernels):
        native = extension().Machine(chosen.level, num_threads, is_bf16=False)

    def read() -> float:
        began_s = time.perf_counter()
        if native is None:
            memory.sum()
        else:
            native.read(memory.data_ptr(), memory.nbytes)
        return memory.nbytes / (time.perf_counter() - began_s)

    def gemm(dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(2))

        def multiply() -> float:
            began_s = time.perf_counter()
            torch.mm(a, b)
            return 2 * _GEMM_SIZE**3 / (time.perf_counter() - began_s)

        return multiply

    return [("read", read), ("gemm", gemm(torch.float32)), ("gemm", gemm(torch.bfloat16))]
