"""The reference schedule: dense 0, attention 0, dense 1, ... for the whole batch at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.attention.protocol import AttentionBackend
from engine.batch import ForwardBatch, PersistentBatch
from engine.models.slices import DenseSlices
from engine.sampler import SamplingRows, sample
from scheduler.instance.plan import SampledToken, StepPlan, StepResult

Sampler = Callable[[Tensor, SamplingRows], Tensor]


class SequentialExecutor:
    """Computes a step where it is submitted; `poll` only hands the result over."""

    def __init__(
        self,
        model: DenseSlices,
        attention: AttentionBackend,
        batch: PersistentBatch,
        *,
        sampler: Sampler = sample,
    ) -> None:
        self._model = model
        self._attention = attention
        self._batch = batch
        self._sampler = sampler
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        start_s = time.perf_counter()
        batch = self._batch.apply(plan)
        with torch.inference_mode():
            tokens_S = self._forward(batch).cpu().numpy()
        self._batch.record(batch.sample_rows_S, tokens_S)
        sampled = tuple(
            SampledToken(self._batch.request_ids[row], token)
            for row, token in zip(batch.sample_rows_S.tolist(), tokens_S.tolist(), strict=True)
        )
        self._results.append(
            StepResult(
                step_id=plan.step_id, sampled=sampled, duration_s=time.perf_counter() - start_s
            )
        )

    def poll(self) -> StepResult:
        return self._results.popleft()

    def close(self) -> None:
        """Weights and KV memory go with their last reference."""

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Run the slices and return the sampled token_ids_S."""
        model, attention = self._model, self._attention
        prepared = attention.prepare(batch)
        carry, qkv = model.first(
            self._to_device(batch.token_ids_T), self._to_device(batch.positions_T)
        )
        attended_THD = attention.attend(0, *qkv, prepared)
        for layer in range(1, model.shape.num_layers):
            carry, qkv = model.middle(layer, carry, attended_THD)
            attended_THD = attention.attend(layer, *qkv, prepared)
        if not len(batch.sample_tokens_S):  # a chunk that ends before its prompt does
            return torch.empty(0, dtype=torch.int64)
        logits_SV = model.last(carry, attended_THD, self._to_device(batch.sample_tokens_S))
        return self._sampler(logits_SV, SamplingRows.build(batch.sampling, model.shape.device))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._model.shape.device, non_blocking=True)
