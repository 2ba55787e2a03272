"""The persistent batch: a thousand deltas leave the same rows as building them from scratch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields

import numpy as np

from engine.batch import ForwardBatch, PersistentBatch
from scheduler.instance.plan import Append, Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId, SamplingParams

NUM_PLANS = 1000
MAX_ROWS, MAX_LEN, BLOCK = 7, 64, 4


@dataclass
class Known:
    """What the plans have said of a request so far."""

    tokens: list[int]
    params: SamplingParams
    num_prompt: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    def join(self, request_id: RequestId) -> Join:
        groups = tuple(BlockGroup(block, 1) for block in self.blocks)
        return Join(
            request_id,
            tuple(self.tokens),
            self.num_prompt,
            self.num_computed,
            groups,
            self.params,
        )


def rows_of(batch: PersistentBatch, forward: ForwardBatch) -> dict[RequestId, dict]:
    """Return each request's share of a step's input, without the order of the rows."""
    shares = {}
    sampled = {row: index for index, row in enumerate(forward.sample_rows_S.tolist())}
    rules = {rule.index: rule for rule in forward.sampling.rules}
    scores = {row_scores.row: row_scores for row_scores in forward.prompt_scores}
    for row, persistent_row in enumerate(forward.rows_R.tolist()):
        request_id = batch.request_ids[persistent_row]
        start, end = forward.query_start_R1[row : row + 2].tolist()
        num_blocks = -(-int(forward.seq_len_R[row]) // BLOCK)
        share = {
            "tokens": forward.token_ids_T[start:end].tolist(),
            "positions": forward.positions_T[start:end].tolist(),
            "slots": forward.slots_T[start:end].tolist(),
            "seq_len": int(forward.seq_len_R[row]),
            "blocks": forward.block_table_RB[row, :num_blocks].tolist(),
        }
        if row in sampled:
            index = sampled[row]
            assert forward.sample_tokens_S[index] == end - 1
            share["sampling"] = [
                getattr(forward.sampling, name.name)[index].item()
                for name in fields(forward.sampling)
                if name.name != "rules"
            ]
            if index in rules:
                rule = rules[index]
                share["rules"] = (rule.params, rule.token_ids.tolist(), rule.num_prompt_tokens)
        if row in scores:
            row_scores = scores[row]
            assert row_scores.request_id == request_id
            share["scores"] = (
                (row_scores.tokens_M - start).tolist(),
                row_scores.targets_M.tolist(),
                (row_scores.start, row_scores.num_top),
            )
        shares[request_id] = share
    return shares


class PlanMaker:
    """Makes valid random plans and keeps what they say."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.known: dict[RequestId, Known] = {}
        self.num_made = 0

    def plan(self, step_id: int) -> StepPlan:
        rng = self.rng
        leaves = [
            request_id
            for request_id, known in self.known.items()
            if len(known.tokens) >= MAX_LEN - 1 or rng.random() < 0.08
        ]
        for request_id in leaves:
            del self.known[request_id]
        joins = []
        while len(self.known) < MAX_ROWS and (not self.known or rng.random() < 0.3):
            request_id = RequestId(f"r{self.num_made}")
            self.num_made += 1
            self.known[request_id] = known = self.request()
            joins.append(known.join(request_id))
        chunks, appends = [], []
        for request_id, known in self.known.items():
            num_tokens = rng.randint(1, len(known.tokens) - known.num_computed)
            missing = -(-(known.num_computed + num_tokens) // BLOCK) - len(known.blocks)
            if missing > 0:
                groups = tuple(BlockGroup(rng.randrange(1000), 1) for _ in range(missing))
                known.blocks += [group.start for group in groups]
                appends.append(Append(request_id, groups))
            if num_tokens > 1:
                chunks.append(Chunk(request_id, num_tokens))
        return StepPlan(
            step_id=step_id,
            leaves=tuple(leaves),
            joins=tuple(joins),
            appends=tuple(appends),
            chunks=tuple(chunks),
        )

    def request(self) -> Known:
        rng = self.rng
        known = Known(
            tokens=[rng.randrange(500) for _ in range(rng.randint(1, 40))],
            params=SamplingParams(
                max_tokens=9,
                temperature=rng.choice([0.0, 0.5, 1.5]),
                top_p=rng.choice([0.25, 1.0]),
                top_k=rng.randrange(5),
                min_p=rng.choice([0.0, 0.125]),
                seed=rng.randrange(2**63),
                choice=rng.randrange(4),
                frequency_penalty=rng.choice([0.0, 0.0, 1.0]),
                logprobs=rng.choice([None, None, 3]),
                prompt_logprobs=rng.choice([None, None, 2]),
            ),
            num_prompt=1,
        )
        known.num_prompt = rng.randint(1, len(known.tokens))
        known.num_computed = rng.randrange(len(known.tokens))
        known.blocks = [rng.randrange(1000) for _ in range(-(-known.num_computed // BLOCK))]
        return known


def test_a_thousand_plans_leave_the_batch_that_building_it_anew_gives():
    maker = PlanMaker(seed=0)
    persistent = PersistentBatch(MAX_ROWS, MAX_LEN, BLOCK)
    for step_id in range(NUM_PLANS):
        plan = maker.plan(step_id)
        got = persistent.apply(plan)
        fresh = PersistentBatch(MAX_ROWS, MAX_LEN, BLOCK)
        joins = tuple(known.join(request_id) for request_id, known in maker.known.items())
        expected = fresh.apply(StepPlan(step_id=step_id, joins=joins, chunks=plan.chunks))
        shares = rows_of(persistent, got)
        assert shares == rows_of(fresh, expected), f"step {step_id}"
        kept = [row for row in range(len(shares)) if maker.rng.random() < 0.5]
        some = rows_of(persistent, got.select(np.array(kept, dtype=np.int64)))
        assert some == {
            persistent.request_ids[row]: shares[persistent.request_ids[row]] for row in kept
        }

        chunk_of = dict(plan.chunks)
        sampled = np.array([maker.rng.randrange(500) for _ in got.sample_rows_S], dtype=np.int64)
        persistent.record(got.sample_rows_S, sampled)
        token_of = {
            persistent.request_ids[row]: token
            for row, token in zip(got.sample_rows_S.tolist(), sampled.tolist(), strict=True)
        }
        for request_id, known in maker.known.items():
            known.num_computed += chunk_of.get(request_id, 1)
            if request_id in token_of:
                assert known.num_computed == len(known.tokens)
                known.tokens.append(token_of[request_id])
    assert maker.num_made > 100


def test_tokens_are_sampled_only_where_the_prompt_ends():
    batch = PersistentBatch(2, MAX_LEN, BLOCK)
    join = Join(RequestId("a"), (5, 6, 7), 3, 0, (BlockGroup(9, 1),), SamplingParams(max_tokens=2))
    first = batch.apply(StepPlan(step_id=0, joins=(join,), chunks=(Chunk(RequestId("a"), 2),)))
    assert first.sample_rows_S.size == 0
    second = batch.apply(StepPlan(step_id=1))
    assert second.token_ids_T.tolist() == [7]
    assert second.sample_rows_S.tolist() == [0]
    assert second.sampling.position_S.tolist() == [3]
    assert second.slots_T.tolist() == [9 * BLOCK + 2]
