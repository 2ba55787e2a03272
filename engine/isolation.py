"""Finds the request whose computation raises, so that it ends alone. Torch-free.

A forward pass computes many requests at once, and an exception does not say whose fault it is. The
rows are halved until one is left: ceil(log2 N) runs, and one more for all those that were not
computed on the way. Running rows again is harmless: they write the same keys and values to the same
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.batch import ForwardBatch, PersistentBatch
from engine.faults import cause_of, detail_of
from scheduler.instance.plan import Failure, SampledToken, StepPlan, StepResult
from scheduler.request import InvariantError
from scheduler.types import PromptLogprobs, RequestId

# Nobody's request: the engine itself is broken, or the machine has no memory left.
UNRECOVERABLE = (InvariantError, MemoryError)


@dataclass(slots=True)
class RowResults:
    """What became of some rows of a step."""

    sampled: list[SampledToken] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: RowResults) -> None:
        self.sampled += other.sampled
        self.prompt_logprobs += other.prompt_logprobs
        self.failures += other.failures

    def as_step(self, step_id: int, duration_s: float) -> StepResult:
        return StepResult(
            step_id=step_id,
            sampled=tuple(self.sampled),
            prompt_logprobs=tuple(self.prompt_logprobs),
            failures=tuple(self.failures),
            duration_s=duration_s,
        )


Compute = Callable[[ForwardBatch], RowResults]


class StepRunner:
    """Runs plans over a persistent batch; a request that failed computes no more until it leaves.

    `compute` records the tokens that it samples in the batch, as its last act. `canary` computes
    something that has nothing to do with any request, and raises if that cannot be done.
    """

    def __init__(
        self, batch: PersistentBatch, compute: Compute, canary: Callable[[], None]
    ) -> None:
        self._batch = batch
        self._compute = compute
        self._canary = canary
        self._failed: set[RequestId] = set()

    def run(self, plan: StepPlan) -> RowResults:
        """Apply the plan and compute its step. Raises what no request is to blame for."""
        step = self._batch.apply(plan)
        self._failed.difference_update(plan.leaves)
        if self._failed:  # planned before the failure was known
            is_well = [self._batch.request_ids[row] not in self._failed for row in step.rows_R]
            step = step.select(np.flatnonzero(is_well))
        request_ids = [self._batch.request_ids[row] for row in step.rows_R]
        results = run_isolated(step, self._compute, request_ids, self._canary)
        self._failed.update(failure.request_id for failure in results.failures)
        return results


def run_isolated(
    batch: ForwardBatch,
    compute: Compute,
    request_ids: list[RequestId],
    canary: Callable[[], None],
) -> RowResults:
    """Compute a step; a request that raises becomes a Failure, all others get their results.

    `request_ids` are those of the batch's rows. The canary is asked when every request failed; what
    it raises ends the instance, as does an UNRECOVERABLE error. Takes at most 1 + ceil(log2 N)
    extra runs of `compute` for one culprit among N rows; a second one begins the search
    again among what is left.
    """
    results = RowResults()
    rows_R = np.arange(len(request_ids))
    while len(rows_R):
        part = batch if len(rows_R) == len(request_ids) else batch.select(rows_R)
        error = _try(compute, part, results)
        if error is None:
            break
        suspects, left = rows_R, []
        while len(suspects) > 1:
            half, rest = np.array_split(suspects, 2)
            half_error = _try(compute, batch.select(half), results)
            if half_error is None:
                suspects = rest
            else:
                error, suspects = half_error, half
                left.append(rest)
        if len(rows_R) > 1 and not left:
            rows_R = suspects  # all others are computed: this one's own run decides
            continue
        failed = request_ids[int(suspects[0])]
        results.failures.append(Failure(failed, cause_of(error), detail_of(error)))
        rows_R = np.sort(np.concatenate(left)) if left else rows_R[:0]
    if request_ids and len(results.failures) == len(request_ids):
        canary()
    return results


def _try(compute: Compute, part: ForwardBatch, results: RowResults) -> Exception | None:
    try:
        results.add(compute(part))
    except UNRECOVERABLE:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, it is found out whose it is)
        return error
    return None
