"""The checksum executor: no torch, no model, and tokens that only a correct scheduler produces.

It stores each token id, mixed with its position, as the "KV" of its slot, and makes the next token
a hash of what the block table gathers. A block that was freed too early, a stale row, a lost or
foreign token: each changes the output. Step times come from a cost model, so that it is also the
engine of `hocket serve --fake`.

Faults can be injected. One of the kind "nan" leaves garbage in the KV that spreads as NaN does in a
model: whoever's blocks hold some of it, even in slots beyond its own tokens, fails.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.batch import ForwardBatch, Ints, PersistentBatch, PromptScores, RowRules
from engine.isolation import RowResults, StepRunner
from scheduler.costs import StepCosts, StepShape
from scheduler.instance.plan import Failure, SampledToken, StepPlan, StepResult
from scheduler.types import KVGeometry, Logprobs, PromptLogprobs, RequestId

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd (Knuth vol. 3, 6.4)
Words = NDArray[np.uint64]


_GARBAGE = np.uint64(2**64 - 1)  # what a "nan" leaves

# What goes wrong when a request computes these positions: "forward" and "sample" raise, "nan" does
# not; None is nothing. It may raise by itself what no request is to blame for.
Fault = Callable[[RequestId, range], Literal["forward", "sample", "nan"] | None]


class InjectedError(RuntimeError):
    """A fault that was asked for."""


class ChecksumExecutor:
    """Tokens are in [0, vocab_size). Sampled rows (temperature > 0) also hash seed and choice."""

    def __init__(  # noqa: PLR0913 (each is what a test turns)
        self,
        geometry: KVGeometry,
        *,
        max_num_rows: int,
        max_model_len: int,
        vocab_size: int,
        cost: StepCosts | None = None,
        fault: Fault = lambda _, __: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._batch = PersistentBatch(max_num_rows, max_model_len, geometry.block_size)
        self._runner = StepRunner(self._batch, self._compute, canary=lambda: None)
        self._kv = np.zeros((geometry.num_blocks, geometry.block_size), dtype=np.uint64)
        self._slots = self._kv.reshape(-1)
        self._vocab_size = np.uint64(vocab_size)
        self._cost = cost or StepCosts()
        self._fault = fault
        self._has_garbage = False
        self._clock = clock
        self._sleep = sleep
        self._done_at_s = 0.0
        self._results: deque[tuple[float, StepResult]] = deque()
        self._shape = StepShape()  # of the step that is being computed
        self.num_runs = 0  # of `_compute`; one a step unless something fails

    def submit(self, plan: StepPlan) -> None:
        for start, num_blocks in plan.clears:
            self._kv[start : start + num_blocks] = 0
        for source, target, num_tokens in plan.copies:
            self._kv[target, :num_tokens] = self._kv[source, :num_tokens]
        self._shape = StepShape()
        results = self._runner.run(plan)
        cost_s = self._cost.step_s(self._shape)
        # A device runs one step at a time: this one begins when the one before it is done.
        self._done_at_s = max(self._clock(), self._done_at_s) + cost_s
        self._results.append((self._done_at_s, results.as_step(plan.step_id, cost_s)))

    def poll(self) -> StepResult:
        done_at_s, result = self._results.popleft()
        wait_s = done_at_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
        return result

    def close(self) -> None:
        """Nothing is held."""

    def _compute(self, batch: ForwardBatch) -> RowResults:
        self.num_runs += 1
        shape = StepShape(
            num_tokens=len(batch.token_ids_T),
            num_requests=len(batch.seq_len_R),
            num_context_tokens=int(batch.seq_len_R.sum()),
            num_visits=int(batch.positions_T.sum()) + len(batch.positions_T),
        )
        # One that is computed again after a failure costs what the largest part of it does.
        self._shape = max(self._shape, shape)
        faults = self._faults(batch)
        if "forward" in faults:
            raise InjectedError("forward")
        self._write(batch, faults)
        is_failed_R = self._is_failed(batch)
        if any(faults[row] == "sample" for row in batch.sample_rows_S.tolist()):
            raise InjectedError("sample")
        results = RowResults(prompt_logprobs=[_scored(scores) for scores in batch.prompt_scores])
        for row in np.flatnonzero(is_failed_R).tolist():
            results.failures.append(Failure(self._request_id(batch, row), "nan"))
        kept_S = np.flatnonzero(~is_failed_R[batch.sample_rows_S])
        tokens_S = self._next_tokens(batch, kept_S)
        logprobs_of = {
            rule.index: rule.params.logprobs
            for rule in batch.sampling.rules
            if rule.params.logprobs is not None
        }
        for index, token in zip(kept_S.tolist(), tokens_S.tolist(), strict=True):
            request_id = self._request_id(batch, int(batch.sample_rows_S[index]))
            num_top = logprobs_of.get(index)
            logprobs = None if num_top is None else _logprobs(token, num_top)
            results.sampled.append(SampledToken(request_id, token, logprobs))
        self._batch.record(batch.rows_R[batch.sample_rows_S[kept_S]], tokens_S)
        return results

    def _request_id(self, batch: ForwardBatch, row: int) -> RequestId:
        return self._batch.request_ids[int(batch.rows_R[row])]

    def _faults(self, batch: ForwardBatch) -> list[str | None]:
        ends = batch.seq_len_R.tolist()
        lengths = np.diff(batch.query_start_R1).tolist()
        return [
            self._fault(self._request_id(batch, row), range(end - length, end))
            for row, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]

    def _write(self, batch: ForwardBatch, faults: list[str | None]) -> None:
        position_T = batch.positions_T.astype(np.uint64)
        self._slots[batch.slots_T] = _mix(batch.token_ids_T.astype(np.uint64) + _mix(position_T))
        for row, fault in enumerate(faults):
            if fault == "nan":
                start, end = batch.query_start_R1[row : row + 2].tolist()
                self._slots[batch.slots_T[start:end]] = _GARBAGE
                self._has_garbage = True

    def _is_failed(self, batch: ForwardBatch) -> NDArray[np.bool_]:
        """Return which rows have garbage in their blocks, slots beyond their tokens included."""
        is_failed_R = np.zeros(len(batch.seq_len_R), dtype=bool)
        if self._has_garbage:
            for row in range(len(is_failed_R)):
                is_failed_R[row] = bool((self._kv[self._blocks(batch, row)] == _GARBAGE).any())
        return is_failed_R

    def _next_tokens(self, batch: ForwardBatch, kept_S: Ints) -> Ints:
        sampling = batch.sampling
        rules_of = {rule.index: rule for rule in sampling.rules}
        tokens_S = np.empty(len(kept_S), dtype=np.int64)
        for at, index in enumerate(kept_S.tolist()):
            digest = self._digest(batch, int(batch.sample_rows_S[index]))
            if sampling.temperature_S[index] > 0:
                key = np.array([sampling.seed_S[index], sampling.choice_S[index]], dtype=np.uint64)
                digest += _mix(_mix(key)[:1] + key[1:])
            if index in rules_of:
                digest += _digest_of_rules(rules_of[index])
            tokens_S[at] = (_mix(digest) % self._vocab_size)[0]
        return tokens_S

    def _blocks(self, batch: ForwardBatch, row: int) -> NDArray[np.int32]:
        num_blocks = -(-int(batch.seq_len_R[row]) // self._batch.block_size)
        return batch.block_table_RB[row, :num_blocks]

    def _digest(self, batch: ForwardBatch, row: int) -> Words:
        """Hash all that attention would read for this row, order included."""
        seq_len = int(batch.seq_len_R[row])
        read = self._kv[self._blocks(batch, row)].reshape(-1)[:seq_len]
        weight = np.arange(1, 2 * seq_len, 2, dtype=np.uint64)  # odd, so that no swap cancels
        digest: Words = np.sum(read * weight, dtype=np.uint64, keepdims=True)
        return digest


def _digest_of_rules(rule: RowRules) -> Words:
    """Hash what penalties would depend on: the history, where its output begins, the settings."""
    weight = np.arange(1, 2 * len(rule.token_ids), 2, dtype=np.uint64)
    history = np.sum(_mix(rule.token_ids.astype(np.uint64)) * weight, keepdims=True)
    settings = zlib.crc32(repr(rule.params).encode())
    return _mix(history + np.uint64(rule.num_prompt_tokens)) + np.uint64(settings)


def _logprobs(token_id: int, num_top: int) -> Logprobs:
    """Return numbers of the right form: the likeliest are the token and those after it."""
    chosen = -0.5 - token_id % 4
    return Logprobs(chosen, tuple((token_id + rank, chosen - rank) for rank in range(num_top)))


def _scored(scores: PromptScores) -> PromptLogprobs:
    positions = (_logprobs(token, scores.num_top) for token in scores.targets_M.tolist())
    return PromptLogprobs(scores.request_id, scores.start, tuple(positions))


def _mix(x: Words) -> Words:
    """Scramble 64-bit words: the finalizer of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = x + _MIX
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
