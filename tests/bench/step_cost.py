"""What a step of the real model costs, and the line through it: the numbers of `--fake`.

    python -m tests.bench.step_cost

Runs SmolLM2-135M-Instruct (bfloat16) through the executor that serves it: decodes of 1 to 32
requests at several contexts, and chunks of a prompt. Prints the medians, the least-squares fit of
`scheduler.costs.LinearStepCost`, and what share of a decode of 32 the scheduler takes for itself.
Measured on the CPU of the machine it runs on.
"""

from __future__ import annotations

import statistics

import numpy as np

from engine.build import build_engine
from engine.config import EngineConfig
from engine.startup import StartupTimes
from scheduler.costs import StepShape
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.kv.blocks import BlockGroup
from scheduler.types import RequestId, SamplingParams
from serving.progress import NoProgress
from serving.store.local import resolve
from tests.bench import planning

BLOCK, NUM_REPEATS = 16, 7
# (requests, tokens that each computes, context that each has before)
SHAPES = [
    (1, 1, 64), (1, 1, 1024), (8, 1, 64), (8, 1, 512), (32, 1, 64), (32, 1, 256),
    (1, 64, 0), (1, 256, 0), (1, 512, 0), (1, 256, 1024), (4, 64, 128),
]  # fmt: skip


def plans(num_requests: int, num_tokens: int, context: int) -> tuple[StepPlan, list[RequestId]]:
    """Return a step in which `num_requests` new requests compute behind a context of stale KV."""
    num_blocks = -(-(context + num_tokens) // BLOCK)
    joins, chunks = [], []
    for index in range(num_requests):
        request_id = RequestId(f"r{index}")
        joins.append(
            Join(
                request_id,
                (7,) * (context + num_tokens),
                context,
                context,
                (BlockGroup(index * num_blocks, num_blocks),),
                SamplingParams(max_tokens=2, temperature=0.0),
            )
        )
        if num_tokens > 1:
            chunks.append(Chunk(request_id, num_tokens))
    plan = StepPlan(step_id=0, joins=tuple(joins), chunks=tuple(chunks))
    return plan, [join.request_id for join in joins]


def main() -> None:
    folder = resolve(None, NoProgress()).path
    config = EngineConfig(model_name="m", model_folder=folder, dtype="bfloat16")
    core, _ = build_engine(config, StartupTimes(NoProgress()), lambda _: None)
    executor = core._executor
    rows, measured_s = [], []
    leaves: list[RequestId] = []
    print(f"{'requests':>8} {'tokens':>7} {'context':>8} {'median ms':>10}")
    for num_requests, num_tokens, context in SHAPES:
        seconds = []
        for _ in range(NUM_REPEATS):
            plan, request_ids = plans(num_requests, num_tokens, context)
            executor.submit(
                StepPlan(step_id=0, leaves=tuple(leaves), joins=plan.joins, chunks=plan.chunks)
            )
            seconds.append(executor.poll().duration_s)
            leaves = request_ids
        median_s = statistics.median(seconds[1:])
        total = num_requests * num_tokens
        shape = StepShape(total, num_requests, num_requests * (context + num_tokens))
        rows.append((1.0, *shape))
        measured_s.append(median_s)
        print(
            f"{num_requests:>8} {total:>7} {shape.num_context_tokens:>8} {1000 * median_s:>10.1f}"
        )
    # Relative errors count, or the large steps alone would decide.
    weight = 1.0 / np.array(measured_s)
    matrix = np.array(rows) * weight[:, None]
    fit, *_ = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)
    names = ("fixed_s", "token_s", "request_s", "context_token_s")
    print(", ".join(f"{name}={value:.3g}" for name, value in zip(names, fit, strict=True)))
    print("relative error of the fit:", np.round(matrix @ fit - 1.0, 2).tolist())
    step_s = measured_s[SHAPES.index((32, 1, 256))]
    planned_s = sum(statistics.median(seconds) for seconds in planning.measure(32))
    print(f"planning and completing 32 requests: {planned_s / step_s:.2%} of that step")


if __name__ == "__main__":
    main()
