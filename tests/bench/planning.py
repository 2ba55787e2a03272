"""Planning time per step: how long the pure scheduler takes, without an executor.

    python -m tests.bench.planning

A step is `plan_step` and `complete_step` of running requests that decode, with arrivals and ends
mixed in: each request produces 64 tokens and another takes its place. Measured on the CPU of the
machine it runs on; the budget for planning is 0.5 ms at 256 running requests and 2 ms at 1,024.
`hocket bench limits` tells what a step of the real model takes, to compare.
"""

from __future__ import annotations

import gc
import statistics
import time

from scheduler.config import InstanceConfig
from scheduler.instance.plan import SampledToken, StepPlan, StepResult
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.types import FinishedEvent, KVGeometry, RequestId, RequestSpec, SamplingParams

NUM_STEPS = 400
MAX_TOKENS = 64
NUM_PROMPT = 200


def measure(num_running: int) -> tuple[list[float], list[float]]:
    """Return seconds of each plan_step and each complete_step."""
    geometry = KVGeometry(block_size=16, num_blocks=num_running * 20, block_bytes=1)
    config = InstanceConfig(
        max_model_len=4096,
        max_num_running=num_running,
        max_num_batched_tokens=num_running + 2048,
        max_num_waiting=num_running * 2,
    )
    scheduler = InstanceScheduler(config, geometry)
    running: set[RequestId] = set()
    num_made = 0

    def top_up() -> None:
        nonlocal num_made
        while len(running) < num_running:
            request_id = RequestId(f"r{num_made}")
            # Different lengths, so that requests end and cross block bounds at different steps.
            max_tokens = MAX_TOKENS // 2 + num_made * 7919 % MAX_TOKENS
            scheduler.add(
                RequestSpec(
                    request_id=request_id,
                    # Half of it is shared, as a system prompt is.
                    prompt_token_ids=(*range(96), num_made, *range(NUM_PROMPT - 97)),
                    params=SamplingParams(max_tokens=max_tokens),
                ),
                0.0,
            )
            running.add(request_id)
            num_made += 1

    def sampled(plan: StepPlan, computed: dict[RequestId, int]) -> tuple[SampledToken, ...]:
        """Play the executor: who has computed its whole prompt samples a token."""
        chunks = dict(plan.chunks)
        for join in plan.joins:
            computed[join.request_id] = join.num_computed_tokens
        for request_id in plan.leaves:
            computed.pop(request_id, None)
        for request_id in computed:
            computed[request_id] += chunks.get(request_id, 1)
        return tuple(SampledToken(key, 5) for key, n in computed.items() if n >= NUM_PROMPT)

    computed: dict[RequestId, int] = {}
    plan_s, complete_s = [], []
    gc.freeze()
    for step in range(NUM_STEPS + 100):
        top_up()
        start_s = time.perf_counter()
        plan = scheduler.plan_step(0.0)
        planned_s = time.perf_counter()
        assert plan is not None
        result = StepResult(step_id=plan.step_id, sampled=sampled(plan, computed))
        begin_s = time.perf_counter()
        events = scheduler.complete_step(result)
        end_s = time.perf_counter()
        running.difference_update(e.request_id for e in events if isinstance(e, FinishedEvent))
        if step >= 100:  # the first steps are all prompts
            plan_s.append(planned_s - start_s)
            complete_s.append(end_s - begin_s)
    return plan_s, complete_s


def main() -> None:
    print(
        f"{'running':>8} {'plan p50':>10} {'p99':>8} {'complete p50':>13} {'p99':>8}   ms per step"
    )
    for num_running in (32, 256, 1024):
        cells = []
        for seconds in measure(num_running):
            cuts = statistics.quantiles(seconds, n=100)
            cells += [1000 * cuts[49], 1000 * cuts[98]]
        plan, plan99, complete, complete99 = cells
        print(f"{num_running:>8} {plan:>10.3f} {plan99:>8.3f} {complete:>13.3f} {complete99:>8.3f}")


if __name__ == "__main__":
    main()
