"""Bitwise equal logits in any company, with the real model: `make invariant`.

    python -m tests.exact.invariance [--prompts 100] [--dtypes float32 bfloat16] [--budgets 16]

Every prompt is run alone, then all of them in random company: chunk budgets of 16, 64, 256
and 512 tokens, one and two steps in flight, preemptions at random tokens, and prompts of which
a half finds nothing computed, a quarter one block, and a quarter all but its last token. What each
request says is dictated, so each of its positions has one right row of logits, compared to the
bit. The last line of each dtype is the default mode of torch's kernels, which has to differ,
or this would show nothing. HOCKET_KERNELS chooses the kernels of the others.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.backend import backend_of, load_best
from engine.batch import PersistentBatch
from engine.executors.sequential import SequentialExecutor
from engine.models.registry import load_model
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
    StartedEvent,
)
from serving.progress import TerminalProgress
from serving.store.local import resolve

BLOCK_SIZE = 16
MAX_MODEL_LEN = 640


class Script(NamedTuple):
    """A prompt, and what is said behind it."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


class Company(NamedTuple):
    """How the requests run; `running` 1 and no sharing is alone."""

    budget: int = 512
    running: int = 1
    num_blocks: int = 2000
    depth: int = 1
    prefix_caching: bool = False
    policy: str = "fcfs"


@dataclass
class Witness:
    """A sampler that dictates the tokens and keeps a digest of every row of logits."""

    scripts: list[Script]
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def __call__(self, logits_SV: Tensor, rows: SamplingRows) -> Tensor:
        token_ids = []
        keys = zip(rows.seed_S.tolist(), rows.position_S.tolist(), strict=True)
        for row_V, (number, position) in zip(logits_SV, keys, strict=True):
            # bfloat16 has no numpy type; its bits as fp32 are as telling.
            digest = hashlib.sha256(row_V.float().numpy().tobytes()).digest()
            known = self.digests.setdefault((number, position), digest)
            assert known == digest, f"request {number} got two rows of logits at {position}"
            script = self.scripts[number]
            # Beyond the end is what a step computes that was planned ahead.
            token_ids.append((*script.output, 0)[position - len(script.prompt)])
        return torch.tensor(token_ids)


@dataclass
class Road:
    """How rough the run was."""

    num_steps: int = 0
    num_preemptions: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def make_scripts(rng: random.Random, num: int, vocab_size: int) -> list[Script]:
    scripts: list[Script] = []
    for index in range(num):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(3, 160))]
        earlier = [script for script in scripts if len(script.prompt) > BLOCK_SIZE]
        if index % 4 == 1 and earlier:
            prompt = [*rng.choice(earlier[-8:]).prompt[:BLOCK_SIZE], *prompt]
        elif index % 4 == 3 and earlier:
            prompt = list(rng.choice(earlier[-8:]).prompt)
        elif index % 10 == 6:  # several splits of the keys
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(257, 600))]
        output = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(3, 10)))
        scripts.append(Script(tuple(prompt), output))
    return scripts


def play(
    model: DenseSlices, scripts: list[Script], company: Company, seed: int, *, invariant: bool
) -> tuple[dict[tuple[int, int], bytes], Road]:
    """Run the scripts; return the digest of each row of logits by (script, position)."""
    rng = random.Random(seed)
    geometry = KVGeometry(
        block_size=BLOCK_SIZE,
        num_blocks=company.num_blocks,
        block_bytes=BLOCK_SIZE * model.shape.kv_token_bytes,
    )
    backend = backend_of(model, geometry, batch_invariant=invariant)
    witness = Witness(scripts)
    batch = PersistentBatch(company.running, MAX_MODEL_LEN, BLOCK_SIZE)
    executor = SequentialExecutor(
        model, backend.attention, backend.cache, batch, rows=backend.rows, sampler=witness
    )
    scheduler = InstanceScheduler(
        InstanceConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=company.budget,
            max_num_running=company.running,
            prefix_caching=company.prefix_caching,
            policy=company.policy,
        ),
        geometry,
    )
    to_arrive = deque(
        RequestSpec(
            request_id=RequestId(str(number)),
            prompt_token_ids=script.prompt,
            params=SamplingParams(max_tokens=len(script.output), temperature=0.0, seed=number),
            priority=rng.randint(0, 3),
        )
        for number, script in enumerate(scripts)
    )
    road, in_flight = Road(), 0
    start_s = time.perf_counter()
    while to_arrive or scheduler.has_work:
        while to_arrive and (not scheduler.has_work or rng.random() < 0.5):
            assert scheduler.add(to_arrive.popleft(), 0.0) is None
        if company.running > 1:
            _preempt_one(scheduler, rng)
        while in_flight < company.depth and (plan := scheduler.plan_step(0.0)):
            executor.submit(plan)
            in_flight += 1
        if not in_flight:
            continue
        in_flight -= 1
        for event in scheduler.complete_step(executor.poll()):
            if isinstance(event, StartedEvent):
                _count_hit(road, scripts[int(event.request_id)], event.num_cached_tokens)
            elif isinstance(event, FinishedEvent):
                assert event.reason is FinishReason.LENGTH, event.error
        road.num_steps += 1
    road.num_preemptions = scheduler.view().num_preemptions
    road.seconds = time.perf_counter() - start_s
    return witness.digests, road


def _preempt_one(scheduler: InstanceScheduler, rng: random.Random) -> None:
    """Now and then throw someone out between two plans, wherever it has come to."""
    queues, limit = scheduler._queues, scheduler.config.max_num_preemptions
    victims = [request for request in queues.running if request.num_preemptions < limit]
    if victims and rng.random() < 0.15:
        queues.preempt(rng.choice(victims))


def _count_hit(road: Road, script: Script, num_cached_tokens: int) -> None:
    kind = "other"
    if num_cached_tokens in (0, BLOCK_SIZE, len(script.prompt) - 1):
        kind = {0: "nothing", BLOCK_SIZE: "one block"}.get(num_cached_tokens, "all")
    road.hits[kind] = road.hits.get(kind, 0) + 1


def num_different(
    alone: dict[tuple[int, int], bytes], found: dict[tuple[int, int], bytes], scripts: list[Script]
) -> tuple[int, int]:
    """Return how many rows of logits differ, of how many. Raises KeyError where one is missing."""
    keys = [
        (number, len(script.prompt) + index)
        for number, script in enumerate(scripts)
        for index in range(len(script.output))
    ]
    return sum(alone[key] != found[key] for key in keys), len(keys)


COMPANIES = [
    Company(budget, running, num_blocks, depth, prefix_caching=True, policy="priority")
    for budget, running, num_blocks in ((16, 8, 60), (64, 12, 90), (256, 16, 120), (512, 24, 180))
    for depth in (1, 2)
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder; by default SmolLM2-135M-Instruct")
    args = parser.parse_args()
    with TerminalProgress() as progress:
        folder = resolve(args.model, progress).path
    print(f"seed {args.seed}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("dtype     mode       budget running blocks depth  rows of logits that differ ...")
    failed = False
    for dtype in args.dtypes:
        companies = [company for company in COMPANIES if company.budget in args.budgets]
        failed |= _compare(folder, dtype, args.prompts, args.seed, companies)
    print("FAILED" if failed else "PASSED")
    return int(failed)


def _compare(
    folder: Path, dtype: str, num_prompts: int, seed: int, companies: Sequence[Company]
) -> bool:
    failed = False
    for invariant in (True, False):
        model, kernels = load_model(folder, dtype), "torch"
        if invariant:
            model, kernels = load_best(folder, dtype, batch_invariant=True)
        scripts = make_scripts(random.Random(seed), num_prompts, model.shape.vocab_size)
        alone, road = play(model, scripts, Company(), seed, invariant=invariant)
        print(
            f"{dtype:<9} kernels {kernels}; alone: {road.num_steps} steps, {road.seconds:.0f} s",
            flush=True,
        )
        for number, company in enumerate(companies if invariant else companies[-2:-1]):
            found, road = play(model, scripts, company, seed + number, invariant=invariant)
            num, total = num_different(alone, found, scripts)
            failed |= (num > 0) == invariant
            # Or the run would not have been what it is to show.
            failed |= not road.num_preemptions or not {"nothing", "one block", "all"} <= set(
                road.hits
            )
            print(
                f"{dtype:<9} {'invariant' if invariant else 'default':<10} {company.budget:>6} "
                f"{company.running:>7} {company.num_blocks:>6} {company.depth:>5}  {num} of "
                f"{total} differ; {road.num_steps} steps, {road.num_preemptions} preemptions, "
                f"found computed: {road.hits}, {road.seconds:.0f} s",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
