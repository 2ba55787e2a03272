"""What a long prompt does to 16 streams, and what the limit of a step costs a mixed load.

    python -m tests.bench.long_prompt [MODEL] [--limits 150 0] [--rounds 3] [--seed 0] [--part long]

A server for each `--max-step-ms`, 0 being none: 512 tokens a step; they take turns, so that all
meet the same minutes. Two parts:

    long   16 streams decode; after some seconds a long prompt arrives among them. Prints the gaps
           between tokens before it and until its first token, and its TTFT. Ends with 1 if the p99
           of the gaps during it is more than 20 % over a limit.
    mixed  a closed loop of 32: prompts of 128 to 384 tokens, answers of 32 to 96. Prints output
           tokens a second, beside the last limit's in the same round, gaps and TTFT.

The server and the client share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np

from loadgen.runner import Progress, play
from loadgen.target import OpenAITarget, Outgoing
from loadgen.types import Record
from loadgen.workload.build import WorkloadSpec, build
from serving.progress import NoProgress
from serving.store.local import resolve
from tests.serving.servers import RunningServer, running_server

NUM_STREAMS, NUM_TOKENS, BEFORE_S = 16, 180, 2.0
NUM_LONG = 3000
MOST_OVER = 1.2
CONCURRENCY, NUM_MIXED = 32, 64
WORDS = tuple("the quick brown fox jumps over a lazy dog and runs into deep woods again".split())  # noqa: SIM905
Row = dict[str, float]


def prose(rng: random.Random, num_words: int) -> str:
    """Return words of a token each; no two have a beginning in common."""
    return " ".join(rng.choices(WORDS, k=num_words))


async def send(target: OpenAITarget, prompt: str, num_tokens: int, zero_s: float) -> Record:
    record = Record(session=0, turn=0, tenant="default", intended_at_s=time.monotonic() - zero_s)
    await target.send(Outgoing(prompt=prompt, max_tokens=num_tokens), record, zero_s)
    assert record.ok, record.detail
    return record


async def long_prompt(server: RunningServer, _: Path, rng: random.Random) -> Row:
    async with OpenAITarget(url=server.url, model=server.model) as target:
        zero_s = time.monotonic()
        streams = [
            asyncio.create_task(send(target, prose(rng, 32), NUM_TOKENS, zero_s))
            for _ in range(NUM_STREAMS)
        ]
        await asyncio.sleep(BEFORE_S)
        long = await send(target, prose(rng, NUM_LONG), 1, zero_s)
        records = await asyncio.gather(*streams)
    begin_s, end_s = long.intended_at_s, long.received_at_s[0]
    assert max(record.end_at_s for record in records) > end_s, "the streams ended before it began"
    before, during = [], []
    first_s = max(record.received_at_s[0] for record in records)
    for record in records:
        for one_s, other_s in pairwise(record.received_at_s):
            if first_s < one_s and other_s < begin_s:
                before.append(other_s - one_s)
            elif begin_s <= one_s and other_s <= end_s:
                during.append(other_s - one_s)
    return {
        "tokens": long.num_prompt_tokens,
        **spread("before", before),
        **spread("during", during),
        "TTFT s": long.ttft_s,
    }


async def mixed(server: RunningServer, folder: Path, rng: random.Random) -> Row:
    spec = WorkloadSpec(
        num_sessions=NUM_MIXED,
        prompt_tokens="uniform:128-384",
        output_tokens="uniform:32-96",
        tokenizer=str(folder),
        seed=rng.randrange(1 << 20),
    )
    plan = build(spec).plan
    progress = Progress(len(plan))
    async with OpenAITarget(url=server.url, model=server.model) as target:
        await play(plan, target, asyncio.Event(), progress, CONCURRENCY)
    records = progress.records
    assert all(record.ok for record in records)
    gaps = [gap for record in records for gap in record.gaps_s]
    ttft = [record.ttft_s for record in records]
    return {
        "tokens/s": sum(record.num_output_tokens for record in records) / progress.duration_s,
        **spread("gaps", gaps),
        "TTFT p50 s": float(np.percentile(ttft, 50)),
        "TTFT p99 s": float(np.percentile(ttft, 99)),
    }


def spread(name: str, seconds: Sequence[float]) -> Row:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return {f"{name} p50": p50, f"{name} p99": p99, f"{name} max": 1000 * max(seconds)}


PARTS = {"long": long_prompt, "mixed": mixed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--limits", type=float, nargs="+", default=[150, 0], help="ms; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS, default="long")
    parser.add_argument("--step-costs", help="a file of `hocket profile`")
    args = parser.parse_args()
    print(f"{args.part}: seed {args.seed}, {args.rounds} rounds; ms if nothing else is said")
    folder = resolve(args.model, NoProgress()).path
    flags = [str(folder), "--dtype", "bfloat16"]
    flags += ["--step-costs", args.step_costs] if args.step_costs else []
    rows: dict[float, list[Row]] = defaultdict(list)
    with ExitStack() as stack:
        servers = {
            limit: stack.enter_context(running_server(*flags, "--max-step-ms", f"{limit:g}"))
            for limit in args.limits
        }
        for number in range(args.rounds):
            for limit in args.limits[:: -1 if number % 2 else 1]:
                rng = random.Random(args.seed + number)
                row = asyncio.run(PARTS[args.part](servers[limit], folder, rng))
                rows[limit].append(row)
                cells = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
                print(f"{limit:>5g}  {cells}", flush=True)
    print("medians")
    missed = False
    for limit, found in rows.items():
        medians = {name: statistics.median(row[name] for row in found) for name in found[0]}
        cells = "  ".join(f"{name} {value:.4g}" for name, value in medians.items())
        if "tokens/s" in medians:
            reference = rows[args.limits[-1]]
            pairs = zip(found, reference, strict=True)
            ratio = statistics.median(one["tokens/s"] / other["tokens/s"] for one, other in pairs)
            cells += f"  x {ratio:.3f}"
        elif limit:
            over = medians["during p99"] / limit
            missed |= over > MOST_OVER
            cells += f"  p99 / limit {over:.2f}"
        print(f"{limit:>5g}  {cells}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
