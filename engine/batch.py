"""The persistent batch: the requests that compute, as arrays, kept up to date by plan deltas.

Every executor owns one. It knows tokens, positions and blocks, never tensors or attention. Rows
have no order that means anything: the last row fills the place of one that leaves.

Shape legend: R rows (requests), T tokens of the step, S rows that sample, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """How each sampled row chooses its token; the fields are `SamplingParams`, one entry a row."""

    temperature_S: Floats
    top_p_S: Floats
    top_k_S: Ints
    min_p_S: Floats
    seed_S: Ints
    choice_S: Ints
    position_S: Ints  # index of the token to be drawn, the prompt included


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input, in arrays that are the step's own (block_table_RB excepted: a view).

    Row r computes the tokens [query_start_R1[r], query_start_R1[r + 1]) of T, which are the last
    ones of its seq_len_R[r] tokens.
    """

    token_ids_T: Ints
    positions_T: Ints
    slots_T: Ints  # block * block_size + offset: where each token's key and value are written
    query_start_R1: Ints  # R + 1 entries
    seq_len_R: Ints
    block_table_RB: NDArray[np.int32]  # trimmed to the longest row; entries past a row are stale
    sample_rows_S: Ints  # rows whose chunk reaches their last known token
    sample_tokens_S: Ints  # the indices into T of those last tokens
    sampling: SamplingArrays


class PersistentBatch:
    """Rows of requests; `apply` takes a plan, `record` the tokens that the step sampled."""

    def __init__(self, max_num_rows: int, max_model_len: int, block_size: int) -> None:
        max_num_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.request_ids: list[RequestId] = []
        self._row_of: dict[RequestId, int] = {}
        self._token_ids = np.zeros((max_num_rows, max_model_len), dtype=np.int64)
        self._block_table = np.zeros((max_num_rows, max_num_blocks), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_rows, dtype=np.int64)  # known
        self._num_computed = np.zeros(max_num_rows, dtype=np.int64)
        self._num_blocks = np.zeros(max_num_rows, dtype=np.int64)
        self._temperature = np.zeros(max_num_rows, dtype=np.float32)
        self._top_p = np.zeros(max_num_rows, dtype=np.float32)
        self._top_k = np.zeros(max_num_rows, dtype=np.int64)
        self._min_p = np.zeros(max_num_rows, dtype=np.float32)
        self._seed = np.zeros(max_num_rows, dtype=np.int64)
        self._choice = np.zeros(max_num_rows, dtype=np.int64)
        self._columns: tuple[NDArray[np.generic], ...] = (
            self._token_ids,
            self._block_table,
            self._num_tokens,
            self._num_computed,
            self._num_blocks,
            self._temperature,
            self._top_p,
            self._top_k,
            self._min_p,
            self._seed,
            self._choice,
        )

    def apply(self, plan: StepPlan) -> ForwardBatch:
        """Bring the rows up to date and return the step's input; counts its tokens as computed."""
        for request_id in plan.leaves:
            self._leave(request_id)
        for join in plan.joins:
            self._join(join)
        for request_id, groups in plan.appends:
            self._append(self._row_of[request_id], groups)
        return self._forward(plan.chunks)

    def record(self, sample_rows_S: Ints, token_ids_S: Ints) -> None:
        """Append the sampled tokens to their rows."""
        self._token_ids[sample_rows_S, self._num_tokens[sample_rows_S]] = token_ids_S
        self._num_tokens[sample_rows_S] += 1

    def _leave(self, request_id: RequestId) -> None:
        row = self._row_of.pop(request_id)
        last_id = self.request_ids.pop()
        if last_id != request_id:
            last = len(self.request_ids)
            self.request_ids[row] = last_id
            self._row_of[last_id] = row
            for column in self._columns:
                column[row] = column[last]

    def _join(self, join: Join) -> None:
        row = len(self.request_ids)
        self.request_ids.append(join.request_id)
        self._row_of[join.request_id] = row
        num_tokens = len(join.token_ids)
        self._token_ids[row, :num_tokens] = join.token_ids
        self._num_tokens[row] = num_tokens
        self._num_computed[row] = join.num_computed_tokens
        self._num_blocks[row] = 0
        self._append(row, join.groups)
        params = join.params
        self._temperature[row] = params.temperature
        self._top_p[row] = params.top_p
        self._top_k[row] = params.top_k
        self._min_p[row] = params.min_p
        self._seed[row] = params.seed
        self._choice[row] = params.choice

    def _append(self, row: int, groups: Iterable[BlockGroup]) -> None:
        for start, num_blocks in groups:
            at = int(self._num_blocks[row])
            self._block_table[row, at : at + num_blocks] = range(start, start + num_blocks)
            self._num_blocks[row] += num_blocks

    def _forward(self, chunks: Iterable[Chunk]) -> ForwardBatch:
        num_rows = len(self.request_ids)
        length_R = np.ones(num_rows, dtype=np.int64)
        for request_id, num_tokens in chunks:
            length_R[self._row_of[request_id]] = num_tokens
        query_start_R1 = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(length_R, out=query_start_R1[1:])
        rows_T = np.repeat(np.arange(num_rows), length_R)
        computed_R = self._num_computed[:num_rows]
        positions_T = np.arange(len(rows_T)) + (computed_R - query_start_R1[:-1])[rows_T]
        blocks_T = self._block_table[rows_T, positions_T // self.block_size].astype(np.int64)
        seq_len_R = computed_R + length_R
        samples_S = np.flatnonzero(seq_len_R == self._num_tokens[:num_rows])
        self._num_computed[:num_rows] = seq_len_R
        max_num_blocks = -(-int(seq_len_R.max()) // self.block_size)
        return ForwardBatch(
            token_ids_T=self._token_ids[rows_T, positions_T],
            positions_T=positions_T,
            slots_T=blocks_T * self.block_size + positions_T % self.block_size,
            query_start_R1=query_start_R1,
            seq_len_R=seq_len_R,
            block_table_RB=self._block_table[:num_rows, :max_num_blocks],
            sample_rows_S=samples_S,
            sample_tokens_S=query_start_R1[1:][samples_S] - 1,
            sampling=SamplingArrays(
                temperature_S=self._temperature[samples_S],
                top_p_S=self._top_p[samples_S],
                top_k_S=self._top_k[samples_S],
                min_p_S=self._min_p[samples_S],
                seed_S=self._seed[samples_S],
                choice_S=self._choice[samples_S],
                position_S=seq_len_R[samples_S],
            ),
        )
