"""How long the runs of blocks stay, and what block groups cost in tokens held.

    python -m tests.bench.fragmentation [--seed N] [--variants]

Plays a simulated load on the real scheduler, without an executor, on the CPU: tenants with system
prompts, conversations that come back, a pool of 4,096 blocks of 16 tokens. The same arrivals go to
the block groups and to an allocator that knows no groups: a LIFO list of free blocks, single idle
blocks evicted least recently used first, no room kept behind a table. Both find prefixes by the
same keys. What is measured, each after the pool was filled anew several times over:

- runs: 90 % of the blocks are held by tables and 30 % of those are shared or were found. Budget: a
  group has 8 blocks in the mean.
- capacity: requests always wait, and in each step in which somebody lacks blocks, the tokens are
  counted that all running ones hold. Budget: with groups they are within 2 % of those without.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from statistics import fmean, quantiles
from unittest.mock import patch

from scheduler.config import InstanceConfig
from scheduler.instance.plan import SampledToken, StepPlan, StepResult
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.kv import manager, prefix
from scheduler.kv.blocks import BlockGroup, to_groups
from scheduler.types import FinishedEvent, KVGeometry, RequestId, RequestSpec, SamplingParams

NUM_BLOCKS, BLOCK_SIZE = 4096, 16
MAX_MODEL_LEN, TOKEN_BUDGET = 8192, 2048
OCCUPANCY = 0.9
NUM_WARM_UP, NUM_TURNOVERS = 3, 20  # times that as many blocks as the pool has are given out
STEPS_PER_SAMPLE = 10
MAX_WAITING = 8
VARIANTS = [(n, 20) for n in (0, 1, 2, 3, 4, 16, 64)] + [(3, n) for n in (4097, 64, 32, 25, 16, 8)]
MIN_MEAN_RUN, MIN_SHARED, MAX_LOSS = 8.0, 0.3, 0.02

SYSTEM_PROMPTS = (150, 225, 300, 375, 450, 525, 600, 750, 900, 1050, 1275, 1500)  # one a tenant
COMES_BACK = 0.3  # share of turns that are followed by another
ARRIVALS_PER_STEP = 0.27  # a guess, to let a turn come back soon after the one before it has ended
MAX_HISTORY = 3000  # tokens; a longer conversation is over
END = 32_000  # the token that ends an answer
MEAN_PAUSE = 1  # arrivals between the end of a turn and the next one


class SinglePool:
    """In the place of BlockPool: the block that was freed last is given out first."""

    num_stolen_blocks = 0

    def __init__(self, num_blocks: int) -> None:
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_unclaimed_blocks(self) -> int:
        return len(self._free)

    @property
    def longest_run(self) -> int:
        return NUM_BLOCKS  # nothing is evicted for the sake of a run

    def allocate(
        self, num_blocks: int, after: int | None = None, slack: int = 0
    ) -> tuple[BlockGroup, ...] | None:
        if num_blocks > len(self._free):
            return None
        return to_groups([self._free.pop() for _ in range(num_blocks)])

    def release(self, group: BlockGroup) -> None:
        self._free.extend(reversed(range(group.start, group.end)))

    def unclaim(self, start: int) -> None:
        """There are no claims."""

    def length_at(self, start: int | None) -> int:
        return 0  # a table's next block is no better than others

    claim_at = length_at

    def free_runs(self) -> tuple[BlockGroup, ...]:
        return to_groups(sorted(self._free))


class SingleIndex(prefix.PrefixIndex):
    """In the place of PrefixIndex: blocks are evicted one by one, least recently used first."""

    __slots__ = ()

    def evict(self, max_num_blocks: int) -> BlockGroup | None:
        return super().evict(1)


@contextmanager
def without_groups() -> Iterator[None]:
    with (
        patch.object(manager, "BlockPool", SinglePool),
        patch.object(manager, "PrefixIndex", SingleIndex),
    ):
        yield


# --- the load ---


def arrivals(seed: int) -> Iterator[tuple[RequestSpec, tuple[int, ...]]]:
    """Yield requests and their answers for ever: which, in what order, says the seed alone."""
    rng = random.Random(seed)

    def tokens(num: int) -> tuple[int, ...]:
        return tuple(rng.randrange(END) for _ in range(num))

    def length(median: int, sigma: float, low: int, high: int) -> int:
        return min(high, max(low, round(rng.lognormvariate(0, sigma) * median)))

    system_prompts = [tokens(num) for num in SYSTEM_PROMPTS]
    coming_back: list[tuple[float, int, int, tuple[int, ...]]] = []
    ordinal = 0
    while True:
        if coming_back and coming_back[0][0] <= ordinal:
            _, _, tenant, history = heappop(coming_back)
        else:
            tenant = rng.randrange(len(system_prompts))
            history = system_prompts[tenant]
        prompt = history + tokens(length(300, 0.8, 32, 2000))
        output = (*tokens(length(150, 0.8, 1, 800) - 1), END)
        spec = RequestSpec(
            request_id=RequestId(f"r{ordinal}"),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=1024, stop_token_ids=(END,)),  # nobody says how few
            tenant=f"t{tenant}",
        )
        yield spec, output
        if rng.random() < COMES_BACK and len(prompt) + len(output) < MAX_HISTORY:
            pause = len(output) * ARRIVALS_PER_STEP + rng.expovariate(1 / MEAN_PAUSE)
            heappush(coming_back, (ordinal + pause, ordinal, tenant, prompt + output))
        ordinal += 1


# --- the run ---


@dataclass
class Counts:
    """What is added up over a run."""

    steps: int = 0
    admitted: int = 0
    given: int = 0  # blocks handed out
    grown: int = 0  # of these, behind the last block of a table that computes already
    in_place: int = 0  # of these, directly behind it
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Samples:
    """What is looked at now and then, once the pool is warm."""

    held: list[float] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)
    mean_run: list[float] = field(default_factory=list)
    run_of_request: list[float] = field(default_factory=list)  # blocks per group of one request
    free_runs: list[int] = field(default_factory=list)


class Player:
    """Plays executor and clients of one scheduler.

    With `occupancy`, requests arrive while less than that share of the blocks is held; without, so
    that some always wait.
    """

    def __init__(self, seed: int, occupancy: float | None, *, prefix_caching: bool = True) -> None:
        config = InstanceConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_running=1024,  # so that blocks decide
            max_num_batched_tokens=TOKEN_BUDGET,
            prefix_caching=prefix_caching,
        )
        geometry = KVGeometry(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, block_bytes=1)
        self.scheduler = InstanceScheduler(config, geometry)
        self.max_num_blocks = math.inf if occupancy is None else occupancy * NUM_BLOCKS
        self.arrivals = arrivals(seed)
        self.output: dict[RequestId, Sequence[int]] = {}
        self.known: dict[RequestId, int] = {}  # tokens, of those alive
        self.num_prompt: dict[RequestId, int] = {}
        self.computed: dict[RequestId, int] = {}  # of those in the batch
        self.ends: dict[RequestId, int] = {}
        self.found: dict[RequestId, int] = {}  # blocks that a request found when it joined
        self.total = Counts()
        self.samples = Samples()
        self.exhausted: dict[int, int] = {}  # step in which blocks lacked -> tokens held by all

    def step(self) -> None:
        self._arrive()
        before = self.scheduler.view()
        plan = self.scheduler.plan_step(0.0)
        assert plan is not None
        num_tokens = self.scheduler.view().num_computed_tokens - before.num_computed_tokens
        self._look_for_exhaustion(before.num_preemptions, num_tokens)
        self._execute(plan)
        self.total.steps += 1

    def _arrive(self) -> None:
        view = self.scheduler.view()
        num_waiting, num_blocks = view.num_waiting, NUM_BLOCKS - view.num_free_blocks
        while num_waiting < MAX_WAITING and num_blocks < self.max_num_blocks:
            spec, output = next(self.arrivals)
            assert self.scheduler.add(spec, 0.0) is None
            self.output[spec.request_id] = output
            self.num_prompt[spec.request_id] = len(spec.prompt_token_ids)
            self.known[spec.request_id] = len(spec.prompt_token_ids)
            num_blocks += len(spec.prompt_token_ids) // BLOCK_SIZE
            num_waiting += 1

    def _execute(self, plan: StepPlan) -> None:
        total, chunks = self.total, dict(plan.chunks)
        for request_id in plan.leaves:
            self.computed.pop(request_id, None)
        for join in plan.joins:
            num_found = join.num_computed_tokens // BLOCK_SIZE
            if join.request_id not in self.found:
                total.admitted += 1
                total.prompt_tokens += join.num_prompt_tokens
                total.cached_tokens += join.num_computed_tokens
            self.found[join.request_id] = num_found
            total.given += sum(group.num_blocks for group in join.groups) - num_found
            self.computed[join.request_id] = join.num_computed_tokens
            self.ends[join.request_id] = join.groups[-1].end
        for request_id, groups in plan.appends:
            num_blocks = sum(group.num_blocks for group in groups)
            total.given += num_blocks
            total.grown += num_blocks
            if groups[0].start == self.ends[request_id]:
                total.in_place += groups[0].num_blocks
            self.ends[request_id] = groups[-1].end
        sampled = []
        for request_id in self.computed:
            self.computed[request_id] += chunks.get(request_id, 1)
            known = self.known[request_id]
            if self.computed[request_id] == known:
                token = self.output[request_id][known - self.num_prompt[request_id]]
                sampled.append(SampledToken(request_id, token))
                self.known[request_id] += 1
        events = self.scheduler.complete_step(
            StepResult(step_id=plan.step_id, sampled=tuple(sampled))
        )
        for event in events:
            if isinstance(event, FinishedEvent):
                for of_request in (self.output, self.num_prompt, self.known, self.ends, self.found):
                    of_request.pop(event.request_id, None)

    def _look_for_exhaustion(self, num_preemptions: int, num_tokens: int) -> None:
        """Note what all hold if somebody lacked blocks in the step that was just planned."""
        queues = self.scheduler._queues
        waits = queues.waiting and queues.waiting[0].waits_for is None and num_tokens < TOKEN_BUDGET
        if waits or queues.num_preemptions > num_preemptions:
            held = sum(request.num_scheduled for request in queues.running)
            self.exhausted[self.total.steps] = held

    def sample(self) -> None:
        kv, samples = self.scheduler.kv, self.samples
        uses: dict[int, int] = {}
        was_found: set[int] = set()
        num_blocks = num_groups = 0
        for request_id, groups in kv.tables().items():
            blocks = [block for group in groups for block in range(group.start, group.end)]
            for block in blocks:
                uses[block] = uses.get(block, 0) + 1
            was_found.update(blocks[: self.found[request_id]])
            num_blocks += len(blocks)
            num_groups += len(groups)
            samples.run_of_request.append(len(blocks) / len(groups))
        samples.held.append(len(uses) / NUM_BLOCKS)
        num_shared = sum(num > 1 or block in was_found for block, num in uses.items())
        samples.shared.append(num_shared / len(uses))
        samples.mean_run.append(num_blocks / num_groups)
        samples.free_runs.append(len(kv.free_runs()))


def play(
    name: str, player: Player, *, turnovers: float = math.inf, steps: float = math.inf
) -> None:
    """Play until the pool was given out so many times, or so many steps, and show how far it is."""
    begin_s = shown_s = time.monotonic()
    total = player.total
    while total.given < turnovers * NUM_BLOCKS and total.steps < steps:
        player.step()
        if total.given > NUM_WARM_UP * NUM_BLOCKS and not total.steps % STEPS_PER_SAMPLE:
            player.sample()
        if time.monotonic() - shown_s > 2:
            shown_s = time.monotonic()
            print(f"  {name}: step {total.steps}, turnover {total.given / NUM_BLOCKS:.1f}")
    print(f"  {name}: {total.steps} steps in {time.monotonic() - begin_s:.1f} s")


# --- what came of it ---


def rows(player: Player) -> dict[str, str]:
    total, samples, view = player.total, player.samples, player.scheduler.view()
    num_tokens = view.num_computed_tokens + total.cached_tokens
    return {
        "pool given out, times": f"{total.given / NUM_BLOCKS:.1f}",
        "blocks held by tables": f"{fmean(samples.held):.1%}",
        "of these in several tables, or found": f"{fmean(samples.shared):.1%}",
        "mean run, blocks": f"{fmean(samples.mean_run):.2f}",
        "blocks per group of a request, mean": f"{fmean(samples.run_of_request):.2f}",
        "5th percentile of requests": f"{quantiles(samples.run_of_request, n=20)[0]:.2f}",
        "free runs and claims": f"{fmean(samples.free_runs):.0f}",
        "growth in place": f"{total.in_place / total.grown:.1%}",
        "stolen blocks": f"{view.kv.num_stolen_blocks}",
        "evicted blocks": f"{view.kv.num_evicted_blocks}",
        "hit rate": f"{total.cached_tokens / total.prompt_tokens:.1%}",
        "requests admitted": f"{total.admitted}",
        "preemptions": f"{view.num_preemptions}",
        "tokens computed or found, a step": f"{num_tokens / total.steps:.1f}",
        "steps in which blocks lacked": f"{len(player.exhausted)}",
        "tokens held then": f"{fmean(player.exhausted.values() or [0]):.0f}",
    }


def compare(
    seed: int, occupancy: float | None = None, *, prefix_caching: bool = True, **until: float
) -> tuple[Player, Player]:
    """Play the same with groups and without, and print both."""
    groups = Player(seed, occupancy, prefix_caching=prefix_caching)
    play("groups", groups, **until)
    with without_groups():
        single = Player(seed, occupancy, prefix_caching=prefix_caching)
        play("no groups", single, **until)
    print(f"{'':<38} {'groups':>12} {'no groups':>12}")
    right = rows(single)
    for label, cell in rows(groups).items():
        print(f"{label:<38} {cell:>12} {right[label]:>12}")
    return groups, single


def capacity_ratio(groups: Player, single: Player) -> float:
    """Return tokens held with groups per token held without, over the steps that exhaust both."""
    steps = groups.exhausted.keys() & single.exhausted.keys()
    a, b = ([player.exhausted[step] for step in steps] for player in (groups, single))
    cuts = quantiles((x / y for x, y in zip(a, b, strict=True)), n=20)
    print(f"tokens held, groups to no groups, over {len(steps)} steps: {sum(a) / sum(b):.4f}")
    print(f"step by step, 5th to 95th percentile: {cuts[0]:.4f} to {cuts[-1]:.4f}")
    return sum(a) / sum(b)


def measure_variants(seed: int) -> None:
    """Mean run and hit rate by slack and reserve, half as long as the measurement itself."""
    labels = ("mean run, blocks", "5th percentile of requests", "hit rate", "growth in place")
    for slack, part in VARIANTS:
        with (
            patch.object(manager, "SLACK_BLOCKS", slack),
            patch.object(manager, "RESERVE_PART", part),
        ):
            player = Player(seed, OCCUPANCY)
            play(f"slack {slack}, reserve 1/{part}", player, turnovers=NUM_TURNOVERS / 2)
        print(", ".join(f"{label} {rows(player)[label]}" for label in labels))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", action="store_true", help="try other constants instead")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    if args.variants:
        measure_variants(args.seed)
        return
    print(f"runs: {OCCUPANCY:.0%} of the blocks held")
    groups, _ = compare(args.seed, OCCUPANCY, turnovers=NUM_WARM_UP + NUM_TURNOVERS)
    mean_run = fmean(groups.samples.mean_run)
    print("capacity: requests always wait")
    ratio = capacity_ratio(*compare(args.seed, steps=4000))
    print("capacity without a prefix cache: both must decide the same")
    alone = capacity_ratio(*compare(args.seed, steps=2000, prefix_caching=False))
    held, shared = fmean(groups.samples.held), fmean(groups.samples.shared)
    checks = (
        (f"blocks held, at least {OCCUPANCY:.0%}", held, held >= OCCUPANCY),
        (f"of these shared or found, at least {MIN_SHARED:.0%}", shared, shared >= MIN_SHARED),
        (f"mean run of at least {MIN_MEAN_RUN:g} blocks", mean_run, mean_run >= MIN_MEAN_RUN),
        (f"tokens held within {MAX_LOSS:.0%}", ratio, ratio >= 1 - MAX_LOSS),
        ("the same without a prefix cache", alone, alone == 1),
    )
    for what, value, ok in checks:
        print(f"{'met' if ok else 'MISSED':>6}  {what}: {value:.4f}")
    sys.exit(not all(ok for *_, ok in checks))


if __name__ == "__main__":
    main()
