"""The rules: each as its definition says, to the bit, whatever else is in the batch.

Shape suffixes: S rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import RowRules
from engine.rules import apply_rules
from scheduler.types import SamplingParams

VOCAB_SIZE = 23
INF = math.inf


def rules_of(index: int, prompt=(), output=(), **params) -> RowRules:
    return RowRules(
        index=index,
        params=SamplingParams(max_tokens=99, **params),
        token_ids=np.array([*prompt, *output], dtype=np.int64),
        num_prompt_tokens=len(prompt),
    )


def apply_to_one(logits, prompt=(), output=(), **params) -> list[float]:
    logits_SV = torch.tensor([logits], dtype=torch.float32)
    return apply_rules(logits_SV, [rules_of(0, prompt, output, **params)])[0].tolist()


def by_definition(logits: list[float], row: RowRules) -> list[float]:
    """The rules one token at a time, in the order of `SamplingParams`, in float32."""
    params, vocab = row.params, range(len(logits))
    prompt = row.token_ids.tolist()[: row.num_prompt_tokens]
    output = row.token_ids.tolist()[row.num_prompt_tokens :]
    forbidden: set[int] = set()
    bans = [
        set(vocab) - set(params.allowed_token_ids) if params.allowed_token_ids else set(),
        {
            last
            for *before, last in params.bad_token_ids
            if output[len(output) - len(before) :] == before and len(before) <= len(output)
        },
        set(params.stop_token_ids) if len(output) < params.min_tokens else set(),
    ]
    for ban in bans:
        if set(vocab) - forbidden - ban:
            forbidden |= ban
    result = []
    for token in vocab:
        logit = np.float32(logits[token])
        if token in forbidden:
            logit = np.float32(-INF)
        for biased, bias in params.logit_bias:
            if biased == token:
                logit = logit + np.float32(bias)
        if token in prompt or token in output:
            penalty = np.float32(params.repetition_penalty)
            logit = logit / penalty if logit > 0 else logit * penalty
        logit = logit - np.float32(params.frequency_penalty) * np.float32(output.count(token))
        if token in output:
            logit = logit - np.float32(params.presence_penalty)
        result.append(float(logit))
    return result


def some_rules(rng: random.Random, index: int) -> RowRules:
    """A few rules at a time, over few tokens, so that they meet; some ids do not exist."""

    def token() -> int:
        return (
            rng.randrange(VOCAB_SIZE) if rng.random() < 0.85 else rng.choice([-1, -23, 23, 10**9])
        )

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(token() for _ in range(rng.randint(1, most)))

    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
    output = [rng.randrange(6) for _ in range(rng.randint(0, 12))]
    bad = [tokens(2) for _ in range(4)]
    bad += [(*output[len(output) - n :], token()) for n in range(min(3, len(output)) + 1)]
    bad += [(*prompt[-1:], *output, token()), (*output, token(), token())]
    choices = {
        "allowed_token_ids": tokens(12),
        "bad_token_ids": tuple(bad),
        "min_tokens": rng.choice([len(output), len(output) + 1, 5]),
        "stop_token_ids": tokens(3),
        "logit_bias": tuple({token(): rng.uniform(-9, 9) for _ in range(5)}.items()),
        "repetition_penalty": rng.choice([0.7, 1.3]),
        "frequency_penalty": rng.uniform(-2, 2),
        "presence_penalty": rng.uniform(-2, 2),
    }
    chosen = {name: value for name, value in choices.items() if rng.random() < 0.5}
    return rules_of(index, prompt, output, **chosen)


def some_logits(num_rows: int, seed: int) -> Tensor:
    logits_SV = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    logits_SV[:, 3] = 0.0
    return logits_SV * 5


def test_the_rules_match_their_definition():
    rng = random.Random(1)
    for seed in range(80):
        logits_SV = some_logits(7, seed)
        rules = [some_rules(rng, index) for index in rng.sample(range(7), 5)]
        expected = logits_SV.tolist()
        for row in rules:
            expected[row.index] = by_definition(expected[row.index], row)
        assert apply_rules(logits_SV, rules).tolist() == expected


def test_a_row_is_the_same_in_any_company():
    rng = random.Random(2)
    logits_SV = some_logits(7, 0)
    rules = [some_rules(rng, index) for index in range(7)]
    alone = [
        apply_rules(logits_SV[i : i + 1], [replace(rules[i], index=0)])[0].tolist()
        for i in range(7)
    ]
    for _ in range(20):
        order = rng.sample(range(7), rng.randint(1, 7))
        rows = [replace(rules[i], index=place) for place, i in enumerate(order)]
        rng.shuffle(rows)
        assert apply_rules(logits_SV[order], rows).tolist() == [alone[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_stays_as_it_was(dtype):
    logits_SV = some_logits(3, 0).to(dtype)
    before = logits_SV.clone()
    ruled_SV = apply_rules(logits_SV, [rules_of(1, allowed_token_ids=(2,))])
    assert torch.equal(logits_SV, before)
    assert ruled_SV.dtype == torch.float32
    assert torch.equal(ruled_SV[[0, 2]], before[[0, 2]].float())


def test_no_rule_that_changes_logits_gives_the_input_itself():
    logits_SV = some_logits(2, 0).bfloat16()
    idle = {"min_tokens": 2, "stop_token_ids": (1,), "logprobs": 5}  # two tokens are out already
    assert apply_rules(logits_SV, []) is logits_SV
    assert apply_rules(logits_SV, [rules_of(1, (4,), (5, 6), **idle)]) is logits_SV


# --- one rule at a time ---------------------------------------------------------------------------


def test_only_the_allowed_tokens_remain():
    assert apply_to_one([1, 2, 3, 4], allowed_token_ids=(2, 0, 2)) == [1, -INF, 3, -INF]


@pytest.mark.parametrize(
    ("prompt", "output", "is_forbidden"),
    [
        ((), (1, 2), True),
        ((), (0, 1, 2), True),
        ((), (1, 2, 0), False),
        ((), (2,), False),
        ((), (), False),
        ((1,), (2,), False),  # the prompt does not count
        ((1, 2), (), False),
    ],
)
def test_a_bad_sequence_may_not_be_completed(prompt, output, is_forbidden):
    ruled = apply_to_one([1, 1, 1, 1], prompt, output, bad_token_ids=((1, 2, 3),))
    assert ruled == [1, 1, 1, -INF if is_forbidden else 1]


def test_a_bad_sequence_of_one_token_is_always_forbidden():
    assert apply_to_one([1, 1, 1], bad_token_ids=((1,), ())) == [1, -INF, 1]
    assert apply_to_one([1, 1, 1], (1,), (2, 1, 0), bad_token_ids=((1,),)) == [1, -INF, 1]


@pytest.mark.parametrize(("num_output", "is_forbidden"), [(0, True), (2, True), (3, False)])
def test_stop_tokens_wait_for_min_tokens(num_output, is_forbidden):
    ruled = apply_to_one([1, 1, 1], (0,) * 9, (0,) * num_output, min_tokens=3, stop_token_ids=(2,))
    assert ruled == [1, 1, -INF if is_forbidden else 1]


def test_biases_of_one_token_add_up():
    assert apply_to_one([0, 0, 0], logit_bias=((1, 2.5), (0, -1.0), (1, 0.5))) == [-1, 3, 0]


def test_repetition_counts_the_prompt_and_the_others_do_not():
    logits, prompt, output = [4.0, -4.0, 4.0, -4.0, 4.0], (0, 1), (2, 3, 3)
    assert apply_to_one(logits, prompt, output, repetition_penalty=2.0) == [2, -8, 2, -8, 4]
    assert apply_to_one(logits, prompt, output, frequency_penalty=0.5) == [4, -4, 3.5, -5, 4]
    assert apply_to_one(logits, prompt, output, presence_penalty=0.5) == [4, -4, 3.5, -4.5, 4]
    assert apply_to_one(
        logits, prompt, output, repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5
    ) == [2, -8, 0.5, -10.5, 4]


def test_a_bias_comes_before_the_penalties():
    ruled = apply_to_one([-1.0], (0,), logit_bias=((0, 3.0),), repetition_penalty=2.0)
    assert ruled == [1.0]


def test_no_bias_frees_a_forbidden_token():
    """Not even one that is infinite in float32, which would make NaN of -inf."""
    assert apply_to_one([0.0, 0.0], logit_bias=((1, 1e39),), bad_token_ids=((1,),)) == [0.0, -INF]


# --- ids that do not exist, rules that leave nothing ----------------------------------------------


@pytest.mark.parametrize("token", [-1, -3, 3, 4, 5, 2**31, 2**63 - 1, 2**64])
def test_an_id_outside_the_vocabulary_touches_nobody(token):
    logits_SV = torch.ones(3, 3)
    rules = rules_of(
        1,
        (),
        (0,),
        bad_token_ids=((token,), (0, token), (token, 1)),
        min_tokens=5,
        stop_token_ids=(token,),
        logit_bias=((token, 7.0),),
        allowed_token_ids=(0, token, 2),
    )
    assert apply_rules(logits_SV, [rules]).tolist() == [[1] * 3, [1, -INF, 1], [1] * 3]


@pytest.mark.parametrize("token", [-1, 3, 2**40])
def test_a_known_token_outside_the_vocabulary_touches_nobody(token):
    rules = rules_of(
        1, (token,), (token, 0), repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0
    )
    ruled_SV = apply_rules(torch.full((3, 3), 8.0), [rules])
    assert ruled_SV.tolist() == [[8] * 3, [2, 8, 8], [8] * 3]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"allowed_token_ids": (1,), "bad_token_ids": ((1,),)}, [-INF, 1, -INF]),
        (
            {"allowed_token_ids": (1,), "min_tokens": 3, "stop_token_ids": (1, 2)},
            [-INF, 1, -INF],
        ),
        (
            {"bad_token_ids": ((0,), (1,)), "min_tokens": 3, "stop_token_ids": (2,)},
            [-INF, -INF, 1],
        ),
        ({"bad_token_ids": ((0,), (1,), (2,))}, [1, 1, 1]),
        ({"allowed_token_ids": (7,)}, [1, 1, 1]),
    ],
)
def test_a_ban_that_would_leave_nothing_is_void(params, expected):
    assert apply_to_one([1, 1, 1], **params) == expected
