"""How long the steps of an executor take: measures some, and fits `StepCosts` through them.

Serves nobody: requests are made up, and the blocks they write are nobody's yet. What they leave
there is finite, as in any block that was used before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE
from engine.executor import Executor
from engine.profile import Case, Measured, Profile, What
from engine.work import Shares
from scheduler.costs import StepCosts
from scheduler.instance.plan import BlockCopy, Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId, SamplingParams

_MAX_STEPS = 8  # of one case, one after another: a decode's context grows by as many


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A case, and what its steps took."""

    case: Case
    median_s: float


def _chunks(*sizes: int, behind: int = 0) -> list[Case]:
    return [Case(chunk=size, behind=behind) for size in sizes]


def _decodes(*numbers: int, context: int) -> list[Case]:
    return [Case(num_decodes=number, context=context) for number in numbers]


# What costs are fitted to, ...
FITTED = (
    *_chunks(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    *_decodes(2, 8, 16, 32, context=16),
    *_decodes(8, 32, context=512),
    *_chunks(16, 64, 256, behind=1024),
    *_chunks(64, behind=2048),
)
# ... and what they are held against.
HELD_OUT = (
    *_decodes(4, 16, 24, context=300),
    *_decodes(12, context=900),
    *_chunks(48, behind=700),
    *_chunks(128, behind=1800),
    *_chunks(384, behind=300),
    Case(num_decodes=16, context=300, chunk=32),
    Case(num_decodes=16, context=300, chunk=60, behind=1500),
    Case(num_decodes=32, context=200, chunk=40, behind=100),
    Case(num_decodes=8, context=600, chunk=200, behind=500),
)
# What a start has the time for.
_AT_START = tuple(_chunks(1, 8, 64, 128, 256))
_WARM_UP = _chunks(BLOCK_SIZE, 1)


class Stand:
    """An executor with no request in it, and blocks that are nobody's: those from 0 on.

    `copy` fills blocks: memory that was never written reads faster than any other.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        num_rows: int,
        num_row_tokens: int,
        num_blocks: int,
        copy: Callable[[Sequence[BlockCopy]], None] = lambda _: None,
    ) -> None:
        self._executor = executor
        self._num_rows = num_rows
        self._num_row_tokens = num_row_tokens
        self._num_blocks = num_blocks
        self._copy = copy
        self._num_written = 1  # by what is measured first
        self._present: list[RequestId] = []

    def can(self, case: Case) -> bool:
        """Whether there are rows and blocks for it."""
        return (
            case.num_rows <= self._num_rows
            and case.num_row_tokens + _MAX_STEPS <= self._num_row_tokens
            and case.num_rows * _row_blocks(case) <= self._num_blocks
        )

    def seconds(self, case: Case, num_steps: int = 1) -> list[float]:
        """Compute steps, at most 8; return what each took. Where some decode, one more is first."""
        num_blocks = case.num_rows * _row_blocks(case)
        if num_blocks > self._num_written:
            blocks = range(self._num_written, num_blocks)
            self._copy([BlockCopy(0, block, BLOCK_SIZE) for block in blocks])
            self._num_written = num_blocks
        if case.num_decodes:
            context = case.context
            self._step([_join(case, row, context, 1) for row in range(case.num_decodes)])
        if not case.chunk:
            return [self._step() for _ in range(num_steps)]
        seconds, num_present = [], len(self._present) if case.num_decodes else 0
        for _ in range(num_steps):
            chunk = _join(case, case.num_decodes, case.behind, case.chunk)
            seconds.append(self._step([chunk], case.chunk, leaves=self._present[num_present:]))
        return seconds

    def _step(
        self, joins: Sequence[Join] = (), chunk: int = 1, leaves: Sequence[RequestId] | None = None
    ) -> float:
        """Compute a step, without those who leave: everybody, if others join."""
        if leaves is None:
            leaves = self._present if joins else ()
        chunks = tuple(Chunk(join.request_id, chunk) for join in joins if chunk > 1)
        plan = StepPlan(step_id=0, leaves=tuple(leaves), joins=tuple(joins), chunks=chunks)
        self._present = [each for each in self._present if each not in plan.leaves]
        self._present += [join.request_id for join in joins]
        self._executor.submit(plan)
        return self._executor.poll().duration_s


def _row_blocks(case: Case) -> int:
    return -(-(case.num_row_tokens + _MAX_STEPS) // BLOCK_SIZE)


def _join(case: Case, row: int, num_computed: int, num_tokens: int) -> Join:
    num_known, num_blocks = num_computed + num_tokens, _row_blocks(case)
    return Join(
        request_id=RequestId(f"profile-{row}"),
        token_ids=tuple((7 + row + index) % 64 for index in range(num_known)),
        num_prompt_tokens=num_known,
        num_computed_tokens=num_computed,
        groups=(BlockGroup(row * num_blocks, num_blocks),),
        params=SamplingParams(max_tokens=_MAX_STEPS + 1, temperature=1.0),
    )


def measure(
    stand: Stand, cases: Sequence[Case], num_rounds: int, on_round: Callable[[int], None]
) -> list[Cell]:
    """Measure those that the stand has room for, in turns, as machines change by the minute."""
    seconds: dict[Case, list[float]] = {case: [] for case in cases if stand.can(case)}
    for case in _WARM_UP:
        stand.seconds(case)
    for number in range(num_rounds):
        for case, found in seconds.items():
            found += stand.seconds(case, 3 if case.num_tokens < BLOCK_SIZE else 1)
        on_round(number + 1)
    return [Cell(case=case, median_s=statistics.median(s)) for case, s in seconds.items()]


def measure_within(
    stand: Stand, limit_s: float, clock: Callable[[], float] = time.perf_counter
) -> list[Cell]:
    """Measure chunks that grow while the time allows: two sizes at least, however long they take.

    Of two steps the quicker one counts. None is begun that would not end in time, were a token to
    cost as much as in the largest before it.
    """
    until_s = clock() + limit_s
    best_s: dict[Case, float] = {}
    largest = _AT_START[0]
    for case in filter(stand.can, _AT_START):
        for _ in range(2):
            if case in best_s or len(best_s) > 1:
                expected_s = best_s[largest] * case.chunk / largest.chunk
                if clock() + expected_s > until_s:
                    break
            (took_s,) = stand.seconds(case)
            best_s[case] = min(took_s, best_s.get(case, took_s))
            largest = case
    return [Cell(case=case, median_s=s) for case, s in best_s.items()]


def estimate(cells: Sequence[Cell], shares: Shares) -> StepCosts:
    """Return the costs of which only the dense layers were measured.

    Attention reads memory as weights are read, and computes as products do: what it adds is told
    by its share of their bytes and operations, better than by a difference of two noisy steps.
    """
    dense = fit(cells).dense
    (few, few_s), (many, many_s) = dense[-2:]
    token_s = (many_s - few_s) / (many - few)
    return StepCosts(
        dense=dense,
        request_s=token_s * shares.request,
        context_token_s=dense[0][1] * shares.context_token,
        visit_s=token_s * shares.visit,
    )


def fit(cells: Sequence[Cell]) -> StepCosts:
    """Return the costs that come nearest to the cells, by relative error, none of them negative.

    What no cells tell apart from the rest is left at 0.
    """
    cases = [cell.case for cell in cells]
    sizes = sorted({case.chunk for case in cases if not (case.num_decodes or case.behind)})
    shapes = [case.shape for case in cases]
    columns: list[NDArray[np.float64]] = [np.ones(len(cells))]
    num_tokens = np.array([shape.num_tokens for shape in shapes])
    for low, high in pairwise(sizes):
        # How far a step is between two sizes; beyond the last the line goes on.
        share = np.maximum((num_tokens - low) / (high - low), 0.0)
        columns.append(share if high == sizes[-1] else np.minimum(share, 1.0))
    contexts = {case.context for case in cases if case.num_decodes}
    rates = {
        "request_s": len(contexts) > 1,
        "context_token_s": len(contexts) > 0,
        "visit_s": any(case.behind for case in cases),
    }
    fields = ("num_requests", "num_context_tokens", "num_visits")
    for field, is_known in zip(fields, rates.values(), strict=True):
        column = np.array([float(getattr(shape, field)) for shape in shapes])
        columns.append(column if is_known else np.zeros(len(cells)))
    measured_s = np.array([cell.median_s for cell in cells])
    found = _fit(np.stack(columns, axis=1) / measured_s[:, None])
    dense = np.cumsum(found[: len(sizes)]).tolist()
    return StepCosts(
        dense=tuple(zip(sizes, dense, strict=True)),
        **dict(zip(rates, found[len(sizes) :].tolist(), strict=True)),
    )


def _fit(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x >= 0 with `matrix @ x` near 1: what comes out negative is left out, one by one."""
    found = np.zeros(matrix.shape[1])
    kept = [index for index in range(matrix.shape[1]) if matrix[:, index].any()]
    while kept:
        scale = matrix[:, kept].max(axis=0)
        solved, *_ = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(matrix)), rcond=None)
        solved /= scale
        if solved.min() >= 0.0:
            found[kept] = solved
            break
        del kept[int((solved * scale).argmin())]
    return found


def profile_of(what: What, cells: Sequence[Cell]) -> Profile:
    """Fit those that are to be fitted, and judge by all."""
    costs = fit([cell for cell in cells if cell.case in FITTED])
    return Profile(
        what=what,
        costs=costs,
        cells=tuple(
            Measured(
                case=cell.case,
                median_s=cell.median_s,
                error=costs.step_s(cell.case.shape) / cell.median_s - 1.0,
                is_fitted=cell.case in FITTED,
            )
            for cell in cells
        ),
    )
