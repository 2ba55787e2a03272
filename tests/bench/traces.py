"""Real loads against Hocket: a trace of arrivals, a trace with shared prefixes, conversations.

    python -m tests.bench.traces azure TRACE           against a real model, five minutes
    python -m tests.bench.traces mooncake TRACE        against --fake, ten minutes
    python -m tests.bench.traces conversations         against --fake, a minute

azure: from second 600 at a fiftieth of the trace's speed, lengths shortened to 4,096 tokens.
mooncake: 600 requests, all lengths divided by 16; the server's hit rate with room for every block,
and with room for a quarter, beside what the trace repeats and what an LRU cache would hit of it.
Ends with 1 if the first is off by more than half a point.
conversations: 100 of two to five turns. That each prompt holds all that was said before is
computed from the bytes that the server counted (its tokens are bytes) and those that it answered.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from loadgen.metrics import summarize
from loadgen.report.files import read_json
from loadgen.types import Record, Run
from loadgen.workload.reuse import lru_reuse, num_distinct_tokens, unbounded_reuse
from loadgen.workload.traces import Slice, cut_trace, read_trace
from serving.progress import NoProgress
from serving.store.local import resolve
from tests.loadgen.mocks import LOADGEN
from tests.serving.servers import running_server

MAX_OFF = 0.005
FAKE_TOKEN_BYTES = 8  # of KV memory
MOONCAKE = Slice(num_requests=600, divisor=16, max_context=8192)


def load(url: str, *flags: object) -> Run:
    """Run the load generator, show its report, and return what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        words = [*LOADGEN, "run", url, *map(str, flags), "--json", str(file)]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
        return read_json(file)


def azure(trace: Path) -> None:
    model = resolve(None, NoProgress())
    with running_server("--max-model-len", "4096") as server:
        load(
            server.url,
            *("--trace", trace, "--trace-start-s", 600, "--trace-speed", 0.02),
            *("--duration-s", 300, "--max-context", 4096, "--tokenizer", model.path),
        )


def mooncake(path: Path) -> bool:
    trace = cut_trace(read_trace(path), MOONCAKE)
    whole = num_distinct_tokens(trace)
    flags: list[object] = ["--trace", path, "--num-sessions", len(trace.requests)]
    flags += ["--trace-divisor", MOONCAKE.divisor, "--max-context", MOONCAKE.max_context]
    flags += ["--tokenizer", "bytes", "--concurrency", 8]
    lines, is_right = [], False
    for title, num_tokens in (("all", 2 * whole), ("a quarter", whole // 4)):
        with running_server("--fake", "--kv-memory", str(FAKE_TOKEN_BYTES * num_tokens)) as server:
            run = load(server.url, *flags, "--cache-tokens", num_tokens)
        reference = lru_reuse(trace.requests, trace.block_tokens, num_tokens // trace.block_tokens)
        found = summarize(run).throughput.hit_rate or 0.0
        off = found - reference.token_ratio
        lines.append(
            f"{title:>10}: {num_tokens:,} tokens of KV, {found:.2%} of the prompt tokens from the "
            f"cache; {reference.token_ratio:.2%} by the reference ({100 * off:+.2f} points)"
        )
        if title == "all":
            assert reference == unbounded_reuse(trace.requests, trace.block_tokens)
            is_right = abs(off) <= MAX_OFF
    print("\n".join(lines))
    return is_right


def conversations() -> bool:
    flags: list[object] = ["--num-sessions", 100, "--rate", 6, "--turns", "uniform:2-5"]
    flags += ["--think", 0.3, "--prompt-tokens", 48, "--output-tokens", 12, "--tokenizer", "bytes"]
    with running_server("--fake") as server:
        run = load(server.url, *flags)
    by_session: dict[int, list[Record]] = defaultdict(list)
    for record in run.records:
        by_session[record.session].append(record)
    right = sum(
        all(_goes_on(before, after) for before, after in pairwise(records))
        for records in by_session.values()
    )
    print(f"{right} of {len(by_session)} conversations: every prompt holds all that was said")
    return right == len(by_session) == 100


def _goes_on(before: Record, after: Record) -> bool:
    """Tell whether a prompt is as long as the one before, its answer and the new question."""
    grown = after.num_prompt_tokens - before.num_prompt_tokens
    return before.ok and after.ok and grown == len(before.text.encode()) + len("\n\n") + 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("load", choices=("azure", "mooncake", "conversations"))
    parser.add_argument("trace", type=Path, nargs="?")
    args = parser.parse_args()
    if args.load == "conversations":
        sys.exit(not conversations())
    if args.trace is None:
        parser.error(f"{args.load} needs a trace")
    if args.load == "mooncake":
        sys.exit(not mooncake(args.trace))
    azure(args.trace)


if __name__ == "__main__":
    main()
