"""The persistent batch: the requests that compute, as arrays, kept up to date by plan deltas.

Every executor owns one. It knows tokens, positions and blocks, never tensors or attention. Rows
have no order that means anything: the last row fills the place of one that leaves.

Shape legend: R rows (requests), T tokens of the step, S rows that sample, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId, SamplingParams

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SamplingArrays:
    """How each sampled row chooses its token; the fields are `SamplingParams`, one entry a row."""

    temperature_S: Floats
    top_p_S: Floats
    top_k_S: Ints
    min_p_S: Floats
    seed_S: Ints
    choice_S: Ints
    position_S: Ints  # index of the token to be drawn, the prompt included
    rules: tuple[RowRules, ...] = ()

    def select(self, kept_K: Ints) -> SamplingArrays:
        """Return the same for some of the rows (indices into S, ascending)."""
        index_of = {index: new for new, index in enumerate(kept_K.tolist())}
        return SamplingArrays(
            **{field: getattr(self, field)[kept_K] for field in _PER_ROW},
            rules=tuple(
                replace(rule, index=index_of[rule.index])
                for rule in self.rules
                if rule.index in index_of
            ),
        )


_PER_ROW = ("temperature_S", "top_p_S", "top_k_S", "min_p_S", "seed_S", "choice_S", "position_S")


@dataclass(frozen=True, slots=True, eq=False)
class RowRules:
    """A sampled row that asks for more than the filters: penalties, bans, biases, logprobs."""

    index: int  # into S
    params: SamplingParams
    token_ids: Ints  # all known ones; the first `num_prompt_tokens` are the prompt
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """Prompt tokens of one row whose log-probabilities this step computes."""

    row: int  # into R
    request_id: RequestId
    tokens_M: Ints  # indices into T: the tokens whose logits predict the targets
    targets_M: Ints  # token ids
    start: int  # index of the first target in the prompt
    num_top: int


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input, in arrays that are the step's own (block_table_RB excepted: a view).

    Row r computes the tokens [query_start_R1[r], query_start_R1[r + 1]) of T, which are the last
    ones of its seq_len_R[r] tokens.
    """

    rows_R: Ints  # the rows of the persistent batch that these are
    token_ids_T: Ints
    positions_T: Ints
    slots_T: Ints  # block * block_size + offset: where each token's key and value are written
    query_start_R1: Ints  # R + 1 entries
    seq_len_R: Ints
    block_table_RB: NDArray[np.int32]  # trimmed to the longest row; entries past a row are stale
    sample_rows_S: Ints  # rows (of R) whose chunk reaches their last known token
    sample_tokens_S: Ints  # the indices into T of those last tokens
    sampling: SamplingArrays
    prompt_scores: tuple[PromptScores, ...] = ()

    def select(self, kept_K: Ints) -> ForwardBatch:
        """Return the same step for some of its rows (indices into R, ascending)."""
        length_R = np.diff(self.query_start_R1)
        is_kept_R = np.zeros(len(length_R), dtype=bool)
        is_kept_R[kept_K] = True
        is_kept_T = np.repeat(is_kept_R, length_R)
        is_kept_S = is_kept_R[self.sample_rows_S]
        row_R, token_T = np.cumsum(is_kept_R) - 1, np.cumsum(is_kept_T) - 1
        query_start_K1 = np.zeros(len(kept_K) + 1, dtype=np.int64)
        np.cumsum(length_R[kept_K], out=query_start_K1[1:])
        return ForwardBatch(
            rows_R=self.rows_R[kept_K],
            token_ids_T=self.token_ids_T[is_kept_T],
            positions_T=self.positions_T[is_kept_T],
            slots_T=self.slots_T[is_kept_T],
            query_start_R1=query_start_K1,
            seq_len_R=self.seq_len_R[kept_K],
            block_table_RB=self.block_table_RB[kept_K],
            sample_rows_S=row_R[self.sample_rows_S[is_kept_S]],
            sample_tokens_S=token_T[self.sample_tokens_S[is_kept_S]],
            sampling=self.sampling.select(np.flatnonzero(is_kept_S)),
            prompt_scores=tuple(
                replace(scores, row=int(row_R[scores.row]), tokens_M=token_T[scores.tokens_M])
                for scores in self.prompt_scores
                if is_kept_R[scores.row]
            ),
        )


class PersistentBatch:
    """Rows of requests; `apply` takes a plan, `record` the tokens that the step sampled."""

    def __init__(self, max_num_rows: int, max_model_len: int, block_size: int) -> None:
        max_num_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.request_ids: list[RequestId] = []
        self._row_of: dict[RequestId, int] = {}
        self._params: list[SamplingParams] = []
        self._token_ids = np.zeros((max_num_rows, max_model_len), dtype=np.int64)
        self._block_table = np.zeros((max_num_rows, max_num_blocks), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_rows, dtype=np.int64)  # known
        self._num_prompt = np.zeros(max_num_rows, dtype=np.int64)
        self._num_computed = np.zeros(max_num_rows, dtype=np.int64)
        self._num_blocks = np.zeros(max_num_rows, dtype=np.int64)
        self._temperature = np.zeros(max_num_rows, dtype=np.float32)
        self._top_p = np.zeros(max_num_rows, dtype=np.float32)
        self._top_k = np.zeros(max_num_rows, dtype=np.int64)
        self._min_p = np.zeros(max_num_rows, dtype=np.float32)
        self._seed = np.zeros(max_num_rows, dtype=np.int64)
        self._choice = np.zeros(max_num_rows, dtype=np.int64)
        self._has_rules = np.zeros(max_num_rows, dtype=bool)
        self._scores_prompt = np.zeros(max_num_rows, dtype=bool)
        self._columns: tuple[NDArray[np.generic], ...] = (
            self._token_ids,
            self._block_table,
            self._num_tokens,
            self._num_prompt,
            self._num_computed,
            self._num_blocks,
            self._temperature,
            self._top_p,
            self._top_k,
            self._min_p,
            self._seed,
            self._choice,
            self._has_rules,
            self._scores_prompt,
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

    def record(self, rows_S: Ints, token_ids_S: Ints) -> None:
        """Append the sampled tokens to their rows."""
        self._token_ids[rows_S, self._num_tokens[rows_S]] = token_ids_S
        self._num_tokens[rows_S] += 1

    def _leave(self, request_id: RequestId) -> None:
        row = self._row_of.pop(request_id)
        last_id, last_params = self.request_ids.pop(), self._params.pop()
        if last_id != request_id:
            last = len(self.request_ids)
            self.request_ids[row] = last_id
            self._params[row] = last_params
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
        self._num_prompt[row] = join.num_prompt_tokens
        self._num_computed[row] = join.num_computed_tokens
        self._num_blocks[row] = 0
        self._append(row, join.groups)
        params = join.params
        self._params.append(params)
        self._temperature[row] = params.temperature
        self._top_p[row] = params.top_p
        self._top_k[row] = params.top_k
        self._min_p[row] = params.min_p
        self._seed[row] = params.seed
        self._choice[row] = params.choice
        self._has_rules[row] = _asks_for_rules(params)
        self._scores_prompt[row] = params.prompt_logprobs is not None

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
            rows_R=np.arange(num_rows),
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
                rules=self._rules(samples_S),
            ),
            prompt_scores=self._prompt_scores(query_start_R1, seq_len_R),
        )

    def _rules(self, samples_S: Ints) -> tuple[RowRules, ...]:
        return tuple(
            RowRules(
                index=index,
                params=self._params[row],
                token_ids=self._token_ids[row, : self._num_tokens[row]].copy(),
                num_prompt_tokens=int(self._num_prompt[row]),
            )
            for index, row in enumerate(samples_S.tolist())
            if self._has_rules[row]
        )

    def _prompt_scores(self, query_start_R1: Ints, seq_len_R: Ints) -> tuple[PromptScores, ...]:
        """Every prompt token but the first is predicted by the logits of the one before it."""
        scores = []
        for row in np.flatnonzero(self._scores_prompt[: len(seq_len_R)]).tolist():
            begin, end = query_start_R1[row : row + 2].tolist()
            start = int(seq_len_R[row]) - (end - begin) + 1
            behind = min(int(seq_len_R[row]) + 1, int(self._num_prompt[row]))
            if start < behind:
                num_top = self._params[row].prompt_logprobs
                assert num_top is not None
                scores.append(
                    PromptScores(
                        row=row,
                        request_id=self.request_ids[row],
                        tokens_M=np.arange(begin, begin + behind - start),
                        targets_M=self._token_ids[row, start:behind].copy(),
                        start=start,
                        num_top=num_top,
                    )
                )
        return tuple(scores)


def _asks_for_rules(params: SamplingParams) -> bool:
    return bool(
        params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_token_ids
        or params.logprobs is not None
    )
