"""Plays many random schedules and checks the law on each: `make fuzz ARGS="--num 100000"`.

Prints the rate and what happened; ends with 1 and the seeds when one breaks. A broken seed is
played again by `--first SEED --num 1`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from scheduler.types import FinishReason
from tests.properties.law import Outcome, check_law


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--num", type=int, default=10_000, help="schedules")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # every injected fault is one
    counts: Counter[str] = Counter()
    broken: list[int] = []
    start_s = last_s = time.monotonic()
    for index, seed in enumerate(range(args.first, args.first + args.num), start=1):
        try:
            _count(counts, check_law(seed))
        except Exception as error:  # noqa: BLE001 (all seeds are played, then it ends with 1)
            broken.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        now = time.monotonic()
        if now - last_s > 10 or index == args.num:
            last_s = now
            rate = index / (now - start_s)
            print(
                f"{index} of {args.num} schedules, {rate:.0f}/s, {len(broken)} broken", flush=True
            )
    print(f"seeds {args.first} to {args.first + args.num - 1}: {len(broken)} broken {broken[:20]}")
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return 1 if broken else 0


def _count(counts: Counter[str], outcome: Outcome) -> None:
    counts["requests"] += len(outcome.finished)
    counts["aborts"] += outcome.count(FinishReason.ABORT)
    counts["failures"] += outcome.count(FinishReason.ERROR)
    counts["preemptions"] += outcome.num_preemptions
    counts["steps"] += outcome.num_steps
    counts["resumed requests"] += outcome.num_resumed
    counts["rejections"] += outcome.num_rejections
    counts["block copies"] += outcome.num_copies
    counts["cached tokens"] += sum(outcome.cached.values())
    counts["tokens"] += sum(len(tokens) for tokens in outcome.tokens.values())


if __name__ == "__main__":
    sys.exit(main())
