"""The reference schedule: dense 0, attention 0, dense 1, ... for the whole batch at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.protocol import AttentionBackend
from engine.batch import ForwardBatch, Ints, PersistentBatch
from engine.forward import Forward, by_slices
from engine.isolation import RowResults, StepRunner
from engine.kv.cache import KVCache
from engine.logprobs import prompt_logprobs, sampled_logprobs
from engine.models.slices import Carry, DenseSlices
from engine.rows import RowKernels, TorchRows
from engine.rules import apply_rules
from engine.sampler import SamplingRows
from scheduler.instance.plan import Failure, Join, SampledToken, StepPlan, StepResult
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId, SamplingParams

Sampler = Callable[[Tensor, SamplingRows], Tensor]

NOT_FINITE = "the model computed NaN or infinity for this request"


class SequentialExecutor:
    """Computes a step where it is submitted; `poll` only hands the result over."""

    def __init__(
        self,
        model: DenseSlices,
        attention: AttentionBackend,
        cache: KVCache,
        batch: PersistentBatch,
        *,
        rows: RowKernels | None = None,
        forward: Forward | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._cache = cache
        self._batch = batch
        self._rows = rows or TorchRows()
        self._through = forward or by_slices(model, attention)
        self._sampler = sampler or self._rows.sample
        self._runner = StepRunner(batch, self._compute, self._canary)
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        start_s = time.perf_counter()
        with torch.inference_mode():
            self._cache.clear(plan.clears)
            self._cache.copy(plan.copies)
            results = self._runner.run(plan)
        self._results.append(results.as_step(plan.step_id, time.perf_counter() - start_s))

    def poll(self) -> StepResult:
        return self._results.popleft()

    def close(self) -> None:
        """Weights and KV memory go with their last reference."""

    def _compute(self, batch: ForwardBatch) -> RowResults:
        """Compute some rows of a step; one with NaN or infinities becomes a Failure."""
        model = self._model
        carry, attended_THD = self._forward(batch)

        def logits_of(tokens: Ints) -> Tensor:
            return model.last(carry, attended_THD, self._to_device(tokens))

        is_finite_R = self._is_finite(batch, carry, attended_THD)
        results = RowResults(prompt_logprobs=list(prompt_logprobs(batch.prompt_scores, logits_of)))
        if len(batch.sample_rows_S):  # else all chunks end before their prompts do
            logits_SV = logits_of(batch.sample_tokens_S)
            is_finite_S = np.isfinite(self._rows.peaks(logits_SV))
            is_finite_R[batch.sample_rows_S] &= is_finite_S
            self._sample(batch, logits_SV, is_finite_R, results)
        for row in np.flatnonzero(~is_finite_R).tolist():
            request_id = self._batch.request_ids[batch.rows_R[row]]
            results.failures.append(Failure(request_id, NOT_FINITE))
        return results

    def _forward(self, batch: ForwardBatch) -> tuple[Carry, Tensor]:
        """Run the slices up to the attention of the last layer."""
        prepared = self._attention.prepare(batch)
        return self._through(
            self._to_device(batch.token_ids_T), self._to_device(batch.positions_T), prepared
        )

    def _is_finite(
        self, batch: ForwardBatch, carry: Carry, attended_THD: Tensor
    ) -> NDArray[np.bool_]:
        """Return, per row, whether the hidden states of all its tokens are finite.

        A chunk that samples nothing has no logits to look at, but its keys and values are kept.
        """
        is_finite_T = self._rows.are_finite(carry.residual_TE)
        is_finite_T &= self._rows.are_finite(attended_THD.flatten(1))
        return np.logical_and.reduceat(is_finite_T, batch.query_start_R1[:-1])

    def _sample(
        self,
        batch: ForwardBatch,
        logits_SV: Tensor,
        is_finite_R: NDArray[np.bool_],
        results: RowResults,
    ) -> None:
        rules = batch.sampling.rules
        tokens_S = self._sampler(
            apply_rules(logits_SV, rules),
            SamplingRows.build(batch.sampling, self._model.shape.device),
        )
        logprobs_S = sampled_logprobs(logits_SV, tokens_S, rules)
        kept_S = np.flatnonzero(is_finite_R[batch.sample_rows_S])
        rows_S = batch.rows_R[batch.sample_rows_S[kept_S]]
        kept_tokens_S = tokens_S.cpu().numpy()[kept_S]
        for index, row, token in zip(
            kept_S.tolist(), rows_S.tolist(), kept_tokens_S.tolist(), strict=True
        ):
            request_id = self._batch.request_ids[row]
            results.sampled.append(SampledToken(request_id, token, logprobs_S[index]))
        self._batch.record(rows_S, kept_tokens_S)

    def _canary(self) -> None:
        """Sample a token of nobody, in the block that no request has. Raises if that fails."""
        block = BlockGroup(self._cache.scratch_block, 1)
        request_id, params = RequestId("canary"), SamplingParams(max_tokens=1, temperature=0.0)
        persistent = PersistentBatch(1, self._batch.block_size, self._batch.block_size)
        join = Join(request_id, (0,), 1, 0, (block,), params)
        batch = persistent.apply(StepPlan(step_id=0, joins=(join,)))
        carry, attended_THD = self._forward(batch)
        last = self._to_device(batch.sample_tokens_S)
        logits_SV = self._model.last(carry, attended_THD, last)
        if not logits_SV.amax().isfinite():
            raise RuntimeError("the model computes NaN or infinity whatever the request")
        self._sampler(logits_SV, SamplingRows.build(batch.sampling, self._model.shape.device))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._model.shape.device, non_blocking=True)
