"""The checksum executor: no torch, no model, and tokens that only a correct scheduler produces.

It stores each token id, mixed with its position, as the "KV" of its slot, and makes the next token
a hash of what the block table gathers. A block that was freed too early, a stale row, a lost or
foreign token: each changes the output. Step times come from a cost model, so that it is also the
engine of `hocket serve --fake`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.batch import ForwardBatch, Ints, PersistentBatch
from scheduler.costs import LinearStepCost, StepCostModel, StepShape
from scheduler.instance.plan import SampledToken, StepPlan, StepResult
from scheduler.types import KVGeometry

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth vol. 3, 6.4)
Words = NDArray[np.uint64]


class ChecksumExecutor:
    """Tokens are in [0, vocab_size). Sampled rows (temperature > 0) also hash seed and choice."""

    def __init__(
        self,
        geometry: KVGeometry,
        *,
        max_num_rows: int,
        max_model_len: int,
        vocab_size: int,
        cost: StepCostModel | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._batch = PersistentBatch(max_num_rows, max_model_len, geometry.block_size)
        self._kv = np.zeros(geometry.num_tokens, dtype=np.uint64)
        self._slot_in_block = np.arange(geometry.block_size)
        self._vocab_size = np.uint64(vocab_size)
        self._cost = cost or LinearStepCost()
        self._clock = clock
        self._sleep = sleep
        self._done_at_s = 0.0
        self._results: deque[tuple[float, StepResult]] = deque()

    def submit(self, plan: StepPlan) -> None:
        batch = self._batch.apply(plan)
        self._write(batch)
        tokens_S = self._next_tokens(batch)
        self._batch.record(batch.sample_rows_S, tokens_S)
        cost_s = self._cost.step_s(
            StepShape(len(batch.token_ids_T), len(batch.seq_len_R), int(batch.seq_len_R.sum()))
        )
        # A device runs one step at a time: this one begins when the one before it is done.
        self._done_at_s = max(self._clock(), self._done_at_s) + cost_s
        sampled = tuple(
            SampledToken(self._batch.request_ids[row], token)
            for row, token in zip(batch.sample_rows_S.tolist(), tokens_S.tolist(), strict=True)
        )
        result = StepResult(step_id=plan.step_id, sampled=sampled, duration_s=cost_s)
        self._results.append((self._done_at_s, result))

    def poll(self) -> StepResult:
        done_at_s, result = self._results.popleft()
        wait_s = done_at_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
        return result

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, batch: ForwardBatch) -> None:
        position_T = batch.positions_T.astype(np.uint64)
        self._kv[batch.slots_T] = _mix(batch.token_ids_T.astype(np.uint64) + _mix(position_T))

    def _next_tokens(self, batch: ForwardBatch) -> Ints:
        tokens_S = np.empty(len(batch.sample_rows_S), dtype=np.int64)
        sampling = batch.sampling
        for index, row in enumerate(batch.sample_rows_S.tolist()):
            digest = self._digest(batch, row)
            if sampling.temperature_S[index] > 0:
                key = np.array([sampling.seed_S[index], sampling.choice_S[index]], dtype=np.uint64)
                digest += _mix(_mix(key)[:1] + key[1:])
            tokens_S[index] = (_mix(digest) % self._vocab_size)[0]
        return tokens_S

    def _digest(self, batch: ForwardBatch, row: int) -> Words:
        """Hash all that attention would read for this row, order included."""
        seq_len = int(batch.seq_len_R[row])
        num_blocks = -(-seq_len // self._batch.block_size)
        blocks = batch.block_table_RB[row, :num_blocks].astype(np.int64)
        slots = (blocks[:, None] * self._batch.block_size + self._slot_in_block).ravel()[:seq_len]
        weight = np.arange(1, 2 * seq_len, 2, dtype=np.uint64)  # odd, so that no swap cancels
        digest: Words = np.sum(self._kv[slots] * weight, dtype=np.uint64, keepdims=True)
        return digest


def _mix(x: Words) -> Words:
    """Scramble 64-bit words: the finalizer of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = x + _MIX
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
