"""How exactly, and at what cost, the load generator sees what a server sends.

    python -m tests.bench.client_accuracy [--rounds 3]

A mock server stamps every chunk with the monotonic clock. First the generator's capacity: events
per second of its own CPU time, under more streams than it can follow. Then, at a tenth and at half
of that, received less stamped, of the load generator and of a bare asyncio reader that only
timestamps bytes, each in a process of its own, in turn A-B-B-A. Measured on the CPU of the machine
it runs on; server and client share its cores, which is most of what the bare reader shows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np

from loadgen.runner import Progress, play
from loadgen.target import OpenAITarget
from loadgen.timing import precise_loop
from loadgen.types import Session, Turn
from tests.loadgen.mocks import mock_server

ITL_MS = 10.0
SECONDS = 5.0
CAPACITY_STREAMS = 600
_STAMP = re.compile(rb'"sent_ns":(\d+)')


async def by_loadgen(url: str, streams: int, tokens: int) -> list[float]:
    turn = Turn(prompt="hello", max_tokens=tokens)
    # Spread over the first interval, or all chunks would be due at the same moments.
    plan = tuple(Session(start_at_s=number / streams, turns=(turn,)) for number in range(streams))
    progress = Progress(len(plan))
    async with OpenAITarget(url=url, model="mock") as target:
        await play(plan, target, asyncio.Event(), progress, None)
    assert all(record.ok for record in progress.records)
    return [
        received - stamped
        for record in progress.records
        for received, stamped in zip(record.received_at_s, record.stamped_at_s, strict=True)
    ]


async def by_bare_reader(url: str, streams: int, tokens: int) -> list[float]:
    body = json.dumps({"prompt": "hello", "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    parts, seen = urlsplit(url), list[tuple[float, bytes]]()

    async def one(number: int) -> None:
        await asyncio.sleep(number / streams)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(head.encode() + body)
        while data := await reader.read(1 << 16):
            seen.append((time.monotonic(), data))
            if b"[DONE]" in data:
                break
        writer.close()

    await asyncio.gather(*(one(number) for number in range(streams)))
    return [at_s - int(ns) * 1e-9 for at_s, data in seen for ns in _STAMP.findall(data)]


READERS = {"loadgen": by_loadgen, "bare": by_bare_reader}


def child(name: str, url: str, streams: int, tokens: int) -> None:
    """Print what one reader saw: events, its CPU seconds, and percentiles of the lateness."""
    start_cpu_s, start_s = time.process_time(), time.monotonic()
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        late_s = runner.run(READERS[name](url, streams, tokens))
    used_s, took_s = time.process_time() - start_cpu_s, time.monotonic() - start_s
    p50, p99, p999 = (float(cut) for cut in np.percentile(late_s, [50, 99, 99.9]))
    seen = {"events": len(late_s), "cpu_s": used_s, "s": took_s}
    print(json.dumps(seen | {"p50": p50, "p99": p99, "p999": p999}))


def run(name: str, url: str, streams: int, tokens: int) -> dict[str, float]:
    words = ["--child", name, url, str(streams), str(tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.client_accuracy", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    if args.child:
        name, url, *numbers = args.child
        child(name, url, *map(int, numbers))
        return
    with mock_server("--ttft-ms", 100, "--itl-ms", 1) as (_, url):
        runs = [run("loadgen", url, CAPACITY_STREAMS, 100) for _ in range(args.rounds)]
    capacity = float(np.median([found["events"] / found["cpu_s"] for found in runs]))
    print(f"capacity: {capacity:,.0f} events a second of its CPU ({args.rounds} runs, median)")
    print(f"{'load':>8} {'reader':>8} {'events/s':>9} {'p50 ms':>8} {'p99':>8} {'p99.9':>8}")
    for share in (0.1, 0.5):
        streams = max(1, round(capacity * share * ITL_MS / 1000))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
        with mock_server("--ttft-ms", 100, "--itl-ms", ITL_MS) as (_, url):
            for _ in range(args.rounds):
                for name in ("loadgen", "bare", "bare", "loadgen"):
                    tokens = round(1000 * SECONDS / ITL_MS)
                    found[name].append(run(name, url, streams, tokens))
        for name, seen in found.items():
            rate = np.median([one["events"] / one["s"] for one in seen])
            cuts = [1000 * np.median([one[cut] for one in seen]) for cut in ("p50", "p99", "p999")]
            cells = " ".join(f"{cut:>8.2f}" for cut in cuts)
            print(f"{share:>8.0%} {name:>8} {rate:>9,.0f} {cells}", flush=True)


if __name__ == "__main__":
    main()
