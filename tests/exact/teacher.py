"""Runs prompts through the real scheduler and executor, and dictates their tokens if asked to.

Owns the only loop here: InstanceScheduler plans, SequentialExecutor computes over the attention
that goes with the slices, and nothing is replaced but the sampler, which is the executor's own
seam. It knows no reference and judges nothing.

Shape legend: N requests, P forced positions of each, S rows that sample in a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine.backend import backend_of
from engine.batch import PersistentBatch
from engine.executors.sequential import Sampler, SequentialExecutor
from engine.models.slices import DenseSlices
from engine.sampler import SamplingRows
from scheduler.config import InstanceConfig
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    KVGeometry,
    RequestId,
    RequestSpec,
    SamplingParams,
    TokenEvent,
)


class Script(NamedTuple):
    """A prompt, and what is said behind it whatever the model would like to say."""

    prompt: tuple[int, ...]
    forced: tuple[int, ...]


class Teacher:
    """A sampler that writes down each row's logits and returns the token of the script.

    A row is known by its request's `seed`, which is the number of its script; which forced token
    comes next is known by the row's position. So neither the order of the rows nor a preemption
    confuses it, and a position that is sampled twice, or never, shows.
    """

    def __init__(self, scripts: Sequence[Script], vocab_size: int) -> None:
        self._scripts = scripts
        self._logits_NPV = torch.full(
            (len(scripts), len(scripts[0].forced), vocab_size), torch.nan, dtype=torch.float32
        )

    def __call__(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        token_ids = []
        for row, (number, position) in enumerate(
            zip(rows.seed_S.tolist(), rows.position_S.tolist(), strict=True)
        ):
            prompt, forced = self._scripts[number]
            index = position - len(prompt)
            assert index >= 0, "a token of the prompt was sampled"
            record_V = self._logits_NPV[number, index]
            assert record_V[0].isnan(), f"request {number} sampled its token {index} twice"
            record_V.copy_(logits_SV[row])
            token_ids.append(forced[index])
        return torch.tensor(token_ids)

    @property
    def logits_NPV(self) -> Tensor:
        """What was written down, as fp32; every forced position must have been sampled."""
        assert not self._logits_NPV[..., 0].isnan().any(), "a position was never sampled"
        return self._logits_NPV


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Within which limits the requests run together."""

    budget: int  # max_num_batched_tokens
    max_num_running: int
    num_blocks: int
    block_size: int = 16
    steps_between_arrivals: int = 0  # 0: all are there at the start


@dataclass(slots=True)
class Played:
    """What came out, and how rough the road was."""

    tokens: list[list[int]] = field(default_factory=list)
    num_steps: int = 0
    num_mixed_steps: int = 0  # with both chunks and single tokens
    num_preemptions: int = 0
    max_num_running: int = 0


def play(
    model: DenseSlices,
    prompts: Sequence[Sequence[int]],
    num_outputs: int,
    stage: Stage,
    sampler: Sampler | None = None,
) -> Played:
    """Run the prompts together until each has `num_outputs` tokens; nothing stops one earlier."""
    max_model_len = max(len(prompt) for prompt in prompts) + num_outputs
    scheduler, executor = _instance(model, stage, max_model_len, sampler)
    waiting = [
        RequestSpec(
            request_id=RequestId(str(number)),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(max_tokens=num_outputs, temperature=0.0, seed=number),
        )
        for number, prompt in enumerate(prompts)
    ]
    played = Played(tokens=[[] for _ in prompts])
    while waiting or scheduler.has_work:
        while waiting and _is_due(len(prompts) - len(waiting), played.num_steps, stage):
            assert scheduler.add(waiting.pop(0), 0.0) is None, "the stage is too small"
        plan = scheduler.plan_step(0.0)
        if plan is None:
            assert waiting, "requests are alive, but nothing is planned"
            played.num_steps += 1  # an idle step, or the next request would never arrive
            continue
        num_running = scheduler.view().num_running
        executor.submit(plan)
        for event in scheduler.complete_step(executor.poll()):
            if isinstance(event, TokenEvent):
                played.tokens[int(event.request_id)].append(event.token_id)
            elif isinstance(event, FinishedEvent):
                assert event.reason is FinishReason.LENGTH, event.error
        played.num_steps += 1
        played.num_mixed_steps += 0 < len(plan.chunks) < num_running
        played.max_num_running = max(played.max_num_running, num_running)
    executor.close()
    played.num_preemptions = scheduler.view().num_preemptions
    assert scheduler.kv.num_free_blocks == stage.num_blocks, "blocks are held by nobody"
    return played


def teach(model: DenseSlices, scripts: Sequence[Script], stage: Stage) -> tuple[Tensor, Played]:
    """Return the logits_NPV of every forced position, and how the run went."""
    teacher = Teacher(scripts, model.shape.vocab_size)
    prompts = [script.prompt for script in scripts]
    played = play(model, prompts, len(scripts[0].forced), stage, teacher)
    assert played.tokens == [list(script.forced) for script in scripts]
    return teacher.logits_NPV, played


def _is_due(number: int, num_steps: int, stage: Stage) -> bool:
    return num_steps >= number * stage.steps_between_arrivals


def _instance(
    model: DenseSlices, stage: Stage, max_model_len: int, sampler: Sampler | None
) -> tuple[InstanceScheduler, SequentialExecutor]:
    geometry = KVGeometry(
        block_size=stage.block_size,
        num_blocks=stage.num_blocks,
        block_bytes=stage.block_size * model.shape.kv_token_bytes,
    )
    config = InstanceConfig(
        max_model_len=max_model_len,
        max_num_batched_tokens=stage.budget,
        max_num_running=stage.max_num_running,
    )
    backend = backend_of(model, geometry)
    executor = SequentialExecutor(
        model,
        backend.attention,
        backend.cache,
        PersistentBatch(stage.max_num_running, max_model_len, stage.block_size),
        rows=backend.rows,
        sampler=sampler,
    )
    return InstanceScheduler(config, geometry), executor
