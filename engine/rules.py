"""Applies the rules of a request to its logits: bans, biases and penalties, before any filter.

Owns what `SamplingParams` says of `allowed_token_ids`, `bad_token_ids`, `min_tokens`, `logit_bias`
and the three penalties, with vLLM's meaning of each. Never keeps anything between steps: all of it
follows anew from the known tokens in `RowRules`, so a row that leaves, moves or is computed again
has nothing to go stale. Never filters, scales or draws (`engine/sampler.py` does).

A token id that the model does not have is ignored wherever it stands: as an index it would fall
into another row's logits, or kill the device.

Each row is worked on alone, by elementwise operations that IEEE 754 defines to the bit, so no row's
result depends on which others share the batch.

Shape suffixes: S rows of the batch, V vocabulary, U distinct token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Ints, RowRules
from scheduler.types import SamplingParams

Mask = NDArray[np.bool_]


def apply_rules(logits_SV: Tensor, rules: Sequence[RowRules]) -> Tensor:
    """The logits under the rules, as fp32; the given tensor itself if no rule changes anything.

    -inf forbids a token. Leaves `logits_SV` as it was. A row always keeps a token: see
    `_permitted`.
    """
    changing = [row for row in rules if _changes_logits(row)]
    if not changing:
        return logits_SV
    ruled_SV = logits_SV.to(torch.float32, copy=True)
    for row in changing:
        ruled_V = ruled_SV[row.index]
        _add_biases(ruled_V, row.params)
        _penalize_repetition(ruled_V, row)
        _penalize_output(ruled_V, row)
        # The bans are first by meaning. No bias or penalty lifts -inf, so here they may be last,
        # where a bias that overflows cannot turn -inf into NaN.
        _forbid(ruled_V, ~_permitted(row, len(ruled_V)))
    return ruled_SV


def _changes_logits(row: RowRules) -> bool:
    params = row.params
    return bool(
        params.allowed_token_ids
        or params.bad_token_ids
        or _is_too_short(row)
        or params.logit_bias
        or params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
    )


def _is_too_short(row: RowRules) -> bool:
    return len(row.token_ids) - row.num_prompt_tokens < row.params.min_tokens


def _permitted(row: RowRules, vocab_size: int) -> Mask:
    """Mask of the tokens that may come next; at least one.

    Rules can contradict each other (only the end-of-sequence token is allowed, and `min_tokens`
    forbids it), but some token must come. So a rule that would leave nothing is void, and the ones
    before it stand.
    """
    permitted_V = np.ones(vocab_size, dtype=bool)
    for forbidden_V in _bans(row, vocab_size):
        remaining_V = permitted_V & ~forbidden_V
        if remaining_V.any():
            permitted_V = remaining_V
    return permitted_V


def _bans(row: RowRules, vocab_size: int) -> Iterator[Mask]:
    """What each rule forbids, in the order in which the rules apply."""
    params = row.params
    if params.allowed_token_ids:
        yield ~_mask(params.allowed_token_ids, vocab_size)
    if params.bad_token_ids:
        yield _mask(_completing(params.bad_token_ids, _output(row)), vocab_size)
    if _is_too_short(row):
        yield _mask(params.stop_token_ids, vocab_size)


def _mask(token_ids: Iterable[int], vocab_size: int) -> Mask:
    mask_V = np.zeros(vocab_size, dtype=bool)
    mask_V[[token_id for token_id in token_ids if 0 <= token_id < vocab_size]] = True
    return mask_V


def _completing(sequences: Sequence[Sequence[int]], output: Ints) -> Iterator[int]:
    """The last token of each sequence whose other tokens are the end of the output."""
    longest = max(map(len, sequences))
    tail = output[max(0, len(output) - longest) :].tolist()
    for sequence in sequences:
        num_before = len(sequence) - 1
        if num_before <= 0 or tail[-num_before:] == list(sequence[:-1]):
            yield from sequence[-1:]


def _forbid(logits_V: Tensor, forbidden_V: Mask) -> None:
    if forbidden_V.any():
        logits_V.masked_fill_(_to(logits_V.device, forbidden_V), float("-inf"))


def _add_biases(logits_V: Tensor, params: SamplingParams) -> None:
    bias_of: dict[int, float] = {}  # by id: an index that comes twice has no order on a GPU
    for token_id, bias in params.logit_bias:
        if 0 <= token_id < len(logits_V):
            bias_of[token_id] = bias_of.get(token_id, 0.0) + bias
    if bias_of:
        ids_U = torch.tensor(list(bias_of), device=logits_V.device)
        logits_V[ids_U] += logits_V.new_tensor(list(bias_of.values()))


def _penalize_repetition(logits_V: Tensor, row: RowRules) -> None:
    """Make the tokens of the prompt and the output less likely, by a factor."""
    if row.params.repetition_penalty == 1.0:
        return
    ids, _ = _counted(row.token_ids, len(logits_V))
    ids_U = _to(logits_V.device, ids)
    seen_U = logits_V[ids_U]
    # On the device: CUDA divides by a number of the host by multiplying with its reciprocal.
    penalty = logits_V.new_full((), row.params.repetition_penalty)
    logits_V[ids_U] = torch.where(seen_U > 0, seen_U / penalty, seen_U * penalty)


def _penalize_output(logits_V: Tensor, row: RowRules) -> None:
    """Take off so much per occurrence in the output, and so much for having occurred."""
    frequency, presence = row.params.frequency_penalty, row.params.presence_penalty
    if not (frequency or presence):
        return
    ids, counts = _counted(_output(row), len(logits_V))
    ids_U = _to(logits_V.device, ids)
    count_U = _to(logits_V.device, counts.astype(np.float32))  # exact up to 2^24 tokens
    logits_V[ids_U] = logits_V[ids_U] - count_U * frequency - presence


def _output(row: RowRules) -> Ints:
    return row.token_ids[row.num_prompt_tokens :]


def _counted(token_ids: Ints, vocab_size: int) -> tuple[Ints, Ints]:
    """The distinct token ids and how often each is there; no sort, for histories can be long."""
    inside = token_ids[(token_ids >= 0) & (token_ids < vocab_size)]
    count_V = np.bincount(inside, minlength=vocab_size)
    ids_U = np.flatnonzero(count_V)
    return ids_U, count_V[ids_U]


def _to(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
