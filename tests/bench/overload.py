"""Goodput, refusals and TTFT at 0.9, 1, 2, 5 and 10 times what a server can do.

    python -m tests.bench.overload [--seconds 120] [--max-num-waiting 4] [--loads 0.9 1 2 5 10]

`hocket serve --fake` under the load generator's open loop: Poisson arrivals, prompts of 16 tokens
and answers of 2 to 14. Capacity is what a closed loop of as many sessions as may run and queue gets
done per second. Requests that are meant to be sent in the first tenth are left out, and throughput
counts what ended after it.

It fails where goodput at the last load is below 0.9 of its peak, TTFT p99 above three times that at
the first, a refusal's p99 above 50 ms, another error seen, or the client above half a core.

Goodput counts answers whose TTFT is at most three times the p99 at 0.9 of capacity. Every latency
counts from when a request was meant to be sent. The server and the client share two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadgen.runner import Progress, play
from loadgen.target import OpenAITarget
from loadgen.types import Record
from loadgen.workload.build import WorkloadSpec, build
from tests.serving.servers import RunningServer, running_server

NUM_RUNNING = 32
NUM_TOKENS, NUM_ANSWER_TOKENS = 16, 8  # of prompts, and the mean of answers
# Were all of one length, they would end all at once, and who comes next would wait for all.
ANSWERS = "uniform:2-14"
REFUSED = ("http_429", "http_503")


@dataclass(frozen=True, slots=True)
class Seen:
    load: float
    rate: float
    seconds: float
    records: Sequence[Record]  # without the warm-up
    num_done: int  # answers that ended after the warm-up, before the last request was sent
    client_cpu: float  # cores
    server_cpu: float

    @property
    def served(self) -> list[Record]:
        return [record for record in self.records if record.ok]

    @property
    def ttft_p99_s(self) -> float:
        return percentile([record.ttft_s for record in self.served], 99)

    def goodput(self, ttft_s: float) -> float:
        """Return good answers per second; what was served late is not counted as throughput."""
        num_good = sum(record.ttft_s <= ttft_s for record in self.served)
        return self.num_done / self.seconds * num_good / max(1, len(self.served))


def percentile(values: Sequence[float], which: float) -> float:
    return float(np.percentile(values, which)) if values else float("nan")


def server_cpu_s(server: RunningServer) -> float:
    """Return CPU seconds of the server and of its children, if it has any."""
    pids = [server.process.pid]
    for pid in pids:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def run(
    server: RunningServer, load: float, rate: float, seconds: float, concurrency: int | None = None
) -> Seen:
    spec = WorkloadSpec(
        rate=rate,
        duration_s=None if concurrency else seconds,
        num_sessions=max(concurrency, round(rate * seconds)) if concurrency else None,
        prompt_tokens=str(NUM_TOKENS),
        output_tokens=ANSWERS,
        tokenizer="bytes",
        seed=round(load * 10),
    )
    plan = build(spec).plan
    progress = Progress(len(plan))
    async with OpenAITarget(url=server.url, model=server.model) as target:
        start_s, client_s, used_s = time.monotonic(), time.process_time(), server_cpu_s(server)
        await play(plan, target, asyncio.Event(), progress, concurrency)
        took_s = time.monotonic() - start_s
    client_s, used_s = time.process_time() - client_s, server_cpu_s(server) - used_s
    begin_s = seconds / 10 if concurrency is None else 0.0
    end_s = seconds if concurrency is None else progress.duration_s
    records = [record for record in progress.records if record.intended_at_s >= begin_s]
    num_done = sum(record.ok and begin_s <= record.end_at_s < end_s for record in progress.records)
    cores = (client_s / took_s, used_s / took_s)
    return Seen(load, rate, end_s - begin_s, records, num_done, *cores)


def show(seen: Seen, ttft_s: float) -> None:
    refused = [record for record in seen.records if record.error in REFUSED]
    others = Counter(
        record.error for record in seen.records if record.error and record.error not in REFUSED
    )
    refused_ms = [record.e2e_s * 1000 for record in refused]
    ttft_ms = [record.ttft_s * 1000 for record in seen.served]
    print(
        f"{seen.load:4g} x  {seen.rate:6.1f} req/s  goodput {seen.goodput(ttft_s):6.2f}/s  "
        f"served {len(seen.served):5}  TTFT p50 {percentile(ttft_ms, 50):7.1f} "
        f"p99 {percentile(ttft_ms, 99):7.1f} ms  refused {len(refused):6}  "
        f"p50 {percentile(refused_ms, 50):5.1f} p99 {percentile(refused_ms, 99):5.1f} ms  "
        f"cores: client {seen.client_cpu:.2f} server {seen.server_cpu:.2f}"
        + (f"  other errors {dict(others)}" if others else ""),
        flush=True,
    )


def verdict(runs: Sequence[Seen]) -> int:
    """Print what the last load did to the server beside the first; return the exit status."""
    slo_s = 3 * runs[0].ttft_p99_s
    last = runs[-1]
    refused_ms = [record.e2e_s * 1000 for record in last.records if record.error in REFUSED]
    num_errors = sum(record.error not in ("", *REFUSED) for seen in runs for record in seen.records)
    share = last.goodput(slo_s) / max(seen.goodput(slo_s) for seen in runs)
    slower, refusal_ms = last.ttft_p99_s / runs[0].ttft_p99_s, percentile(refused_ms, 99)
    client = max(seen.client_cpu for seen in runs)
    print(
        f"at {last.load:g} x: goodput {share:.3f} of peak, TTFT p99 {slower:.2f} of that at "
        f"{runs[0].load:g}, refusals p99 {refusal_ms:.1f} ms, {num_errors} other errors"
    )
    good = share >= 0.9 and slower <= 3 and not refusal_ms > 50 and not num_errors and client < 0.5
    print("PASSED" if good else "FAILED")
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--max-num-waiting", type=int, default=4)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.9, 1, 2, 5, 10])
    args = parser.parse_args()
    flags = ["--max-num-running", str(NUM_RUNNING), "--max-num-waiting", str(args.max_num_waiting)]
    with running_server("--fake", *flags) as server:
        concurrency = NUM_RUNNING + args.max_num_waiting // 2
        closed = asyncio.run(run(server, 0, 30.0, min(args.seconds, 30.0), concurrency))
        capacity = closed.num_done / closed.seconds
        print(
            f"capacity {capacity:.1f} requests/s of {NUM_TOKENS} + {NUM_ANSWER_TOKENS} tokens",
            flush=True,
        )
        runs = []
        for load in args.loads:
            runs.append(asyncio.run(run(server, load, load * capacity, args.seconds)))
            show(runs[-1], 3 * runs[0].ttft_p99_s)
    return verdict(runs)


if __name__ == "__main__":
    sys.exit(main())
